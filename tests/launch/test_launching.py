"""A launch that cannot work is refused before ranks wait for each other."""

from __future__ import annotations

import sys

import pytest

from distclip.launching import launch_problems, require_launch
from tests.starting import EXAMPLE, environment, run

TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
TWO |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, {}, "not MASTER_ADDR, MASTER_PORT: start with torchrun"),
        ({"RANK": "2"}, {}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, {}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": "x"}, {}, "RANK='x' is no number"),
        ({"WORLD_SIZE": "²"}, {}, "WORLD_SIZE='²' is no number"),
        ({"LOCAL_WORLD_SIZE": "4"}, {}, "LOCAL_WORLD_SIZE=4 is above WORLD_SIZE=2"),
        ({}, {"world_size": 8}, "needs 8 ranks, and WORLD_SIZE=2: start 8"),
        ({}, {"backend": "nccl", "gpus": 0}, "backend='nccl' needs a GPU"),
        ({}, {"backend": "cpu:gloo,cuda:nccl", "gpus": 0}, "needs a GPU"),
        ({}, {"gpus": 1}, "2 ranks on this machine share 1 GPUs: start at most 1"),
        ({}, {"backend": "gloo,carrier-pigeon"}, "is built without carrier-pigeon"),
    ],
)
def test_what_does_not_fit_is_said(
    change: dict[str, str | None], options: dict[str, object], text: str
) -> None:
    assert launch_problems(TWO, gpus=0) == launch_problems(TWO, backend="gloo", world_size=2, gpus=1) == []
    given = {name: value for name, value in (TWO | change).items() if value is not None}
    problems = launch_problems(given, **{"gpus": 0, **options})  # type: ignore[arg-type]
    assert any(text in problem for problem in problems), problems
    with pytest.raises(ValueError, match="; " if len(problems) > 1 else "."):
        require_launch(given, **{"gpus": 0, **options})  # type: ignore[arg-type]


def test_one_process_is_fine_unless_more_are_needed() -> None:
    require_launch({}, backend="gloo", gpus=0)
    require_launch({}, world_size=1, gpus=4)
    with pytest.raises(ValueError, match="needs 2 ranks, and there is one process, without a launcher"):
        require_launch({}, world_size=2)


def test_tasks_of_srun_that_do_not_know_of_each_other() -> None:
    assert launch_problems({"SLURM_STEP_NUM_TASKS": "1"}) == []
    with pytest.raises(ValueError, match="srun has started 4 tasks, and none of them knows of the others"):
        require_launch({"SLURM_STEP_NUM_TASKS": "4"})


def test_the_example_says_it_before_it_waits() -> None:
    """A rank of two without an address used to be an error of torch's own, or a wait for nobody."""
    env = environment(RANK="2", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    done = run(sys.executable, EXAMPLE, env=env)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ValueError: RANK=2 is not below WORLD_SIZE=2"
