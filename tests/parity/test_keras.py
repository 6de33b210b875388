from __future__ import annotations

from typing import Any

import keras
import pytest

from distclip.strategies import GlobalNorm, PerParameter, Strategy, Value
from tests.parity.steps import STEPS, agree, clip, spiky_gradients


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (PerParameter(0.2, eps=0), {"clipnorm": 0.2}),
        (GlobalNorm(0.5, eps=0), {"global_clipnorm": 0.5}),
        (Value(0.1), {"clipvalue": 0.1}),
    ],
    ids=["clipnorm", "global_clipnorm", "clipvalue"],
)
def test_every_step_as_keras(strategy: Strategy, options: dict[str, Any]) -> None:
    assert keras.backend.backend() == "torch"
    optimizer = keras.optimizers.SGD(**options)
    touched = 0
    for (clipped, coefficient), gradients in zip(
        clip(strategy, spiky_gradients()), spiky_gradients(), strict=True
    ):
        assert agree(clipped, optimizer._clip_gradients(gradients))
        touched += coefficient.item() < 1
    assert 30 < touched <= STEPS
