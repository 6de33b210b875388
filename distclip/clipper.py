"""The clipper: one object that is made once, and called in every step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from distclip.apply.accumulation import MicroBatch
from distclip.apply.change import OnNonfinite, require_policy
from distclip.decide.report import ClipReport
from distclip.inspection.description import Description, describe
from distclip.inspection.diagnosis import nonfinite_ranks
from distclip.inspection.verification import verify_counting
from distclip.layout.arguments import as_optimizers, require_scaler
from distclip.layout.parameters import Parameters
from distclip.measure.gradients import collect
from distclip.planning.plan import Plan
from distclip.step import saved
from distclip.step.clipping import Clipping
from distclip.step.stepping import Stepping
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
        self._clipping = Clipping(
            parameters,
            strategy,
            stages=stages,
            process_group=process_group,
            on_nonfinite=on_nonfinite,
            apply=apply,
            overlap=overlap,
            accumulate=accumulate,
        )
        self._stepping = Stepping(self._clipping)
        weakref.finalize(self, self._stepping.guard.remove)
        self.steps = 0

    @property
    def strategy(self) -> Strategy:
        """The one that it was made with. Its state goes on from step to step."""
        return self._clipping.strategy

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        raise AttributeError(
            f"a Clipper keeps the strategy that it was made with ({saved.told(self.strategy)}): make a new "
            "one, distclip.Clipper(model, strategy), or make the threshold a function of the step: "
            "distclip.Warmup"
        )

    @property
    def on_nonfinite(self) -> OnNonfinite:
        """What is done where the norm is not finite. May be set, on every rank alike."""
        return self._clipping.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, policy: OnNonfinite) -> None:
        self._clipping.on_nonfinite = require_policy(policy)

    @property
    def plan(self) -> Plan:
        """The plan, made at first need and again when the program has changed the parameters.

        Making it may communicate: every rank in scope reads this, or none.
        """
        return self._clipping.plan

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, in the order of :meth:`describe`; as they were at the last clip."""
        return self._clipping.tensors

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
        clipping = self._clipping
        if clipping.deferred:
            raise ValueError(
                'with apply="deferred" the optimizer does the clipping: call clipper.step(optimizer)'
            )
        clipping.begin(param_norms=param_norms)
        report = clipping.carry_out(None, clipping.on_nonfinite, loss, param_norms=param_norms).report
        clipping.finish(report)
        return report

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
        optimizers = as_optimizers(optimizer, may_be_empty=self._clipping.may_be_empty)
        require_scaler(scaler)
        report, is_new = self._stepping.step(optimizers, scaler, loss, param_norms=param_norms, update=update)
        if is_new:
            self.steps += 1
            self._clipping.finish(report)
        return report

    def accumulate(self, steps: int, *, last: bool = False) -> AbstractContextManager[MicroBatch]:
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
        return self._clipping.micro_batch(steps, last)

    def describe(self) -> Description:
        """A table of the parameters of this rank: where each lies, and how it is counted; ``print`` it.

        Every rank in scope calls this, or none.
        """
        return describe(self.plan, self.tensors)

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
        plan, tensors = self.plan, self.tensors
        collect(plan, tensors)  # sums what is partial
        return verify_counting(plan, tensors)

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
        plan = self.plan
        return nonfinite_ranks(plan, self.tensors, plan.scope.group())

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to continue the same sequence: the strategy's state, its name and settings,
        the number of steps, and where the window of micro-batches stands. The same on every rank, small,
        and independent of the number of ranks."""
        return saved.state_of(self._clipping, self.steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks. Settings are not loaded: those that this
        clipper was made with hold.

        Raises:
            TypeError: ``state`` is no dictionary.
            ValueError: it is not of a Clipper, or of another strategy, or of one that keeps something else;
                nothing is loaded then.
        """
        self.steps = saved.load(self._clipping, state)

    def __repr__(self) -> str:
        clipping = self._clipping
        told = [saved.told(self.strategy), *(f"{k}={v!r}" for k, v in clipping.options.items())]
        planned = clipping.parameters.plan is not None
        count = f"{len(clipping.tensors)} parameters" if planned else "not planned yet"
        return f"Clipper({', '.join(told)}, {count}, {self.steps} steps)"


def clipping_of(clipper: Clipper) -> Clipping:
    """The parts of its step, for what steps in another way."""
    return clipper._clipping
