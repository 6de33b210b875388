"""launch/slurm.sbatch, submitted to a real Slurm: a controller and one node, started by the test on this
machine, with a key, a directory and ports of their own, and stopped again after it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch.machine import require_programs
from tests.starting import EXAMPLE, LAUNCH, LIMIT, environment, run

CONFIGURATION = """
ClusterName=distclip
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=500
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which ``sbatch`` and its kin find the test's own Slurm."""
    programs = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged")
    require_programs(*programs, packages=("slurm-wlm", "munge"), unless="DISTCLIP_NO_SLURM")
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="distclip-slurm-", dir="/tmp"))
        )
        directory.chmod(0o755)
        for name in ("munge", "state", "spool"):
            (directory / name).mkdir(mode=0o755)
        key = directory / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (directory / "munge", key):
            shutil.chown(path, "munge")
        munged = [
            f"--{name}={directory}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        start(stack, "runuser", "-u", "munge", "--", "/usr/sbin/munged", "-F", f"--key-file={key}", *munged)
        configuration = directory / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        ports = {"controller": free_port(), "node": free_port()}
        configuration.write_text(CONFIGURATION.format(host=host, directory=directory, **ports))
        wait_for(lambda: (directory / "munge" / "socket").exists(), directory)
        env = environment(SLURM_CONF=str(configuration), PATH=f"{os.environ['PATH']}:/usr/sbin")
        start(stack, "/usr/sbin/slurmctld", "-D", "-i", env=env)
        start(stack, "/usr/sbin/slurmd", "-D", env=env)
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%t", env=env).stdout, directory)
        yield env


def start(stack: ExitStack, *command: str, env: dict[str, str] | None = None) -> None:
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)


def wait_for(condition: object, directory: Path, seconds: float = LIMIT) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in directory.rglob("*log*"))
            pytest.fail(f"still waiting for Slurm; DISTCLIP_NO_SLURM=1 does without this test.\n{logs}")
        time.sleep(0.1)


def test_a_job_trains(slurm: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "job.log"
    options = ("--steps", "3", "--batch-size", "8", "--seq-len", "8", "--parallel", "fsdp2")
    env = slurm | {"NPROC_PER_NODE": "2"}
    sbatch = ("sbatch", "--parsable", "--nodes=1", f"--output={out}", LAUNCH / "slurm.sbatch")
    submitted = run(*sbatch, EXAMPLE, *options, env=env)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def state() -> str:
        return run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", env=slurm).stdout.strip()

    wait_for(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), out.parent)
    said = out.read_text()
    assert state() == "COMPLETED", said
    assert "norms on all 2 ranks: bit-identical" in said
    assert "one of 1 machines, with 2 ranks; meeting at " in said

    # What srun starts itself, without torchrun, would train twice, each alone: the example refuses.
    python = shutil.which("python", path=f"{LAUNCH.parent}/.venv/bin") or "python3"
    done = run("srun", "--ntasks=2", "--overcommit", python, EXAMPLE, *options, env=slurm)
    assert done.returncode != 0
    assert "srun has started 2 tasks, and none of them knows of the others" in done.stderr


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "this is not a Slurm job. Submit it: sbatch launch/slurm.sbatch"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": "/tmp"},
            "no launch/multinode.sh in /tmp: submit from the repository root",
        ),
    ],
)
def test_what_is_wrong_is_said(variables: dict[str, str], text: str) -> None:
    done = run("bash", LAUNCH / "slurm.sbatch", EXAMPLE, env=environment(**variables))
    assert done.returncode == 2
    assert text in done.stderr
