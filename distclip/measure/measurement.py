"""How one strategy measures one plan: which gradients come merged, what is asked for, in what message."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distclip.decide.norms import Norms, regroup
from distclip.decide.transfer import on_device
from distclip.measure.gradients import Gradients
from distclip.measure.meter import Meter
from distclip.measure.reduction import News, reduce_message
from distclip.measure.runs import Collector
from distclip.measure.slots import Slots, groups_of_every, per_parameter, slots_of
from distclip.measure.units import Units
from distclip.planning.plan import Plan
from distclip.strategies._base import Strategy


class Measurement:
    """Collects and measures gradients as a strategy wants them, step after step.

    Attributes:
        slots: what the coefficients of the strategy's decisions refer to.
    """

    def __init__(
        self, plan: Plan, strategy: Strategy, tensors: Sequence[Tensor], accumulate: torch.dtype
    ) -> None:
        if strategy.uses_loss and (strategy.per_unit or math.isinf(strategy.norm_type)):
            raise ValueError(
                f"{strategy}: the loss travels in a sum, which norms of p = ∞ and those of units do not "
                "share: give the strategy another norm_type, or judge the loss in a strategy of its own"
            )
        self.slots: Slots | Units = Units.of(plan, tensors) if strategy.per_unit else slots_of(strategy, plan)
        self._plan, self._strategy = plan, strategy
        self._accumulate = accumulate
        # Copied to the device once, when first asked for:
        self._slot_of_every: Tensor | None = None  # [parameters of all stages] int64
        self._parameter_of_unit: Tensor | None = None  # [units of all stages] int64
        # Whether a number of each rank can travel in the step's collective, to all in scope.
        group = plan.group
        self.carries = (
            isinstance(self.slots, Slots)
            and not math.isinf(strategy.norm_type)
            and not strategy.num_extra
            and (plan.scope.size if group is None else group.size()) == plan.scope.size
            and (group is not None or plan.scope.size == 1)
        )
        # By whether every parameter is measured.
        self._meters: dict[bool, Meter] = {}
        self._collectors: dict[bool, Collector] = {}

    def collect(self, tensors: Sequence[Tensor], param_norms: bool = False) -> Gradients:
        """The gradients as they are now; adjacent ones that count alike as one tensor."""
        if param_norms not in self._collectors:
            kinds: Sequence[Hashable] = range(len(self._plan.parameters))
            apart = param_norms or self._strategy.names_parameters()
            if isinstance(self.slots, Slots) and not apart:
                kinds = list(zip(self.slots.of, self._plan.multiplicities, strict=True))
            self._collectors[param_norms] = Collector(self._plan, kinds)
        return self._collectors[param_norms](tensors)

    def norms(
        self,
        tensors: Sequence[Tensor],
        gradients: Gradients | None,
        param_norms: bool = False,
        factor: Tensor | None = None,
        loss: Tensor | None = None,
        ready: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        news: News | None = None,
    ) -> tuple[Norms, Norms | None]:
        """The norms that the strategy wants, and those of the parameters where they are measured as well.

        Of the gradients as they are; only the sums of ``strategy.elementwise`` are of gradients × ``factor``.
        One all-reduce at most. ``loss``: [] this rank's, or None where it has none. ``ready``: what
        has been measured already, in place of the gradients. ``weight``: [1] float64, a number of this rank
        that becomes the sum over all, in place, where ``self.carries``. ``news``: to the other ranks.

        Raises:
            OutdatedPlan, AskedOtherwise: see ``reduce_message``.
        """
        if isinstance(self.slots, Units):
            assert gradients is not None
            return self._norms_of_units(self.slots, tensors, gradients, param_norms, news)
        plan, p, own = self._plan, self._strategy.norm_type, self._strategy.per_parameter
        meter = self._meter(param_norms or own)
        count = self._strategy.num_extra
        judged = _with_count(loss, plan.device) if self._strategy.uses_loss else None
        parts = [x for x in (judged, weight if self.carries else None) if x is not None]
        beside = torch.cat(parts) if parts else None
        sums, tail, far = meter.power_sums(gradients, factor, beside, ready, news=news)
        if weight is not None and self.carries:
            weight.copy_(tail[-1:])
        by_parameter = meter.norms(sums, far) if param_norms or own else None
        if param_norms and not own:
            if self._slot_of_every is None:
                groups = groups_of_every(self._strategy, plan)
                self._slot_of_every = on_device(groups, torch.int64, sums.device)
            sums = regroup(sums, self._slot_of_every, self.slots.size, p)
            far = None if far is None else regroup(far, self._slot_of_every, self.slots.size, p)
        norms = replace(
            Norms.from_power_sums(sums, p, self.slots.labels, far, meter.distance),
            extra=tail[:count] if count else None,
            loss=(tail[count] / tail[count + 1]).float() if judged is not None else None,
        )
        return norms, by_parameter

    def clamped(
        self, gradients: Gradients, factor: Tensor | None, coefficients: Tensor, bound: Tensor
    ) -> Tensor:
        """As ``Norms.clamped``, of gradients that have been collected, times ``factor``."""
        return self._meter(self._strategy.per_parameter).clamped(gradients, factor, coefficients, bound)

    def everywhere(self, number: Tensor) -> Tensor:
        """[1] float64: the sum over all ranks in scope, in an all-reduce of its own."""
        group = self._plan.scope.group()
        return reduce_message(number, 1.0, None if group is None else group.group_name)

    def _norms_of_units(
        self,
        units: Units,
        tensors: Sequence[Tensor],
        gradients: Gradients,
        param_norms: bool,
        news: News | None,
    ) -> tuple[Norms, Norms | None]:
        plan, p = self._plan, self._strategy.norm_type
        sums, weights, far = units.power_sums(plan, gradients, tensors, news=news)
        of_units = Norms.from_power_sums(sums, p, (), far, units.distance)
        norms = replace(of_units, weights=weights.sqrt().float())
        if not param_norms:
            return norms, None
        if self._parameter_of_unit is None:
            owners = [i for i, info in enumerate(plan.every) for _ in range(info.units)]
            self._parameter_of_unit = on_device(owners, torch.int64, sums.device)
        sums = regroup(sums, self._parameter_of_unit, len(plan.every), p)
        far = None if far is None else regroup(far, self._parameter_of_unit, len(plan.every), p)
        return norms, Norms.from_power_sums(sums, p, plan.names, far, units.distance)

    def _meter(self, every_parameter: bool) -> Meter:
        if every_parameter not in self._meters:
            slots = per_parameter(self._plan) if every_parameter else self.slots
            assert isinstance(slots, Slots)
            s = self._strategy
            extra = (s.num_extra, s.elementwise) if s.num_extra else None
            self._meters[every_parameter] = Meter(self._plan, slots, s.norm_type, self._accumulate, extra)
        return self._meters[every_parameter]


def _with_count(loss: Tensor | None, device: torch.device) -> Tensor:
    """[2] float64: what makes a mean over the ranks that have a loss."""
    if loss is None:
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack([loss.to(device, torch.float64), torch.ones((), dtype=torch.float64, device=device)])
