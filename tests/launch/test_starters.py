"""launch/torchrun.sh and launch/multinode.sh: what they start, and what they say where they cannot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.starting import EXAMPLE, LAUNCH, environment, run

SMALL = ("--steps", "3", "--batch-size", "8", "--seq-len", "8")
NODE = {"NNODES": "1", "RDZV_ENDPOINT": "localhost:0", "NPROC_PER_NODE": "1"}


@pytest.mark.parametrize("script", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=lambda p: p.name)
def test_bash_can_read_it(script: Path) -> None:
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_torchrun_starts_as_many_ranks_as_asked_for() -> None:
    done = run("bash", LAUNCH / "torchrun.sh", EXAMPLE, *SMALL, env=environment(NPROC_PER_NODE="2"))
    assert done.returncode == 0, done.stderr
    assert "norms on all 2 ranks: bit-identical" in done.stdout


@pytest.mark.parametrize(("starter", "restarts"), [("torchrun", "1"), ("multinode", "1"), ("torchrun", "0")])
def test_a_second_life_gets_a_store_of_its_own(starter: str, restarts: str, tmp_path: Path) -> None:
    """In that of the first, gloo finds the addresses of ranks that are gone, now and then."""
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ.get('TORCHELASTIC_USE_AGENT_STORE'))")
    env = environment(**NODE, MAX_RESTARTS=restarts)
    done = run("bash", LAUNCH / f"{starter}.sh", script, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("False" if restarts == "1" else "True")


@pytest.mark.parametrize(
    ("starter", "change", "arguments", "text"),
    [
        ("torchrun", {}, (), "torchrun.sh: which script?"),
        ("torchrun", {}, ("no/such.py",), "torchrun.sh: no/such.py: there is no such script"),
        ("torchrun", {"NPROC_PER_NODE": "gpu"}, (EXAMPLE,), "NPROC_PER_NODE='gpu': expected a whole number"),
        ("torchrun", {"MAX_RESTARTS": "-1"}, (EXAMPLE,), "MAX_RESTARTS='-1': expected a whole number, 0 or"),
        ("multinode", {"NNODES": ""}, (EXAMPLE,), "NNODES is not set: on how many machines"),
        ("multinode", {"NNODES": "0"}, (EXAMPLE,), "NNODES='0': expected a whole number, 1 or more"),
        ("multinode", {"RDZV_ENDPOINT": ""}, (EXAMPLE,), "RDZV_ENDPOINT is not set: host:port of one of"),
        ("multinode", {"RDZV_ENDPOINT": "node1"}, (EXAMPLE,), "RDZV_ENDPOINT='node1': expected host:port"),
        ("multinode", {"RDZV_ENDPOINT": "no.invalid:1"}, (EXAMPLE,), "no address is known for 'no.invalid'"),
        ("multinode", {"IFACE": "eth99"}, (EXAMPLE,), "IFACE='eth99' has no IPv4 address on this machine"),
        ("multinode", {}, (), "multinode.sh: which script?"),
        ("gpu", {}, (), "sees no CUDA device"),
    ],
)
def test_what_is_missing_is_said(
    starter: str, change: dict[str, str], arguments: tuple[str, ...], text: str
) -> None:
    done = run("bash", LAUNCH / f"{starter}.sh", *arguments, env=environment(**{**NODE, **change}))
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_other_machines_are_not_waited_for_for_ever() -> None:
    env = environment(**{**NODE, "NNODES": "2", "JOIN_TIMEOUT": "3"})
    done = run("bash", LAUNCH / "multinode.sh", EXAMPLE, env=env)
    assert done.returncode == 1
    assert re.search(r"multinode.sh: 127.0.0.1 on lo, one of 2 machines, .* for up to 3 s", done.stderr)
    assert "RendezvousTimeoutError" in done.stderr


def test_gpu_goes_on_after_a_failure(tmp_path: Path) -> None:
    """(Which commands it starts; on a GPU, it is itself the test.)"""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh
[ "$1" = -c ] && exit  # there is a GPU, it says
echo "$@"
case "$*" in *bandwidth | *float32*) exit 1 ;; esac
""")
    python.chmod(0o755)
    steps = "tests bandwidth llama"
    env = environment(PYTHON=str(python), STEPS=steps, SCALE="0.5")
    done = run("bash", LAUNCH / "gpu.sh", tmp_path / "out", env=env)
    assert (done.returncode, done.stderr.strip()) == (1, "failed: bandwidth llama-float32")
    logs = {log.stem: log.read_text() for log in (tmp_path / "out").glob("*.log")}
    assert logs.keys() == {"tests", "bandwidth", "llama-bfloat16", "llama-float32"}
    assert "-m gpu" in logs["tests"]
    assert "--scale 0.5 --dtype bfloat16" in logs["llama-bfloat16"]
