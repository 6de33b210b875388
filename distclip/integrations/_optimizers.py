"""The optimizers that step what an accelerator has clipped: those that it has prepared, and any other."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper
from distclip.decide.report import ClipReport
from distclip.inspection.advice import is_main_rank
from distclip.integrations._lists import ClippedList
from distclip.integrations._stepping import StepOfAccelerate, StepSkipper, holders_of, weakly

logger = logging.getLogger("distclip")


class Optimizers:
    """Has them leave out a step.

    Attributes:
        passes: of ``accelerator.backward``, so far.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.passes = 0
        # By the optimizer, torch's; of any other, by Accelerate's wrapper of it.
        self._skippers = weakref.WeakKeyDictionary[Any, StepSkipper]()
        self._steps = weakref.WeakSet[StepOfAccelerate]()
        # What each list's last clip said, for optimizers that are not prepared: when, and whether to skip.
        self._latest = weakref.WeakKeyDictionary[ClippedList, tuple[int, Tensor]]()
        self._unheld_said = weakref.WeakSet[Clipper]()
        self._handle = register_optimizer_step_pre_hook(weakly(self._before_any_step))
        weakref.finalize(self, self._handle.remove)

    def remove(self) -> None:
        self._handle.remove()
        for step in self._steps:
            step.remove()
        for skipper in self._skippers.values():
            skipper.remove()

    def that_hold(self, lst: ClippedList) -> list[torch.optim.Optimizer]:
        """The optimizers that hold some of the parameters."""
        optimizers = [unwrapped(o) for o in self._accelerator._optimizers]
        return [o for o in optimizers if any(id(p) in lst.ids for p in _held_by(o))]

    def leave_out(self, lst: ClippedList, report: ClipReport, *, scaled: bool) -> None:
        """What holds these parameters is to skip its next step, if the report says so."""
        # Of prepared optimizers non-finite steps are the scaler's to skip, where there is one.
        skipped = report.skipped & ~report.nonfinite if scaled else report.skipped
        prepared = set()
        for accelerated in self._accelerator._optimizers:
            optimizer = unwrapped(accelerated)
            prepared.add(id(optimizer))
            if any(id(p) in lst.ids for p in _held_by(optimizer)):
                skipper = self._skipper_of(optimizer, accelerated)
                skipper.note(skipped, of=self.passes, told=report.skipped)
        for optimizer, skipper in self._skippers.items():  # that have been seen to step by themselves
            other = skipper.hooked and id(optimizer) not in prepared
            if other and any(id(p) in lst.ids for p in parameters_of(optimizer)):
                skipper.note(report.skipped, of=self.passes)
        self._latest[lst] = self.passes, report.skipped

    def _skipper_of(self, optimizer: Any, accelerated: Any) -> StepSkipper:
        key = optimizer if isinstance(optimizer, torch.optim.Optimizer) else accelerated
        skipper = self._skipper_at(key, optimizer)
        if accelerated not in skipper.told:
            skipper.told.add(accelerated)
            if accelerated.scaler is not None or not skipper.hooked:
                self._steps.add(StepOfAccelerate(accelerated, skipper))
        return skipper

    def _skipper_at(self, key: Any, optimizer: Any) -> StepSkipper:
        if key not in self._skippers:
            self._skippers[key] = StepSkipper(optimizer)
        return self._skippers[key]

    def _before_any_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer of torch, whosesoever, steps: one that is not prepared has to skip as well."""
        if optimizer in self._skippers:
            return
        for lst, (passes, skipped) in self._latest.items():
            if any(id(p) in lst.ids for p in parameters_of(optimizer)):
                self._skipper_at(optimizer, optimizer).note(skipped, of=passes)

    def require_held(self, lst: ClippedList, owners: list[Any], *, skips: bool) -> None:
        """
        Raises:
            ValueError: on every rank: the step that follows is out of reach.
        """
        lbfgs = next((o for o in owners if isinstance(o, torch.optim.LBFGS)), None)
        if skips and lbfgs is not None:
            raise ValueError(
                f"{type(lbfgs).__name__} runs backward several times within a step, none of which can be "
                "skipped: pass on_nonfinite='raise' or 'propagate' to install(), and no strategy that skips; "
                "or train with another optimizer"
            )
        if owners and (not skips or lst.clipper in self._unheld_said):
            return
        held = {id(p) for o in owners for p in _held_by(o)}
        held.update(id(p) for o, s in self._skippers.items() if s.hooked for p in parameters_of(o))
        unheld = [t for t in lst.tensors if t.requires_grad and id(t) not in held]
        self._unheld_said.add(lst.clipper)
        if not unheld or (owners and not is_main_rank()):
            return
        kinds = holders_of(unheld)
        what = (
            f"no optimizer that this accelerator has prepared holds {self._name_of(unheld[0])}"
            + (f" and {len(unheld) - 1} more of the parameters that are clipped" if unheld[1:] else "")
            + (f" ({', '.join(kinds)} does)" if kinds else "")
        )
        remedy = (
            "Pass the optimizer through accelerator.prepare, or accelerator.prepare_optimizer if it is no "
            "torch.optim.Optimizer (prepare hands such a one back as it is), and step what that returns"
        )
        if owners:
            logger.warning(
                "%s: a step that distclip skips may be taken there all the same. %s; if nothing is to train "
                "them, set requires_grad_(False).", what, remedy,
            )  # fmt: skip
            return
        scaled = "their gradients would stay multiplied by the loss scale"
        taken = "a step that is to be skipped would be taken all the same"
        raise ValueError(f"{what}: {taken if skips else scaled}. {remedy}.")

    def _name_of(self, tensor: Tensor) -> str:
        for model in self._accelerator._models:
            for name, parameter in model.named_parameters():
                if parameter is tensor:
                    return repr(name)
        return f"a parameter of shape {tuple(tensor.shape)}"


def _held_by(optimizer: Any) -> Iterator[Tensor]:
    """The parameters of what has been prepared; of a wrapper without groups, of the optimizers in it."""
    if hasattr(optimizer, "param_groups"):
        yield from parameters_of(optimizer)
    else:
        for inner in vars(optimizer).values():
            if isinstance(inner, torch.optim.Optimizer):
                yield from parameters_of(inner)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]
