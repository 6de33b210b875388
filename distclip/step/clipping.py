"""What a Clipper is built on, and the integrations: the parts of a step, each to be called on every rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.apply.accumulation import MicroBatch, Window
from distclip.apply.change import OnNonfinite, Outcome, change, changes, require_policy, resolve
from distclip.apply.loss_scale import reciprocal
from distclip.apply.stepped import LIVING, Used
from distclip.current.parameter_set import ParameterSet
from distclip.decide.norms import LARGEST, Norms
from distclip.decide.report import ClipReport
from distclip.errors import NonFiniteError
from distclip.inspection.advice import Advice, warn_alike
from distclip.inspection.diagnosis import nonfinite_ranks, say_where
from distclip.inspection.sharing import Usage, claim, count_use, require_nobody_absent
from distclip.kernels.looking import look_at_one
from distclip.layout.arguments import as_count, as_loss, require_group, require_source, require_strategy
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source
from distclip.layout.synchronisation import Synchronisation
from distclip.measure.gradients import Gradients
from distclip.measure.reduction import local_loss
from distclip.planning.plan import Plan
from distclip.strategies._base import Strategy


class Clipping:
    """:meth:`begin`, :meth:`carry_out`, :meth:`finish`, in each step.

    Arguments are those of ``Clipper``.

    Attributes:
        on_nonfinite: may be set.
        options: those that are not as by default.
        parameters: what is clipped, and all that is known of it.
        window: of micro-batches.
        thread: that has used it last.
    """

    def __init__(
        self,
        parameters: Parameters,
        strategy: Strategy,
        *,
        stages: dist.ProcessGroup | DeviceMesh | None,
        process_group: dist.ProcessGroup | DeviceMesh | None,
        on_nonfinite: OnNonfinite,
        apply: str,
        overlap: bool,
        accumulate: torch.dtype,
    ) -> None:
        require_strategy(strategy, Strategy, parameters)
        if apply not in ("inplace", "deferred"):
            raise ValueError(f"{apply=}: expected 'inplace' or 'deferred'")
        if overlap and (strategy.per_unit or strategy.num_extra or strategy.measures_again):
            raise ValueError(f"overlap=True: {strategy} wants more than norms, and measures after backward")
        if accumulate not in (torch.float32, torch.float64):
            raise ValueError(f"{accumulate=}: expected torch.float32 or torch.float64")
        require_source(parameters)
        require_group("stages", stages)
        require_group("process_group", process_group)
        self.strategy, self.on_nonfinite = strategy, require_policy(on_nonfinite)
        self.deferred = apply == "deferred"
        self.may_be_empty = stages is not None or process_group is not None
        self.window = Window(staged=stages is not None)
        self.thread = threading.get_ident()
        self._source = freeze_source(parameters, may_be_empty=self.may_be_empty)
        given = {
            "on_nonfinite": on_nonfinite, "apply": apply, "overlap": overlap, "accumulate": accumulate
        }  # fmt: skip
        self.parameters = ParameterSet(
            strategy,
            stages=stages,
            process_group=process_group,
            accumulate=accumulate,
            overlap=overlap,
            options=given | {"norm_type": strategy.norm_type},
        )
        given |= {"stages": stages, "process_group": process_group}
        self.options = {k: v for k, v in given.items() if v is not None and v not in _DEFAULTS}
        self._advice = Advice(whole=not strategy.per_parameter and len(strategy.groups) == 1)
        self._usage = Usage()
        self._counts_backward = True  # until it is seen how gradients come
        LIVING.add(self)

    @property
    def plan(self) -> Plan:
        """The one that holds now; every rank in scope reads this, or none."""
        self.parameters.tensors_of(self._source)
        assert self.parameters.plan is not None
        return self.parameters.plan

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, as the plan has them; before there is one, as the source does."""
        return self.parameters.tensors if self.parameters.plan is not None else bare_tensors(self._source)

    @property
    def synchronisation(self) -> Synchronisation:
        """Also of backward passes that may come before the first clip."""
        return self.parameters.synchronisation_of(self._source)

    def follow(self, parameters: Parameters, modules: Sequence[nn.Module]) -> None:
        """Clip these from now on, with the strategy's state going on by name. ``modules``: the DDP and FSDP
        modules that synchronise the gradients, where the parameters do not bring them."""
        self._source = parameters
        self.parameters.watch(modules)

    # --- before the step ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def micro_batch(self, steps: int, last: bool) -> Iterator[MicroBatch]:
        """See ``Clipper.accumulate``."""
        micro = self.window.begin(
            as_count(steps), last, lambda: self.synchronisation.own_gradients(self.tensors)
        )
        before = Used(self.tensors) if self._counts_backward else None
        try:
            with contextlib.ExitStack() as stack:
                if not self.window.last:
                    stack.enter_context(self.synchronisation.off())
                yield micro
        except BaseException:
            self.window.end(raised=True)
            raise
        self.window.end(raised=False)
        if micro.began:
            self._counts_backward = False
        elif before is not None and not before.unchanged():
            self.window.raw, self._counts_backward = True, False
            warn_alike(
                "gradients came within clipper.accumulate() and not from micro.backward(loss), so the window "
                "is the sum of its micro-batches and not their mean, unless you divide the loss by the "
                "number of micro-batches. Write `with clipper.accumulate(steps) as micro: "
                "micro.backward(loss, scaler)`."
            )

    # --- the step, in order -------------------------------------------------------------------------------

    def begin(self, scaled: str = "no loss scale", *, param_norms: bool = False) -> Plan:
        """That the plan describes the parameters as they are, that their gradients are synchronised, and that
        all ranks are asked for the same. ``scaled``: by what the gradients are still to be divided.

        Raises:
            ValueError, OwnershipError, SettingsError: on every rank.
        """
        parameters, asked, strategy = self.parameters, self.parameters.asked, self.strategy
        self.window.require_complete()
        asked.options["on_nonfinite"] = self.on_nonfinite  # it may have been set since
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
            if not self._usage.clips:
                claim(strategy, self)
            asked.of_step = f"on_nonfinite={self.on_nonfinite!r}, {scaled}"
        joins = self.synchronisation.joins()
        if joins:
            require_nobody_absent(strategy, talks=self.is_weighted)
        parameters.make_current(self._source, param_norms=param_norms, weighted=self.is_weighted)
        assert parameters.plan is not None
        if joins:
            require_nobody_absent(strategy, talks=parameters.plan.group_name is not None)
        return parameters.plan

    @property
    def is_weighted(self) -> bool:
        """Whether a weight travels: also that of a rank that has none to show, whose micro-batches broke."""
        shows_none = self.window.weighted is None and self.parameters.asked.agreed.weighted
        return self.window.weights is not None or shows_none

    def _weight_on(self, device: torch.device) -> Tensor | None:
        """[1] float64, to be summed; None where ranks send none. Nothing where others have a weight and this
        rank is not asked for one, which makes all of theirs NaN."""
        if not self.parameters.asked.agreed.weighted:
            return self.window.weight_on(device)
        nothing = 0.0 if self.is_weighted else torch.nan
        own = self.window.weight_on(device)
        return torch.full((1,), nothing, dtype=torch.float64, device=device) if own is None else own

    def decline(self) -> None:
        """After :meth:`begin`, in place of what measures: where that cannot be on this rank, which raises."""
        self.parameters.decline()

    def leave(self, successor: Clipping, words: str = "") -> None:
        """In place of :meth:`begin`: that other one goes on from here, if it does on every rank.

        Args:
            words: for what, where that is another norm of the same parameters.

        Raises:
            OwnershipError, SettingsError: on every rank: some go on with this one.
        """
        self.parameters.leave(successor.parameters, words)

    def carry_out(
        self,
        inverse_scale: Tensor | None,
        policy: OnNonfinite,
        loss: Tensor | float | None = None,
        *,
        param_norms: bool = False,
    ) -> Outcome:
        """Measure, decide, and change the gradients, unless that is deferred.

        Args:
            inverse_scale: [] float32, 1 / loss scale where the gradients are still to be multiplied by it.
        """
        parameters, strategy = self.parameters, self.strategy
        plan, measurement = parameters.plan, parameters.measurement
        assert plan is not None
        assert measurement is not None
        try:
            given = as_loss(loss)
            if strategy.uses_loss:
                given = local_loss(given, optional=plan.scope.stages is not None)
            factor = self._factor(inverse_scale, plan.device)
            weight = self._weight_on(plan.device)
        except (TypeError, ValueError):
            self.decline()
            raise
        if not torch.compiler.is_compiling():
            self._note_use(plan)
        if weight is not None and not measurement.carries:
            total = measurement.everywhere(weight)
            factor = _over_mean(total, plan, factor) if self.is_weighted else factor
        gradients, norms, by_parameter = parameters.measure(
            parameters.tensors, param_norms, factor, given, weight
        )
        if weight is not None and measurement.carries and self.is_weighted:
            factor = _over_mean(weight, plan, factor)
        if factor is not None:
            norms = norms.times(factor)
            by_parameter = by_parameter.times(factor) if by_parameter is not None else None
        if strategy.measures_again:
            assert gradients is not None  # not with overlap
            norms = replace(norms, clamped=partial(measurement.clamped, gradients, factor))
        try:
            outcome = resolve(strategy.decide(norms), norms, policy, factor)
        except NonFiniteError as error:
            # All have it to whom the step's message went. Of others nothing is known: something else may keep
            # them from this step, or copies may be finite there.
            where = nonfinite_ranks(plan, parameters.tensors, plan.group)
            raise NonFiniteError(f"{error}; {say_where(where)}") from None
        if by_parameter is not None:
            report = replace(
                outcome.report, _parameter_norms=by_parameter.reported_slots, _parameter_names=plan.names
            )
            outcome = replace(outcome, report=report)
        if not self.deferred:
            self._change(outcome, gradients)
        return outcome

    def finish(self, report: ClipReport) -> None:
        """Take note of a step: the next window begins, and advice is given once per run."""
        self.window.close()
        if not torch.compiler.is_compiling():
            self._advice.observe(report)

    # --- its parts ----------------------------------------------------------------------------------------

    def _factor(self, inverse_scale: Tensor | None, device: torch.device) -> Tensor | None:
        """What the gradients have yet to be multiplied by: 1 / loss scale, and what an incomplete window
        lacks."""
        missing = self.window.missing
        if inverse_scale is None:
            return None if missing == 1 else torch.full((), missing, dtype=torch.float32, device=device)
        return inverse_scale.to(device) * missing

    def _change(self, outcome: Outcome, gradients: Gradients | None) -> None:
        measurement = self.parameters.measurement
        assert measurement is not None
        if gradients is None:
            if not changes(outcome):
                return
            gradients = measurement.collect(self.parameters.tensors)
        if self.parameters.overlap is not None:
            self.parameters.overlap.forget()  # kernels of distclip's own change no version
        change(outcome, gradients, measurement.slots)

    def grad_scale(self, outcome: Outcome) -> Tensor | None:
        """What a fused optimizer is to divide the gradients by where that is deferred: loss scale /
        coefficient, [] float32.

        Where float32 does not hold that, the gradients are multiplied here, which costs a pass.
        """
        if not self.deferred:
            return None
        if (
            outcome.coefficient is None
            or outcome.coefficient.dim()
            or outcome.bound is not None
            or outcome.zero is not None
        ):
            raise ValueError(
                'apply="deferred" needs a strategy with one coefficient for all gradients (GlobalNorm, '
                'Percentile, ZClip, SkipSpikes) and a policy other than on_nonfinite="zero"'
            )
        coefficient = outcome.coefficient if outcome.factor is None else outcome.coefficient * outcome.factor
        assert self.parameters.plan is not None
        least = look_at_one(coefficient)
        if (0 < least < _TINIEST) if least is not None else self.parameters.plan.wide:
            self._change(outcome, None)
            return torch.ones_like(coefficient, dtype=torch.float32)
        divisor = reciprocal(coefficient)
        return torch.where(coefficient == 0, divisor, divisor.clamp(max=LARGEST))

    def measure(self) -> tuple[Gradients, Norms]:
        """The gradients, and their norms as the strategy gets them; after :meth:`begin`."""
        parameters = self.parameters
        gradients, norms, _ = parameters.measure(parameters.tensors)
        assert parameters.measurement is not None
        return gradients or parameters.measurement.collect(parameters.tensors), norms

    def _note_use(self, plan: Plan) -> None:
        """What is looked at in the first clip."""
        if self._usage.clips:
            self._usage.clips += 1
            return
        count_use(self._usage, self.tensors[0] if self.tensors else None)
        if not plan.every:
            self._advice.no_parameters()
        whole = plan.group_name is None and bool(plan.positions)
        if whole and all(self.tensors[i].grad is None for i in plan.positions):
            self._advice.no_gradients()


_DEFAULTS = ("skip", "inplace", False, torch.float32)

# Below it a coefficient is no normal float32, and what divides by it is infinite.
_TINIEST = torch.finfo(torch.float32).tiny


def _over_mean(weight: Tensor, plan: Plan, factor: Tensor | None) -> Tensor:
    """``factor`` / the mean over the ranks of their weights, of which ``weight`` is the sum, [1] float64. No
    change where all weights are 0, and so all gradients; NaN, which no step is taken with, where the sum is
    negative."""
    total = weight.reshape(())
    share = torch.where(total > 0, plan.scope.size / total, torch.where(total == 0, 1.0, torch.nan)).float()
    return share if factor is None else share * factor
