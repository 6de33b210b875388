"""What happens when a script calls ``optimizer.step()`` by itself, after distclip has clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from distclip._optimizer_step import _lacks_momentum, is_fused, parameters_of, readable


class StepSkipper:
    """Lets the next step of an optimizer do nothing, where ``skipped`` ([] bool) says so.

    The script calls ``optimizer.step()`` all the same. A fused optimizer takes the flag as a tensor. Any
    other finds no gradients, for which the host must know the flag; they are back after the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.skipped: Tensor | None = None
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._found: list[Tensor | None] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        skipped, self.skipped = self.skipped, None
        self._hidden, self._found = [], []
        if skipped is None:
            return
        if is_fused(optimizer) and not _lacks_momentum(optimizer):
            found, flag = getattr(optimizer, "found_inf", None), skipped.float()
            flag = flag if found is None else torch.maximum(found, flag.to(found.device))
            optimizer.found_inf = readable(optimizer, flag)
            self._found = [found]
        elif skipped.item():
            self._hidden = [(p, p.grad) for p in parameters_of(optimizer)]
            for parameter, _ in self._hidden:
                parameter.grad = None

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        for found in self._found:
            if found is None:
                del optimizer.found_inf
            else:
                optimizer.found_inf = found
        self._hidden, self._found = [], []


class KeepingScaler:
    """Keeps a scaler from unscaling again what waits for the step of another optimizer.

    Accelerate calls ``scaler.update()`` with the step of each optimizer, and the scaler then forgets of all
    of them that they have been unscaled. Here it forgets that of the others with the next backward pass.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler, self._waiting = scaler, dict[int, Any]()
        self._update = scaler.update
        scaler.update = self._update_but_keep

    def remove(self) -> None:
        del self._scaler.update

    def forget(self) -> None:
        for key in self._waiting:
            self._scaler._per_optimizer_states.pop(key, None)
        self._waiting = {}

    def _update_but_keep(self, new_scale: Any = None) -> None:
        states = self._scaler._per_optimizer_states
        self._waiting = {key: s for key, s in states.items() if s["stage"] is OptState.UNSCALED}
        self._update(new_scale)
        states = self._scaler._per_optimizer_states
        for key, state in self._waiting.items():
            states[key] = state
