"""The configurations of ``accelerate launch``, read by Accelerate itself, and DDP's started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.starting import LAUNCH, environment, run

CONFIGURATIONS = LAUNCH / "accelerate"
SCRIPT = Path(__file__).with_name("report_world.py")
# Not the command `accelerate`, which imports timm if that is there, which may lack torchvision.
COMMAND = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")


def variables(name: str) -> dict[str, str]:
    """What ``accelerate launch`` would set for the ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), str(SCRIPT)]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (args.num_processes, args.num_machines, defaults.use_cpu) == (2, 1, False)
    set_: dict[str, str] = prepare_multi_gpu_env(args)
    return set_


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("ddp", {"ACCELERATE_USE_FSDP": None, "ACCELERATE_MIXED_PRECISION": "no"}),
        (
            "fsdp1",
            {
                "FSDP_VERSION": "1",
                "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
                "FSDP_USE_ORIG_PARAMS": "true",
                "FSDP_SYNC_MODULE_STATES": "true",
            },
        ),
        ("fsdp2", {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}),
    ],
)
def test_accelerate_reads_it(name: str, want: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in os.environ.keys() - environment().keys():  # what a launcher around this has set
        monkeypatch.delenv(variable, raising=False)
    got = variables(name)
    if name != "ddp":
        want = want | {
            "ACCELERATE_USE_FSDP": "true",
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }
    assert {key: got.get(key) for key in want} == want


def test_fsdp2_becomes_accelerates_own_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """(FSDP1's needs a GPU as soon as it is made.)"""
    from accelerate.utils import FullyShardedDataParallelPlugin

    for variable, value in variables("fsdp2").items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


def test_ddp_trains_together() -> None:
    """On the CPU, which Accelerate has to be told: without a GPU its ranks would else not join at all."""
    env = environment(ACCELERATE_USE_CPU="true")
    done = run(*COMMAND, CONFIGURATIONS / "ddp.yaml", SCRIPT, env=env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert (said["type"], said["world"], said["mixed"]) == ("MULTI_CPU", 2, "no")
    assert said["norm"] == pytest.approx(1.5 * 6**0.5, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_fsdp_trains_on_a_gpu(name: str) -> None:
    env = environment()
    del env["CUDA_VISIBLE_DEVICES"]
    own = ("--num_processes", "1", "--fsdp_auto_wrap_policy", "NO_WRAP")
    done = run(*COMMAND, CONFIGURATIONS / f"{name}.yaml", *own, SCRIPT, env=env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert (said["type"], said["world"], said["mixed"]) == ("FSDP", 1, "bf16")
    assert said["norm"] == pytest.approx(6**0.5, rel=1e-6)
