"""The clipper: one object that owns plan, strategy and report."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from distclip.apply.accumulation import MicroBatch, Window
from distclip.apply.change import OnNonfinite, Outcome, change, changes, require_policy, resolve
from distclip.apply.loss_scale import LossScale, reciprocal, scale_on_cpu
from distclip.apply.optimizer_step import parameters_of, require_covered, require_fused, take_step
from distclip.apply.stepped import LIVING, AfterStep, StepGuard, Used, living_here
from distclip.current.parameter_set import ParameterSet
from distclip.decide.norms import LARGEST, Norms
from distclip.decide.report import ClipReport
from distclip.errors import NonFiniteError
from distclip.inspection.advice import Advice, is_main_rank, logger, warn_alike
from distclip.inspection.description import Description, describe
from distclip.inspection.diagnosis import nonfinite_ranks, say_where
from distclip.inspection.sharing import Usage, claim, count_use, require_nobody_absent
from distclip.inspection.verification import verify_counting
from distclip.kernels.looking import look_at_one
from distclip.layout.arguments import (
    as_count,
    as_loss,
    as_optimizers,
    require_group,
    require_scaler,
    require_source,
    require_strategy,
)
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source
from distclip.layout.source import witness_of
from distclip.layout.synchronisation import Synchronisation
from distclip.measure.gradients import Gradients, collect
from distclip.measure.reduction import local_loss
from distclip.planning.plan import Plan
from distclip.strategies._base import Strategy


class Clipper:
    """Clips the gradients of a model whose parameters may be spread over ranks in any way.

    Args:
        parameters: a Module, several Modules, an Optimizer, a Tensor, or an iterable of Tensors or of
            ``(name, Tensor)``. Give all parameters on every rank, whether or not they have a gradient.
        strategy: the algorithm, e.g. ``distclip.GlobalNorm(1.0)``.
        stages: the ranks of one pipeline, each of which holds other parameters: a ProcessGroup or a 1-D
            DeviceMesh. Every rank passes the parameters of its own stage (or stages). Where only some
            stages change theirs later, every rank makes a new Clipper then.
        process_group: the ranks that together hold the model, a ProcessGroup or a 1-D DeviceMesh. Needed
            only where the parameters do not tell: by default the mesh that their DTensors live on, else
            the default group.
        on_nonfinite: what to do when the total norm is NaN or infinite, decided alike on every rank:
            ``"skip"`` leaves the gradients as they are and sets ``report.skipped``; ``"raise"`` raises
            :class:`NonFiniteError`, which names the parameters, on every rank; ``"zero"`` sets every
            gradient to zero; ``"propagate"`` applies the decision all the same, as torch does (whose
            GradScaler, given to :meth:`step`, skips the step all the same).
        apply: ``"inplace"`` changes the gradients; ``"deferred"`` leaves that to :meth:`step`'s optimizer,
            which takes the coefficient (and the loss scale) along in its own pass. For fused Adam, AdamW,
            SGD and (torch 2.13, not yet 2.11) Adagrad, and strategies with one coefficient for all.
        overlap: measure each gradient during backward, as soon as it is final, so that after backward only
            the collective and the decision remain: those of FSDP2 and other DTensors, of DDP modules in
            ``parameters``, and of a single process. The rest (also what is offloaded to the CPU, and DDP with
            a communication hook of the script's own) is measured after backward, and so is whatever has been
            changed since, by a hook or by the script. What cannot be seen: on the CPU, a change through a
            NumPy array or raw pointer that was taken before; on accelerators, whatever changes no version
            (``p.grad.data``, ``GradScaler.unscale_``, collectives), if only in part: call :meth:`step` with
            the GradScaler, and ``torch.autograd.graph.increment_version(p.grad)`` after others. Not for
            unit-wise strategies and those with sums of their own (``AGC``,
            ``Value(measure_direction=True)``). DDP takes one communication hook, so register one of your own
            before the first clip.
        accumulate: dtype of the local sums of squares, float32 or float64. (The sums of ranks and of
            parameters are always joined in float64; norms come out as float32.)

    The plan is made at the first clip, by every rank in scope together, and anew when the program changes the
    parameters: replaces, adds, removes or unfreezes some, in the same step on every rank. The strategy's
    state goes on by the names of parameters. Where only some ranks change theirs, all raise.

    Attributes:
        steps: calls of :meth:`step` so far, those that skipped included; saved in ``state_dict()``.

    Raises:
        ValueError, TypeError: an argument cannot be meant.
        OwnershipError: from the first clip, on every rank alike: plain parameters differ between ranks.
        SettingsError: from the first clip, on every rank alike: ranks have other strategies or arguments.

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
        apply: Literal["inplace", "deferred"] = "inplace",
        overlap: bool = False,
        accumulate: torch.dtype = torch.float32,
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
        self._strategy = strategy
        self.on_nonfinite: OnNonfinite = require_policy(on_nonfinite)
        self._source = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
        self.steps = 0
        self._deferred = apply == "deferred"
        self._stages, self._process_group = stages, process_group
        self._overlaps, self._accumulate = overlap, accumulate
        self._window = Window(staged=stages is not None)
        self._suitable: _Suitable | None = None
        self._round: _Round | None = None
        self._guard = StepGuard()
        weakref.finalize(self, self._guard.remove)
        self._usage = Usage()
        self._said: set[str] = set()  # once each
        self._parameters = ParameterSet(
            strategy,
            stages=stages,
            process_group=process_group,
            accumulate=accumulate,
            overlap=overlap,
            options={
                "on_nonfinite": on_nonfinite,
                "apply": apply,
                "overlap": overlap,
                "accumulate": accumulate,
                "norm_type": strategy.norm_type,
            },
        )
        self._advice = Advice(whole=not strategy.per_parameter and len(strategy.groups) == 1)
        self.thread = threading.get_ident()  # that has used it last
        LIVING.add(self)

    @property
    def strategy(self) -> Strategy:
        """The one that it was made with. Its state goes on from step to step."""
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        raise AttributeError(
            f"a Clipper keeps the strategy that it was made with ({_told(self._strategy)}): make a new one, "
            "distclip.Clipper(model, strategy), or make the threshold a function of the step: distclip.Warmup"
        )

    @property
    def plan(self) -> Plan:
        """The plan, made at first need and again when the program has changed the parameters.

        Making it may communicate: every rank in scope reads this, or none.
        """
        self._parameters.tensors_of(self._source)
        assert self._parameters.plan is not None
        return self._parameters.plan

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, as the plan has them."""
        return self._parameters.tensors

    @torch.no_grad()
    def clip(self, *, loss: Tensor | float | None = None, param_norms: bool = False) -> ClipReport:
        """Clip the gradients in place: after ``backward``, before ``optimizer.step``, on every rank.

        One all-reduce of as many numbers as norms are asked for, none where all ranks hold everything;
        no host synchronisation.

        Args:
            loss: [] the loss of this rank's batch, for a strategy that judges the mean over ranks
                (``SkipSpikes(use_loss=True)``). With ``stages``, ranks that have none leave it out.
            param_norms: also measure every parameter, for ``report.param_norms`` (still one all-reduce).
                Must be the same on every rank: the first time ranks agree on that.

        Raises:
            ValueError: the strategy judges the loss, and there is none.
            NonFiniteError: on every rank, where ``on_nonfinite="raise"`` and the norm is not finite.
        """
        if self._deferred:
            raise ValueError(
                'with apply="deferred" the optimizer does the clipping: call clipper.step(optimizer)'
            )
        self.begin(param_norms=param_norms)
        outcome = self.carry_out(None, self.on_nonfinite, loss, param_norms=param_norms)
        self._window.close()
        self.observe(outcome.report)
        return outcome.report

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scaler: GradScaler | None = None,
        *,
        loss: Tensor | float | None = None,
        param_norms: bool = False,
        update: bool = True,
    ) -> ClipReport:
        """Unscale once, measure, decide, clip, step or skip, update the scale: after ``backward``, on every
        rank, in place of ``scaler.unscale_``, ``clip_grad_norm_``, ``scaler.step`` and ``scaler.update``.

        The norms are those of the unscaled gradients, though these are never unscaled by a pass of their
        own: that joins the multiplication that clips. Whether a step is skipped, and so the next loss scale,
        is decided on the reduced norm: alike on every rank, without a further collective. A skipped step
        leaves parameters, optimizer and strategy as they were.

        Args:
            optimizer: one, or several that are stepped or skipped together. All their parameters must be
                among the clipper's. (Where a loop passes them one by one, the first call clips the gradients
                of all, and those that follow step by its decision and return its report.)
            scaler: ``torch.amp.GradScaler`` or ``ShardedGradScaler`` that scaled the loss, if any. Its
                ``unscale_`` may have been called before. ``scaler.update()`` is called here.
            loss: as for :meth:`clip`; not multiplied by the loss scale.
            param_norms: as for :meth:`clip`.
            update: whether to call ``scaler.update()``. Where one scaler serves several clippers (a GAN),
                only the last step of an iteration does: ``d.step(optimizer_d, scaler, update=False)``, then
                ``g.step(optimizer_g, scaler)``.

        Raises:
            ValueError: gradients are not synchronised yet, the optimizer has parameters that the clipper
                does not know, or it cannot do what ``apply="deferred"`` asks; the scale that the gradients
                were made with has been updated since. And from the script's own ``optimizer.step()``,
                ``scaler.step()``, ``unscale_()`` or ``update()`` behind this, with the same gradients.
            TypeError: no ``torch.optim.Optimizer``.
            NonFiniteError: on every rank, where ``on_nonfinite="raise"`` and the norm is not finite.

        Example:
            >>> scaler.scale(loss).backward()
            >>> report = clipper.step(optimizer, scaler)
            >>> optimizer.zero_grad()
        """
        optimizers = as_optimizers(optimizer, may_be_empty=self._may_be_empty)
        require_scaler(scaler)
        if self._continues(optimizers, scaler):
            return self._continue(optimizers, scaler, update=update)
        plan = self.begin(scaler, param_norms=param_norms)
        try:
            self._require_suitable(optimizers)
            states = getattr(scaler, "_per_optimizer_states", None)  # a scaler that is off has none
            if isinstance(states, AfterStep):
                states.require_fresh(self)
            self._say_if_taken(optimizers)
            loss_scale = LossScale.of(scaler, optimizers, plan.device if plan.scope.stages else None)
        except ValueError:
            self._parameters.decline(param_norms, weighted=self._window.weights is not None)
            raise
        policy = self.on_nonfinite
        if policy == "propagate" and loss_scale.scaler is not None:
            policy = "skip"
        if self._parameters.overlap is not None and scaler is not None and loss_scale.inverse is None:
            self._parameters.overlap.forget()  # they have been unscaled
        outcome = self.carry_out(loss_scale.inverse, policy, loss, param_norms=param_norms)
        grad_scale = self._grad_scale(outcome) if self._deferred else None
        self._round = _Round(outcome, grad_scale, loss_scale.scaler)
        self._take_steps(self._round, optimizers, update=update)
        self.steps += 1
        self._window.close()
        self.observe(outcome.report)
        return outcome.report

    @contextlib.contextmanager
    def accumulate(self, steps: int, *, last: bool = False) -> Iterator[MicroBatch]:
        """Around the forward and backward pass of one micro-batch of ``steps`` that make one step.

        Until the last micro-batch of a window gradients are not synchronised (``no_sync`` of DDP and FSDP1,
        ``set_requires_gradient_sync`` of FSDP2). Where a window stands is saved in ``state_dict()``.

        A block that raises, or leaves its backward pass out, keeps its place in the window and does not
        count: the window is the mean over the others, on each rank over its own. (Where it was the last, the
        next one takes its place; if that is so on some ranks only, the others wait for them in DDP or FSDP.)
        Where its backward pass was under way, ``.grad`` may hold a part of it: then this rank's gradients
        become NaN, so that ``on_nonfinite`` decides on every rank, and a line in the log says so; unless
        ``optimizer.zero_grad()`` is called before the next block.

        Args:
            steps: micro-batches in a window, ≥ 1.
            last: this is the last micro-batch that there is, so the window ends here. Its gradients then
                count as the mean over the micro-batches that it has.

        Raises:
            ValueError: ``steps`` is not positive, or changes within a window; inside another micro-batch.
            TypeError: ``steps`` is no whole number.

        Warns:
            Once, where gradients come by another way than ``micro.backward``, which divides by ``steps``.

        Example:
            >>> for i, batch in enumerate(batches):
            ...     with clipper.accumulate(4, last=i == len(batches) - 1) as micro:
            ...         micro.backward(loss_of(model(batch)), scaler)
            ...     if micro.complete:
            ...         clipper.step(optimizer, scaler)
            ...         optimizer.zero_grad()
        """
        micro = self._window.begin(as_count(steps), last, self._own_gradients)
        before = None if "backward" in self._said else Used(self._bare())
        try:
            with contextlib.ExitStack() as stack:
                if not self._window.last:
                    stack.enter_context(self._synchronisation_of_source.off())
                yield micro
        except BaseException:
            self._window.end(raised=True)
            raise
        self._window.end(raised=False)
        if micro.began:
            self._said.add("backward")
        elif before is not None and not before.unchanged():
            self._window.raw = True
            self._said.add("backward")
            warn_alike(
                "gradients came within clipper.accumulate() and not from micro.backward(loss), so the window "
                "is the sum of its micro-batches and not their mean, unless you divide the loss by the "
                "number of micro-batches. Write `with clipper.accumulate(steps) as micro: "
                "micro.backward(loss, scaler)`."
            )

    def begin(self, scaler: GradScaler | None = None, *, param_norms: bool = False) -> Plan:
        """Before :meth:`carry_out`: that the plan describes the parameters as they are, and that their
        gradients are synchronised. ``scaler``: whose scale they still have.

        Raises:
            ValueError, OwnershipError, SettingsError: on every rank.
        """
        self._window.require_complete()
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
            if not self._usage.clips:
                claim(self.strategy, self)
        self._parameters.options["on_nonfinite"] = self.on_nonfinite  # it may have been set since
        if not torch.compiler.is_compiling():
            scaler = scaler if scaler is not None and scaler.is_enabled() else None
            has = "no" if scaler is None else "a"
            self._parameters.asked = f"on_nonfinite={self.on_nonfinite!r}, {has} scaler"
            self._parameters.loss_scale = None if scaler is None else partial(scale_on_cpu, scaler)
        weighted = self._window.weights is not None
        joins = self._synchronisation_of_source.joins()
        if joins:
            require_nobody_absent(self.strategy, talks=weighted)
        self._parameters.make_current(self._source, param_norms=param_norms, weighted=weighted)
        assert self._parameters.plan is not None
        if joins:
            require_nobody_absent(self.strategy, talks=self._parameters.plan.group_name is not None)
        return self._parameters.plan

    def carry_out(
        self,
        inverse_scale: Tensor | None,
        policy: OnNonfinite,
        loss: Tensor | float | None = None,
        *,
        param_norms: bool = False,
    ) -> Outcome:
        """What :meth:`clip` and :meth:`step` have in common, for an integration that steps by itself: after
        :meth:`begin`, measure, decide, and change the gradients, unless that is deferred. Then
        :meth:`observe` the report.

        Args:
            inverse_scale: [] float32, 1 / loss scale where the gradients are still to be multiplied by it.
        """
        parameters = self._parameters
        plan = parameters.plan
        measurement = parameters.measurement
        assert plan is not None
        assert measurement is not None
        try:
            given = as_loss(loss)
            if self.strategy.uses_loss:
                given = local_loss(given, optional=plan.scope.stages is not None)
            factor = self._factor(inverse_scale, plan.device)
            weight = self._window.weight_on(plan.device)
        except (TypeError, ValueError):
            parameters.decline(param_norms, weighted=self._window.weights is not None)
            raise
        if not torch.compiler.is_compiling():
            self._note_use(plan)
        if weight is not None and not measurement.carries:
            factor = _over_mean(measurement.everywhere(weight), plan, factor)
        gradients, norms, by_parameter = parameters.measure(
            parameters.tensors, param_norms, factor, given, weight
        )
        if weight is not None and measurement.carries:
            factor = _over_mean(weight, plan, factor)
        if factor is not None:
            norms = norms.times(factor)
            by_parameter = by_parameter.times(factor) if by_parameter is not None else None
        if self.strategy.measures_again:
            assert gradients is not None  # not with overlap
            norms = replace(norms, clamped=partial(measurement.clamped, gradients, factor))
        try:
            outcome = resolve(self.strategy.decide(norms), norms, policy, factor)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {say_where(nonfinite_ranks(plan, parameters.tensors))}") from None
        if by_parameter is not None:
            report = replace(
                outcome.report, _parameter_norms=by_parameter.reported_slots, _parameter_names=plan.names
            )
            outcome = replace(outcome, report=report)
        if not self._deferred:
            self._change(outcome, gradients)
        return outcome

    def _change(self, outcome: Outcome, gradients: Gradients | None) -> None:
        measurement = self._parameters.measurement
        assert measurement is not None
        if gradients is None:
            if not changes(outcome):
                return
            gradients = measurement.collect(self._parameters.tensors)
        if self._parameters.overlap is not None:
            self._parameters.overlap.forget()  # kernels of distclip's own change no version
        change(outcome, gradients, measurement.slots)

    def decline(self) -> None:
        """After :meth:`begin`, in place of what measures: where that cannot be on this rank, which raises."""
        self._parameters.decline()

    def observe(self, report: ClipReport) -> None:
        """Take note of a step for the advice that is given once per run."""
        if not torch.compiler.is_compiling():
            self._advice.observe(report)

    def measure(self, gradients: Gradients) -> Norms:
        """The norms of gradients that have been collected for this clipper, as its strategy gets them."""
        measurement = self._parameters.measurement
        assert measurement is not None  # made with the plan, which the caller has asked for
        return measurement.norms(self._parameters.tensors, gradients)[0]

    def _factor(self, inverse_scale: Tensor | None, device: torch.device) -> Tensor | None:
        """What the gradients have yet to be multiplied by: 1 / loss scale, and what an incomplete window
        lacks."""
        missing = self._window.missing
        if inverse_scale is None:
            return None if missing == 1 else torch.full((), missing, dtype=torch.float32, device=device)
        return inverse_scale.to(device) * missing

    def _require_suitable(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Checked when optimizers, or what their groups hold, or the clipper's own parameters are new."""
        if self._suitable is not None and self._suitable.still(optimizers, self.tensors):
            return
        require_covered(optimizers, self.tensors)
        if self._deferred:
            require_fused(optimizers)
        self._suitable = _Suitable(optimizers, self.tensors)

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

    @property
    def _may_be_empty(self) -> bool:
        """Whether this rank may hold nothing at all, and still takes part."""
        return self._stages is not None or self._process_group is not None

    def _bare(self) -> list[Tensor]:
        """The parameters, also before there is a plan."""
        return self.tensors if self._parameters.plan is not None else bare_tensors(self._source)

    def _continues(self, optimizers: list[torch.optim.Optimizer], scaler: GradScaler | None) -> bool:
        """Whether these are the other optimizers of a step whose gradients have all been clipped already.

        Raises:
            ValueError: they are, with another scaler.
        """
        latest = self._round
        if latest is None or not optimizers or not latest.lacks(optimizers):
            return False
        if latest.scaler is not (scaler if scaler is not None and scaler.is_enabled() else None):
            raise ValueError(
                "the gradients of this optimizer were unscaled and clipped with those of the one before, "
                "which was stepped with another scaler: call clipper.step([first, second], scaler)"
            )
        return True

    def _continue(
        self, optimizers: list[torch.optim.Optimizer], scaler: GradScaler | None, *, update: bool
    ) -> ClipReport:
        latest = self._round
        assert latest is not None
        self._require_suitable(optimizers)
        self._take_steps(latest, optimizers, update=update)
        return latest.outcome.report

    def _take_steps(self, round_: _Round, optimizers: list[torch.optim.Optimizer], *, update: bool) -> None:
        report = round_.outcome.report
        for each in optimizers:
            with self._guard.stepping(each):
                take_step(
                    each, report.skipped, may_skip=round_.outcome.may_skip, grad_scale=round_.grad_scale
                )
        scaler = round_.scaler
        if scaler is not None and not round_.is_updated:
            LossScale(scaler, optimizers, None).finish(report.nonfinite, update=update)
        for each in optimizers:
            self._guard.taken(each, list(parameters_of(each)))
        if scaler is not None and update and not scaler._per_optimizer_states:
            others = [(c, Used(c._bare())) for c in living_here() if c is not self]
            states: Any = scaler._per_optimizer_states
            scaler._per_optimizer_states = AfterStep(states.default_factory, self._guard, optimizers, others)
        round_.add(optimizers, self._suitable.rest if self._suitable else [])

    def _say_if_taken(self, optimizers: list[torch.optim.Optimizer]) -> None:
        if "twice" in self._said or not optimizers:
            return
        if all(map(self._guard.has_taken, optimizers)):
            what = "clipper.step() was called twice with the same gradients"
            remedy = "Call it once after each backward pass"
        elif any(map(self._guard.has_stepped, optimizers)):
            what = "optimizer.step() was called before clipper.step(optimizer), with the same gradients"
            remedy = "Delete the line optimizer.step(): clipper.step(optimizer) takes its place"
        else:
            return
        self._said.add("twice")
        if is_main_rank():
            logger.warning(
                "%s, so that the step is taken twice. %s. (A CUDA graph that replays backward leaves no "
                "trace: there this is nothing to worry about.)", what, remedy,
            )  # fmt: skip

    def leave(self, successor: Clipper) -> None:
        """In place of :meth:`begin`: that other clipper goes on from here, if it does on every rank.

        Raises:
            OwnershipError: on every rank: some go on with this one.
        """
        self._parameters.leave(successor._parameters)

    def follow(self, parameters: Parameters, modules: Sequence[nn.Module]) -> None:
        """Clip these from now on, with the strategy's state going on by name. ``modules``: the DDP and FSDP
        modules that synchronise the gradients, where the parameters do not bring them."""
        self._source = parameters
        self._parameters.watch(modules)

    def _own_gradients(self) -> list[Tensor]:
        return self._synchronisation_of_source.own_gradients(self._bare())

    @property
    def _synchronisation_of_source(self) -> Synchronisation:
        """Of backward passes that may come before the first clip."""
        return self._parameters.synchronisation_of(self._source)

    def describe(self) -> Description:
        """A table of the parameters of this rank: where each lies, and how it is counted; ``print`` it.

        Every rank in scope calls this, or none.
        """
        plan = self.plan
        return describe(plan, self.tensors)

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
        collect(plan, self.tensors)  # sums what is partial
        return verify_counting(plan, self.tensors)

    def find_nonfinite(self) -> dict[str, tuple[int, ...]]:
        """Which gradients are not finite now, and where: the ranks that hold NaN or infinite elements, by
        the name of the parameter.

        For debugging: it reads every gradient, waits for the device and gathers from all ranks. Every rank
        in scope calls this, or none, say where ``report.nonfinite`` is true (which it is on all alike). A
        gradient that has been summed over ranks is bad on all of them, whichever it came from; an element
        of a sharded one where it lives.

        Returns:
            The same on every rank, in the order of :meth:`describe`; empty where all are finite.

        Example:
            >>> report = clipper.step(optimizer)
            >>> if report.nonfinite:  # waits for the device
            ...     print(clipper.find_nonfinite())
            {'layers.3.weight': (2,)}
        """
        return nonfinite_ranks(self.plan, self.tensors)

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self._options().items()]
        count = (
            f", {len(self.tensors)} parameters" if self._parameters.plan is not None else ", not planned yet"
        )
        return f"Clipper({', '.join([_told(self.strategy), *options])}{count}, {self.steps} steps)"

    def _grad_scale(self, outcome: Outcome) -> Tensor:
        """What a fused optimizer is to divide the gradients by: loss scale / coefficient, [] float32.

        Where float32 does not hold that, the gradients are multiplied here, which costs a pass.
        """
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
        plan, measurement = self._parameters.plan, self._parameters.measurement
        assert plan is not None
        assert measurement is not None
        least = look_at_one(coefficient)
        if (0 < least < _TINIEST) if least is not None else plan.wide:
            self._change(outcome, measurement.collect(self._parameters.tensors))
            return torch.ones_like(coefficient, dtype=torch.float32)
        divisor = reciprocal(coefficient)
        return torch.where(coefficient == 0, divisor, divisor.clamp(max=LARGEST))

    def _options(self) -> dict[str, Any]:
        """Those that are not as by default."""
        options = {
            "on_nonfinite": (self.on_nonfinite, "skip"),
            "apply": ("deferred" if self._deferred else "inplace", "inplace"),
            "overlap": (self._overlaps, False),
            "accumulate": (self._accumulate, torch.float32),
            "stages": (self._stages, None),
            "process_group": (self._process_group, None),
        }
        return {name: value for name, (value, default) in options.items() if value is not default}

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to continue the same sequence: the strategy's state, its name and settings,
        the number of steps, and where the window of micro-batches stands. The same on every rank, small,
        and independent of the number of ranks."""
        return {
            "saved_by": {"strategy": _names(self.strategy), "settings": _told(self.strategy)},
            "strategy": self.strategy.state_dict(),
            "micro_batches": self._window.position,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks. Settings are not loaded: those that this
        clipper was made with hold.

        Raises:
            TypeError: ``state`` is no dictionary.
            ValueError: it is not of a Clipper, or of another strategy, or of one that keeps something else;
                nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}: expected what clipper.state_dict() returned")
        own = _told(self.strategy)
        if not isinstance(state.get("strategy"), Mapping):
            keys = ", ".join(map(repr, list(state)[:4])) or "nothing"
            raise ValueError(
                f"state holds {keys} and no 'strategy': expected what clipper.state_dict() returned. (Is it "
                "that of the model or the optimizer, or empty?)"
            )
        try:
            position, steps = int(state.get("micro_batches", 0)), int(state.get("steps", 0))
            saved = dict(state.get("saved_by", {}))  # not by 0.1.0
            was = saved["settings"] if saved else "another strategy, or with other settings"
            names = saved.get("strategy")
            if position < 0 or steps < 0:
                raise ValueError(f"{steps=}, micro_batches={position}")
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"state is not what clipper.state_dict() returned, or has been changed since ({error})"
            ) from error
        if saved and names != _names(self.strategy):
            raise ValueError(
                f"the state was saved by {was}, this is {own}: make the Clipper with the strategy that it "
                "was saved with, or begin without this state"
            )
        before = copy.deepcopy(self.strategy.state_dict())
        try:
            self.strategy.load_state_dict(state["strategy"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            with contextlib.suppress(RuntimeError):
                self.strategy.load_state_dict(before)
            raise ValueError(
                f"the state does not fit: it was saved by {was}, this is {own}. Make the strategy with the "
                f"settings that it was saved with, or begin without this state. ({_first_line_of(error)})"
            ) from error
        self._parameters.agree_on_state()
        self._window.close()
        self._window.position, self.steps = position, steps


# Below it a coefficient is no normal float32, and what divides by it is infinite.
_TINIEST = torch.finfo(torch.float32).tiny


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
        return bool(self._stepped) and self._stepped.isdisjoint(self.scaler._per_optimizer_states)


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


def _over_mean(weight: Tensor, plan: Plan, factor: Tensor | None) -> Tensor:
    """``factor`` / the mean over the ranks of their weights, of which ``weight`` is the sum, [1] float64. No
    change where all weights are 0, and so all gradients; NaN, which no step is taken with, where the sum is
    negative."""
    total = weight.reshape(())
    share = torch.where(total > 0, plan.scope.size / total, torch.where(total == 0, 1.0, torch.nan)).float()
    return share if factor is None else share * factor


def _told(strategy: Strategy) -> str:
    """On one line: ``Chain(SkipSpikes(sigma=6.0, ...), GlobalNorm(max_norm=1.0, norm_type=2.0))``."""
    inner = [_told(s) for child in strategy.children() for s in _outermost(child)]
    return f"{type(strategy).__name__}({', '.join(filter(None, [strategy.extra_repr(), *inner]))})"


def _outermost(module: nn.Module) -> list[Strategy]:
    if isinstance(module, Strategy):
        return [module]
    return [s for child in module.children() for s in _outermost(child)]


def _names(strategy: Strategy) -> list[str]:
    """The classes of a strategy and of those inside it."""
    return [type(m).__name__ for m in strategy.modules() if isinstance(m, Strategy)]


def _first_line_of(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
