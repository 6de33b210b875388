"""The optimizers of a step: each is stepped once, by one decision, and by the loss scale of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from distclip.apply.change import Outcome
from distclip.apply.loss_scale import LossScale, told
from distclip.apply.optimizer_step import parameters_of, require_covered, require_fused, take_step
from distclip.apply.stepped import AfterStep, StepGuard, Used, living_here
from distclip.decide.report import ClipReport
from distclip.inspection.advice import is_main_rank, logger
from distclip.layout.source import witness_of
from distclip.planning.plan import Plan
from distclip.step.clipping import Clipping
from distclip.torch_private.grad_scaler import set_states, states, states_if_any


class Stepping:
    """Steps optimizers with the gradients that a :class:`Clipping` clips.

    Where a loop passes them one by one, the first call decides on the gradients of all, and those that follow
    step by its decision.
    """

    def __init__(self, clipping: Clipping) -> None:
        self._clipping = clipping
        self.guard = StepGuard()
        self._suitable: _Suitable | None = None
        self._round: _Round | None = None
        self._twice_said = False

    def step(
        self,
        optimizers: list[torch.optim.Optimizer],
        scaler: GradScaler | None,
        loss: Tensor | float | None,
        *,
        param_norms: bool,
        update: bool,
    ) -> tuple[ClipReport, bool]:
        """See ``Clipper.step``. The report, and whether it is of a new step."""
        scales = scaler if scaler is not None and scaler.is_enabled() else None
        if self._continues(optimizers, scales):
            assert self._round is not None
            self._require_suitable(optimizers)
            self._take(self._round, optimizers, update=update)
            return self._round.outcome.report, False
        clipping = self._clipping
        plan = clipping.begin(told(scaler, optimizers), param_norms=param_norms)
        try:
            loss_scale = self._prepare(optimizers, scaler, plan)
        except ValueError:
            clipping.decline()
            raise
        policy = clipping.on_nonfinite
        if policy == "propagate" and loss_scale.scaler is not None:
            policy = "skip"
        if clipping.parameters.overlap is not None and scaler is not None and loss_scale.inverse is None:
            clipping.parameters.overlap.forget()  # they have been unscaled
        outcome = clipping.carry_out(loss_scale.inverse, policy, loss, param_norms=param_norms)
        self._round = _Round(outcome, clipping.grad_scale(outcome), loss_scale.scaler)
        self._take(self._round, optimizers, update=update)
        return outcome.report, True

    def _prepare(
        self, optimizers: list[torch.optim.Optimizer], scaler: GradScaler | None, plan: Plan
    ) -> LossScale:
        self._require_suitable(optimizers)
        known = states_if_any(scaler)
        if isinstance(known, AfterStep):
            known.require_fresh(self._clipping)
        self._say_if_taken(optimizers)
        return LossScale.of(scaler, optimizers, plan.device if plan.scope.stages else None)

    def _require_suitable(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Checked when optimizers, or what their groups hold, or the clipper's own parameters are new."""
        tensors = self._clipping.tensors
        if self._suitable is not None and self._suitable.still(optimizers, tensors):
            return
        require_covered(optimizers, tensors)
        if self._clipping.deferred:
            require_fused(optimizers)
        self._suitable = _Suitable(optimizers, tensors)

    def _continues(self, optimizers: list[torch.optim.Optimizer], scaler: GradScaler | None) -> bool:
        """Whether these are the other optimizers of a step whose gradients have all been clipped already.

        Raises:
            ValueError: they are, with another scaler.
        """
        latest = self._round
        if latest is None or not optimizers or not latest.lacks(optimizers):
            return False
        if latest.scaler is not scaler:
            raise ValueError(
                "the gradients of this optimizer were unscaled and clipped with those of the one before, "
                "which was stepped with another scaler: call clipper.step([first, second], scaler)"
            )
        return True

    def _take(self, round_: _Round, optimizers: list[torch.optim.Optimizer], *, update: bool) -> None:
        report = round_.outcome.report
        for each in optimizers:
            with self.guard.stepping(each):
                take_step(
                    each, report.skipped, may_skip=round_.outcome.may_skip, grad_scale=round_.grad_scale
                )
        scaler = round_.scaler
        if scaler is not None and not round_.is_updated:
            LossScale(scaler, optimizers, None).finish(report.nonfinite, update=update)
        for each in optimizers:
            self.guard.taken(each, list(parameters_of(each)))
        if scaler is not None and update and not states(scaler):
            others = [(c, Used(c.tensors)) for c in living_here() if c is not self._clipping]
            known: Any = states(scaler)
            set_states(scaler, AfterStep(known.default_factory, self.guard, optimizers, others))
        round_.add(optimizers, self._suitable.rest if self._suitable else [])

    def _say_if_taken(self, optimizers: list[torch.optim.Optimizer]) -> None:
        if self._twice_said or not optimizers:
            return
        if all(map(self.guard.has_taken, optimizers)):
            what = "clipper.step() was called twice with the same gradients"
            remedy = "Call it once after each backward pass"
        elif any(map(self.guard.has_stepped, optimizers)):
            what = "optimizer.step() was called before clipper.step(optimizer), with the same gradients"
            remedy = "Delete the line optimizer.step(): clipper.step(optimizer) takes its place"
        else:
            return
        self._twice_said = True
        if is_main_rank():
            logger.warning(
                "%s, so that the step is taken twice. %s. (A CUDA graph that replays backward leaves no "
                "trace: there this is nothing to worry about.)", what, remedy,
            )  # fmt: skip


@dataclass(eq=False)
class _Round:
    """One decision on all gradients of a clipper, whose optimizers may be stepped in several calls.

    Attributes:
        scaler: that scaled the loss, None without or where it is off.
        rest: the gradients whose optimizers have not been stepped yet, None where there are none.
    """

    outcome: Outcome
    grad_scale: Tensor | None
    scaler: GradScaler | None
    rest: Used | None = None
    _stepped: frozenset[int] = frozenset()
    _held: frozenset[int] = frozenset()

    def add(self, optimizers: Sequence[torch.optim.Optimizer], rest: Sequence[Tensor]) -> None:
        """They have been stepped. ``rest``: parameters that train, and that they do not hold."""
        if not rest:
            self.rest = None
            return
        self._stepped |= set(map(id, optimizers))
        self._held |= {id(p) for o in optimizers for p in parameters_of(o)}
        waiting = [t for t in rest if id(t) not in self._held]
        self.rest = Used(waiting) if waiting else None

    def lacks(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether they were not stepped yet, and their gradients are as the decision left them."""
        if self.rest is None or not self._stepped.isdisjoint(map(id, optimizers)):
            return False
        return self.rest.unchanged()

    @property
    def is_updated(self) -> bool:
        """Whether the scale has been updated since the optimizers were stepped."""
        assert self.scaler is not None
        return bool(self._stepped) and self._stepped.isdisjoint(states(self.scaler))


class _Suitable:
    """Optimizers that were found in order, and what their groups held."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], tensors: list[Tensor]) -> None:
        self._optimizers, self._tensors = list(map(id, optimizers)), tensors
        self._witnesses = list(map(witness_of, optimizers))
        held = {id(p) for o in optimizers for p in parameters_of(o)}
        # What trains and is in none of them.
        self.rest = [t for t in tensors if t.requires_grad and id(t) not in held]

    def still(self, optimizers: Sequence[torch.optim.Optimizer], tensors: list[Tensor]) -> bool:
        return (
            self._tensors is tensors
            and list(map(id, optimizers)) == self._optimizers
            and all(w.tensors(o) is not None for w, o in zip(self._witnesses, optimizers, strict=True))
        )
