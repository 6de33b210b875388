"""launch/multinode.sh for real: two network namespaces are two hosts, with one cable between them.

Addresses and devices exist inside the two namespaces only, and go with them. Both hosts believe what
/etc/hosts says, that their own name is 127.0.0.1: only what multinode.sh passes on lets their ranks meet.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.machine import require_programs
from tests.starting import EXAMPLE, LAUNCH, LIMIT, ROOT, environment, run

OPTIONS = ("--steps", "12", "--batch-size", "8", "--seq-len", "16", "--parallel", "fsdp2", "--history")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, address) of two hosts."""
    require_programs("ip", packages=("iproute2",), unless="DISTCLIP_NO_NETNS")
    names = [f"distclip-{os.getpid()}-{side}" for side in "ab"]
    addresses = ["10.83.0.1", "10.83.0.2"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(
            f"ip {' '.join(arguments)}: {done.stderr.strip()}. Network namespaces need root and a "
            "kernel that has them; set DISTCLIP_NO_NETNS=1 to do without this test"
        )


def steps_of(history: Path) -> list[dict[str, object]]:
    return [row for row in map(json.loads, history.read_text().splitlines()) if "step" in row]


def test_two_hosts_train_as_one_does(hosts: list[tuple[str, str]], tmp_path: Path) -> None:
    env = environment(NPROC_PER_NODE="2")
    one = run("bash", LAUNCH / "torchrun.sh", EXAMPLE, *OPTIONS, tmp_path / "one.jsonl", env=env)
    assert one.returncode == 0, one.stderr

    meeting = {"NNODES": "2", "RDZV_ENDPOINT": f"{hosts[1][1]}:29400", "JOIN_TIMEOUT": "60"}
    env = environment(NPROC_PER_NODE="1", **meeting)
    script = (str(LAUNCH / "multinode.sh"), str(EXAMPLE), *OPTIONS, str(tmp_path / "two.jsonl"))
    machines = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, "bash", *script],
            env=env | ({"IFACE": "cable"} if name == hosts[0][0] else {}),  # the other finds out
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, _ in hosts
    ]  # fmt: skip
    try:
        said = [machine.communicate(timeout=LIMIT) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # torchrun then ends its ranks
        for machine in machines:
            machine.wait(60)
    assert [machine.returncode for machine in machines] == [0, 0], said
    for (_, address), (_, errors) in zip(hosts, said, strict=True):
        assert f"multinode.sh: {address} on cable, one of 2 machines, with 1 ranks" in errors

    (summary,) = [out for out, _ in said if out]  # that of rank 0, on either host
    assert "norms on all 2 ranks: bit-identical" in summary
    alone, apart = steps_of(tmp_path / "one.jsonl"), steps_of(tmp_path / "two.jsonl")
    assert len(alone) == 12
    assert len({row["total_norm"] for row in alone}) == 12
    assert {row["clipped"] for row in alone} >= {True}
    assert apart == alone  # norms, coefficients and losses: two ranks are summed in one order only
    assert final_loss(summary) == final_loss(one.stdout)


def final_loss(summary: str) -> float:
    found = re.search(r"^final loss: ([\d.]+)$", summary, flags=re.MULTILINE)
    assert found, summary
    return float(found[1])
