"""The Accelerate and the Trainer example, run as their users run them: on two ranks, and resumed on one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.starting import start, torchrun

# `accelerate launch`, whose command line also imports what it does not need here.
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num-processes", "2", "--main-process-port", "0")


def run(example: str, *options: str, launcher: tuple[str, ...] = ()) -> str:
    """What rank 0 says. It has to end cleanly."""
    trouble = ("terminate called", "Traceback", "UserWarning")
    return start(example, *options, launcher=launcher, trouble=trouble)[0]


def test_accelerate_under_its_launcher_and_resumed_by_one_process(tmp_path: Path) -> None:
    options = ("--strategy", "percentile", "--checkpoint", str(tmp_path / "run"), "--max-norm", "0.3")
    first = run("accelerate_train.py", *options, "--steps", "30", launcher=LAUNCH)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+), norm", first, flags=re.MULTILINE)]
    assert len(losses) == 3  # said once, by one rank
    assert losses[0] > losses[1] + 0.3 > losses[2] + 0.3
    rate, threshold = re.findall(r"^clip rate: (\S+), threshold: (\S+)$", first, flags=re.MULTILINE)[0]
    assert 0.1 < float(rate) < 1
    assert float(threshold) != 0.3  # no longer that of the first steps

    rest = run("accelerate_train.py", *options, "--steps", "4")
    assert "resumed from: " in rest
    # A history that began here would have no threshold of its own before the fifth step.
    assert float(re.findall(r"threshold: (\S+)$", rest, flags=re.MULTILINE)[0]) != 0.3


def test_trainer_under_torchrun_and_resumed_by_one_process(tmp_path: Path) -> None:
    options = ("--strategy", "percentile", "--output", str(tmp_path), "--log-every=5", "--save-every=30")
    first = run("hf_trainer.py", *options, "--steps", "30", launcher=torchrun(2))
    logged = re.findall(r"'loss': '(\S+?)', 'grad_norm': '(\S+?)',.*'clip_threshold': '(\S+?)'", first)
    assert len(logged) == 6
    assert float(logged[-1][0]) < float(logged[0][0]) - 1
    assert logged[0][2] == "10"  # that of the first nine steps
    assert all(0 < float(norm) < 10 > float(threshold) > 0 for _, norm, threshold in logged[2:])

    rest = run("hf_trainer.py", *options, "--steps", "35", "--resume")
    assert len(re.findall(r"'clip_rate'", rest)) == 1  # of the five steps that were left
    assert f"first loss: {float(logged[0][0]):.3f}" in rest  # the log goes on
    # A history that began here would have no threshold of its own before the tenth step.
    assert float(re.findall(r"'clip_threshold': '(\S+?)'", rest)[0]) < 10
