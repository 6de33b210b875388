"""The clipper: one object that owns plan, strategy and report."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from distclip._accumulation import MicroBatch, Window
from distclip._advice import Advice
from distclip._apply import OnNonfinite, Outcome, change, changes, require_policy, resolve
from distclip._description import Description, describe
from distclip._diagnosis import nonfinite_ranks, say_where
from distclip._gradients import Gradients, collect
from distclip._in_backward import require_gradients_after_backward
from distclip._loss_scale import LossScale, reciprocal
from distclip._measurement import Measurement
from distclip._norms import Norms
from distclip._optimizer_step import require_covered, require_fused, take_step
from distclip._overlap import Overlap
from distclip._parameters import Parameters, freeze_source, named_parameters
from distclip._placement import MANAGED
from distclip._plan import Plan, build_plan, require_equal_gradients
from distclip._reduction import local_loss
from distclip._report import ClipReport
from distclip._synchronisation import Synchronisation
from distclip._verification import verify_counting
from distclip.errors import NonFiniteError
from distclip.strategies._base import Strategy


class Clipper:
    """Clips the gradients of a model whose parameters may be spread over ranks in any way.

    Args:
        parameters: a Module, several Modules, an Optimizer, a Tensor, or an iterable of Tensors or of
            ``(name, Tensor)``. Give all parameters on every rank, whether or not they have a gradient.
        strategy: the algorithm, e.g. ``distclip.GlobalNorm(1.0)``.
        stages: the ranks of one pipeline, each of which holds other parameters: a ProcessGroup or a 1-D
            DeviceMesh. Every rank passes the parameters of its own stage (or stages). Where only some
            stages unfreeze parameters later, every rank makes a new Clipper then: the other stages cannot
            see that there is a new plan to agree upon.
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
            ``parameters``, and of a single process. The rest (also what is offloaded to the CPU) is measured
            after backward, and so is whatever has been changed since, unless behind autograd's back, through
            ``p.grad.data`` say, and only in part. (With a GradScaler call :meth:`step`: what its ``unscale_``
            does goes behind it too.) Not for unit-wise strategies and those with sums of their own (``AGC``,
            ``Value(measure_direction=True)``), nor with a comm hook of one's own on DDP.
        accumulate: dtype of the local sums of squares, float32 or float64. (The sums of ranks and of
            parameters are always joined in float64; norms come out as float32.)

    The plan is made at the first clip, by every rank in scope together.

    Attributes:
        steps: calls of :meth:`step` so far, those that skipped included; saved in ``state_dict()``.

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
        apply: Literal["inplace", "deferred"] = "inplace",
        overlap: bool = False,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"{strategy=}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0)")
        if apply not in ("inplace", "deferred"):
            raise ValueError(f"{apply=}: expected 'inplace' or 'deferred'")
        if overlap and (strategy.per_unit or strategy.num_extra):
            raise ValueError(f"overlap=True: {strategy} wants more than norms, and measures after backward")
        if accumulate not in (torch.float32, torch.float64):
            raise ValueError(f"{accumulate=}: expected torch.float32 or torch.float64")
        self.strategy = strategy
        self.on_nonfinite: OnNonfinite = require_policy(on_nonfinite)
        self._source = freeze_source(parameters, may_be_empty=stages is not None or process_group is not None)
        self._process_group, self._stages = process_group, stages
        self.steps = 0
        self._deferred = apply == "deferred"
        self._accumulate = accumulate
        self._window = Window()
        self._watched: Synchronisation | None = None
        self._suitable: tuple[tuple[int, int], ...] = ()
        self.tensors: list[Tensor] = []
        self._managed: list[Tensor] = []  # by FSDP1
        self._plan: Plan | None = None
        self._measurement: Measurement | None = None
        self._overlaps = overlap
        self._overlap: Overlap | None = None
        self._advice = Advice(whole=not strategy.per_parameter and len(strategy.groups) == 1)

    @property
    def plan(self) -> Plan:
        """The plan, made at first need and again when a frozen parameter begins to train.

        Making it may communicate: every rank in scope reads this, or none.
        """
        if self._plan is None or not self._plan.fits(self.tensors):
            named = named_parameters(self._source)
            self.tensors = [p.tensor for p in named]
            require_gradients_after_backward(named)
            self._plan = build_plan(
                named, self._process_group, self._stages, everyone=self.strategy.uses_loss
            )
            self._measurement = Measurement(self._plan, self.strategy, self.tensors, self._accumulate)
            if self._overlaps:
                self._gather_in_backward(self._plan)
            self._managed = [t for t in self.tensors if hasattr(t, MANAGED)]
            self.strategy.prepare(self._plan.every)
            self.strategy.to(self._plan.device)
        return self._plan

    @torch.no_grad()
    def clip(self, *, loss: Tensor | None = None, param_norms: bool = False) -> ClipReport:
        """Clip the gradients in place: after ``backward``, before ``optimizer.step``, on every rank.

        One all-reduce of as many numbers as norms are asked for, none where all ranks hold everything;
        no host synchronisation.

        Args:
            loss: [] the loss of this rank's batch, for a strategy that judges the mean over ranks
                (``SkipSpikes(use_loss=True)``). With ``stages``, ranks that have none leave it out.
            param_norms: also measure every parameter, for ``report.param_norms`` (still one all-reduce).
                Must be the same on every rank.

        Raises:
            ValueError: the strategy judges the loss, and there is none.
            NonFiniteError: on every rank, where ``on_nonfinite="raise"`` and the norm is not finite.
        """
        if self._deferred:
            raise ValueError(
                'with apply="deferred" the optimizer does the clipping: call clipper.step(optimizer)'
            )
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
        loss: Tensor | None = None,
        param_norms: bool = False,
    ) -> ClipReport:
        """Unscale once, measure, decide, clip, step or skip, update the scale: after ``backward``, on every
        rank, in place of ``scaler.unscale_``, ``clip_grad_norm_``, ``scaler.step`` and ``scaler.update``.

        The norms are those of the unscaled gradients, though these are never unscaled by a pass of their
        own: that joins the multiplication that clips. Whether a step is skipped, and so the next loss scale,
        is decided on the reduced norm: alike on every rank, without a further collective. A skipped step
        leaves parameters, optimizer and strategy as they were.

        Args:
            optimizer: one, or several that are stepped or skipped together. All their parameters must be
                among the clipper's.
            scaler: ``torch.amp.GradScaler`` or ``ShardedGradScaler`` that scaled the loss, if any. Its
                ``unscale_`` may have been called before. ``scaler.update()`` is called here.
            loss: as for :meth:`clip`; not multiplied by the loss scale.
            param_norms: as for :meth:`clip`.

        Raises:
            ValueError: gradients are not synchronised yet, the optimizer has parameters that the clipper
                does not know, or it cannot do what ``apply="deferred"`` asks.
            NonFiniteError: on every rank, where ``on_nonfinite="raise"`` and the norm is not finite.

        Example:
            >>> scaler.scale(loss).backward()
            >>> report = clipper.step(optimizer, scaler)
            >>> optimizer.zero_grad()
        """
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._window.require_complete()
        plan = self.plan
        self._require_suitable(optimizers)
        loss_scale = LossScale.of(scaler, optimizers, plan.device if plan.scope.stages else None)
        policy = self.on_nonfinite
        if policy == "propagate" and loss_scale.scaler is not None:
            policy = "skip"
        if self._overlap is not None and scaler is not None and loss_scale.inverse is None:
            self._overlap.forget()  # they have been unscaled
        outcome = self.carry_out(loss_scale.inverse, policy, loss, param_norms=param_norms)
        grad_scale = _grad_scale(outcome) if self._deferred else None
        for each in optimizers:
            take_step(each, outcome.report.skipped, may_skip=outcome.may_skip, grad_scale=grad_scale)
        loss_scale.finish(outcome.report.nonfinite)
        self.steps += 1
        self._window.close()
        self.observe(outcome.report)
        return outcome.report

    @contextlib.contextmanager
    def accumulate(self, steps: int, *, last: bool = False) -> Iterator[MicroBatch]:
        """Around the forward and backward pass of one micro-batch of ``steps`` that make one step.

        Until the last micro-batch of a window gradients are not synchronised (``no_sync`` of DDP and FSDP1,
        ``set_requires_gradient_sync`` of FSDP2). Where a window stands is saved in ``state_dict()``.

        Args:
            steps: micro-batches in a window, ≥ 1.
            last: this is the last micro-batch that there is, so the window ends here. Its gradients then
                count as the mean over the micro-batches that it has.

        Raises:
            ValueError: ``steps`` is not positive, or changes within a window.

        Example:
            >>> for i, batch in enumerate(batches):
            ...     with clipper.accumulate(4, last=i == len(batches) - 1) as micro:
            ...         micro.backward(loss_of(model(batch)), scaler)
            ...     if micro.complete:
            ...         clipper.step(optimizer, scaler)
            ...         optimizer.zero_grad()
        """
        if steps < 1:
            raise ValueError(f"{steps=}: expected at least one micro-batch")
        self._window.begin(steps, last)
        with contextlib.ExitStack() as stack:
            if not self._window.last:
                stack.enter_context(self._synchronisation.off())
            yield MicroBatch(self._window)

    def carry_out(
        self,
        inverse_scale: Tensor | None,
        policy: OnNonfinite,
        loss: Tensor | None = None,
        *,
        param_norms: bool = False,
    ) -> Outcome:
        """What :meth:`clip` and :meth:`step` have in common, for an integration that steps by itself:
        measure, decide, and change the gradients, unless that is deferred. Then :meth:`observe` the report.

        Args:
            inverse_scale: [] float32, 1 / loss scale where the gradients are still to be multiplied by it.
        """
        gradients, outcome = self._decide(inverse_scale, policy, loss, param_norms=param_norms)
        if not self._deferred:
            self._change(outcome, gradients)
        return outcome

    def _decide(
        self,
        inverse_scale: Tensor | None,
        policy: OnNonfinite,
        loss: Tensor | None,
        *,
        param_norms: bool,
    ) -> tuple[Gradients | None, Outcome]:
        """Everything up to the change: one read of the gradients, one reduction, the strategy, the policy.

        The gradients are None where they had been measured in backward and need not be collected.
        """
        self.require_synchronised()
        plan = self.plan
        if self.strategy.uses_loss:
            loss = local_loss(loss, optional=plan.scope.stages is not None)
        ready = None if self._overlap is None else self._overlap.sums()
        gradients = self._measured.collect(param_norms) if ready is None else None
        factor = self._factor(inverse_scale, plan.device)
        norms, by_parameter = self._measured.norms(gradients, param_norms, factor, loss, ready)
        if factor is not None:
            norms = norms.times(factor)
            by_parameter = by_parameter.times(factor) if by_parameter is not None else None
        try:
            outcome = resolve(self.strategy.decide(norms), norms, policy, factor)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {say_where(nonfinite_ranks(plan, self.tensors))}") from None
        if by_parameter is not None:
            report = replace(
                outcome.report, _parameter_norms=by_parameter.reported_slots, _parameter_names=plan.names
            )
            outcome = replace(outcome, report=report)
        return gradients, outcome

    def _change(self, outcome: Outcome, gradients: Gradients | None) -> None:
        if gradients is None:
            if not changes(outcome):
                return
            gradients = self._measured.collect()
        change(outcome, gradients, self._measured.slots)

    def _gather_in_backward(self, plan: Plan) -> None:
        if plan.partial or any(p.partial for p in plan.placements):
            return  # these are summed first, after backward
        if self._overlap is not None:
            self._overlap.remove()
            self._overlap = None
        overlap = Overlap(plan, self.tensors, self._modules(), self.strategy.norm_type, self._accumulate)
        if overlap.listens:
            self._overlap = overlap
            weakref.finalize(self, overlap.remove)

    def _modules(self) -> list[nn.Module]:
        source = self._source if isinstance(self._source, list) else [self._source]
        return [m for m in source if isinstance(m, nn.Module)]

    def observe(self, report: ClipReport) -> None:
        """Take note of a step for the advice that is given once per run."""
        if not torch.compiler.is_compiling():
            self._advice.observe(report)

    def measure(self, gradients: Gradients) -> Norms:
        """The norms of gradients that have been collected for this clipper, as its strategy gets them."""
        _ = self.plan
        return self._measured.norms(gradients)[0]

    @property
    def _measured(self) -> Measurement:
        assert self._measurement is not None  # made with the plan, which the caller has asked for
        return self._measurement

    def _factor(self, inverse_scale: Tensor | None, device: torch.device) -> Tensor | None:
        """What the gradients have yet to be multiplied by: 1 / loss scale, and what an incomplete window
        lacks."""
        missing = self._window.missing
        if inverse_scale is None:
            return None if missing == 1 else torch.full((), missing, dtype=torch.float32, device=device)
        return inverse_scale.to(device) * missing

    def require_synchronised(self) -> None:
        """
        Raises:
            ValueError, OwnershipError: on every rank: the gradients there are now are only this rank's own.
        """
        self._window.require_complete()
        plan = self.plan
        culprit = self._synchronisation.was_off(self._managed)
        if culprit == "DDP":
            require_equal_gradients(plan, self.tensors)
        elif culprit is not None:
            raise ValueError(
                f"the gradients under {culprit} have not been synchronised: the last backward pass ran in "
                "no_sync() or after set_requires_gradient_sync(False). Synchronise in the last micro-batch "
                "(clipper.accumulate does), then clip."
            )

    def _require_suitable(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Checked when the optimizers, or their number of parameters, are new."""
        key = tuple((id(o), sum(len(g["params"]) for g in o.param_groups)) for o in optimizers)
        if key == self._suitable:
            return
        require_covered(optimizers, self.tensors)
        if self._deferred:
            require_fused(optimizers)
        self._suitable = key

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """The DDP and FSDP modules that synchronise the gradients, where the parameters do not bring them."""
        self._watched = Synchronisation(modules)

    @property
    def _synchronisation(self) -> Synchronisation:
        if self._watched is None:
            self.watch(self._modules())
        assert self._watched is not None
        return self._watched

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

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to continue the same sequence: the strategy's state, the number of steps, and
        where the window of micro-batches stands. The same on every rank, small, and independent of the number
        of ranks."""
        return {
            "strategy": self.strategy.state_dict(),
            "micro_batches": self._window.position,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks."""
        self.strategy.load_state_dict(state["strategy"])
        self._window.close()
        self._window.position = int(state.get("micro_batches", 0))
        self.steps = int(state.get("steps", 0))


def _grad_scale(outcome: Outcome) -> Tensor:
    """What a fused optimizer is to divide the gradients by: loss scale / coefficient, [] float32."""
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
    return reciprocal(coefficient)
