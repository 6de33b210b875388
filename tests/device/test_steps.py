"""Law 3 away from the CPU: a step whose plan is made waits for nothing, and mixes no devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.device.steps import ROWS


def test_no_step_waits_for_the_device() -> None:
    # In a process of its own: a device, once named, stays.
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.steps"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    assert problems.keys() == ROWS.keys()
    controls = {name: problems.pop(name) for name in list(problems) if name.startswith("control")}
    assert {name: found for name, found in problems.items() if found} == {}
    wrong = {
        # The coefficient comes to where they are: where that is waited for, it is looked at first.
        "control: gradients on the CPU": "return bool(changed.item())",
        "control: some on the CPU": "_to_copy.default in _apply.py",
        "control: a value is read": "_local_scalar_dense",
        "control: a copy to the device": "_to_copy",
        "control: devices mixed": "two devices",
    }
    assert controls.keys() == wrong.keys()
    assert all(any(word in line for line in controls[name]) for name, word in wrong.items()), controls
