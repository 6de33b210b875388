"""The clipper: one object that owns plan, strategy and report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip._apply import OnNonfinite, carry_out, require_policy
from distclip._description import Description, describe
from distclip._gradients import collect
from distclip._meter import Meter, regroup
from distclip._parameters import Parameters, freeze_source, named_parameters
from distclip._plan import Plan, build_plan
from distclip._report import ClipReport
from distclip._slots import Slots, groups_of_every, per_parameter, slots_of
from distclip._verification import verify_counting
from distclip.strategies._base import Strategy


class Clipper:
    """Clips the gradients of a model whose parameters may be spread over ranks in any way.

    Args:
        parameters: a Module, several Modules, an Optimizer, a Tensor, or an iterable of Tensors or of
            ``(name, Tensor)``. Give all parameters on every rank, whether or not they have a gradient.
        strategy: the algorithm, e.g. ``distclip.GlobalNorm(1.0)``.
        stages: the ranks of one pipeline, each of which holds other parameters: a ProcessGroup or a 1-D
            DeviceMesh. Every rank passes the parameters of its own stage (or stages).
        process_group: the ranks that together hold the model, a ProcessGroup or a 1-D DeviceMesh. Needed
            only where the parameters do not tell: by default the mesh that their DTensors live on, else
            the default group.
        on_nonfinite: what to do when the total norm is NaN or infinite, decided alike on every rank:
            ``"skip"`` leaves the gradients as they are and sets ``report.skipped``; ``"raise"`` raises
            :class:`NonFiniteError` on every rank; ``"zero"`` sets every gradient to zero; ``"propagate"``
            applies the decision all the same, as torch does.
        accumulate: dtype of the local sums of squares, float32 or float64. (The sums of ranks and of
            parameters are always joined in float64; norms come out as float32.)

    The plan is made at the first clip, by every rank in scope together.

    Raises:
        ValueError, TypeError: an argument cannot be meant.
        OwnershipError: from the first clip, on every rank alike: plain parameters differ between ranks.

    Example:
        >>> clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
        >>> loss.backward()
        >>> report = clipper.clip()
        >>> optimizer.step()
        >>> print(report)
        norm 3.41 → 1 (×0.293)
    """

    def __init__(
        self,
        parameters: Parameters,
        strategy: Strategy,
        *,
        stages: dist.ProcessGroup | DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        on_nonfinite: OnNonfinite = "skip",
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"{strategy=}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0)")
        if accumulate not in (torch.float32, torch.float64):
            raise ValueError(f"{accumulate=}: expected torch.float32 or torch.float64")
        self.strategy = strategy
        self.on_nonfinite: OnNonfinite = require_policy(on_nonfinite)
        self._source = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
        self._process_group, self._stages = process_group, stages
        self._accumulate = accumulate
        self._tensors: list[Tensor] = []
        self._plan: Plan | None = None
        self._meters: dict[bool, Meter] = {}  # by whether it measures every parameter
        self._slots = Slots((), ())

    @property
    def plan(self) -> Plan:
        """The plan, made at first need and again when a frozen parameter begins to train.

        Making it may communicate: every rank in scope reads this, or none.
        """
        if self._plan is None or not self._plan.fits(self._tensors):
            named = named_parameters(self._source)
            self._tensors = [p.tensor for p in named]
            self._plan = build_plan(named, self._process_group, self._stages)
            self._slots = slots_of(self.strategy, self._plan)
            self._meters.clear()
            self.strategy.prepare(self._plan.every)
            self.strategy.to(self._plan.device)
        return self._plan

    @torch.no_grad()
    def clip(self, *, param_norms: bool = False) -> ClipReport:
        """Clip the gradients in place: after ``backward``, before ``optimizer.step``, on every rank.

        One all-reduce of as many numbers as norms are asked for, none where all ranks hold everything;
        no host synchronisation.

        Args:
            param_norms: also measure every parameter, for ``report.param_norms`` (still one all-reduce).
                Must be the same on every rank.

        Raises:
            NonFiniteError: on every rank, where ``on_nonfinite="raise"`` and the norm is not finite.
        """
        plan = self.plan
        gradients = collect(plan, self._tensors)
        fine = param_norms or self.strategy.per_parameter
        sums = self._meter(plan, fine).power_sums(gradients)
        by_parameter = self._meter(plan, fine).norms(sums).slots if fine else None
        if fine and not self.strategy.per_parameter:
            slot = torch.tensor(groups_of_every(self.strategy, plan), device=sums.device)
            sums = regroup(sums, slot, self._slots.size, self.strategy.norm_type)
        norms = self._meter(plan, self.strategy.per_parameter).norms(sums)
        decision = self.strategy.decide(norms)
        report = carry_out(decision, norms, gradients, self._slots, self.on_nonfinite)
        return replace(report, _parameter_norms=by_parameter, _parameter_names=plan.names if fine else ())

    def describe(self) -> Description:
        """A table of the parameters of this rank: where each lies, and how it is counted; ``print`` it.

        Every rank in scope calls this, or none.
        """
        plan = self.plan
        return describe(plan, self._tensors)

    @torch.no_grad()
    def verify(self) -> float:
        """Gather the gradients that are there now, and check that each element is counted once.

        Every rank in scope calls this, or none, after a backward pass. It moves every gradient to every
        rank, one parameter at a time, in float64: a tool for debugging, not for every step.

        Returns:
            The 2-norm of the gathered gradient.

        Raises:
            OwnershipError: on every rank: names each parameter that is counted more or less than once, and
                the axis along which it is.
        """
        plan = self.plan
        collect(plan, self._tensors)  # sums what is partial
        return verify_counting(plan, self._tensors)

    def _meter(self, plan: Plan, fine: bool) -> Meter:
        if fine not in self._meters:
            slots = per_parameter(plan) if fine else self._slots
            self._meters[fine] = Meter(plan, slots, self.strategy.norm_type, self._accumulate)
        return self._meters[fine]

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to continue the same sequence: the strategy's state. The same on every
        rank, small, and independent of the number of ranks."""
        return {"strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks."""
        self.strategy.load_state_dict(state["strategy"])
