"""Law 3 away from the CPU: a step whose plan is made waits for nothing, and mixes no devices."""

from __future__ import annotations

import json

import pytest
from torch.utils import backend_registration

from tests.device.steps import ROWS
from tests.starting import python


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no device that is made in Python",
)
def test_no_step_waits_for_the_device() -> None:
    # In a process of its own: a device, once named, stays.
    done = python("-m", "tests.device.steps")
    problems = json.loads(done.stdout)
    assert problems.keys() == ROWS.keys()
    controls = {name: problems.pop(name) for name in list(problems) if name.startswith("control")}
    assert {name: found for name, found in problems.items() if found} == {}
    wrong = {
        # The coefficient comes to where they are: where that is waited for, it is looked at first.
        "control: gradients on the CPU": "return bool(changed.item())",
        "control: some on the CPU": "_to_copy.default in change.py",
        "control: a value is read": "_local_scalar_dense",
        "control: a copy to the device": "_to_copy",
        "control: devices mixed": "devices",
    }
    assert controls.keys() == wrong.keys()
    assert all(any(word in line for line in controls[name]) for name, word in wrong.items()), controls
