"""Hugging Face Accelerate: its clipping, unscaling and checkpoints, right for every parallelism it offers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.distributed.device_mesh import DeviceMesh

from distclip import kernels
from distclip.apply.change import OnNonfinite, require_policy
from distclip.apply.loss_scale import LossScale, record, told
from distclip.clipper import Clipper, clipping_of
from distclip.current.as_called import AsCalled
from distclip.decide.report import ClipReport
from distclip.decide.transfer import bound_on
from distclip.inspection.advice import is_main_rank
from distclip.integrations._lists import ClippedList, Lists
from distclip.integrations._optimizers import Optimizers, unwrapped
from distclip.integrations._stepping import KeepingScaler, LossOfStep, leave_behind
from distclip.layout.parameters import Parameters
from distclip.measure.gradients import collect
from distclip.strategies._base import Strategy, require_bound, require_norm_type
from distclip.torch_private.grad_scaler import states
from distclip.training.unscaling import unscale_

logger = logging.getLogger("distclip")

_HANDLE = "_distclip"  # attribute of an accelerator that distclip is installed in
_PATCHED = (
    "backward",
    "clip_grad_norm_",
    "clip_grad_value_",
    "unscale_gradients",
    "free_memory",
)
_SAVED = "distclip.bin"  # in the directory of ``save_state``

_REFUSED = {
    "DEEPSPEED": "DeepSpeed's engine clips inside its own step, by `gradient_clipping` of its configuration "
    "(`gradient_clipping=` of DeepSpeedPlugin), and leaves no gradient to clip before it: set it there",
    "MEGATRON_LM": "Megatron-LM's optimizer clips inside its own step, by `clip_grad` of its configuration "
    "(`gradient_clipping=` of MegatronLMPlugin): set it there, or drive Megatron-Core yourself with "
    "distclip.integrations.megatron",
    "XLA": "torch_xla sums gradients outside of torch.distributed, where distclip cannot follow it",
}


def install(
    accelerator: Any,
    strategy: Strategy | Callable[[], Strategy] | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    stages: dist.ProcessGroup | DeviceMesh | None = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Installed:
    """Make ``accelerator.clip_grad_norm_`` and ``clip_grad_value_`` right, in one line of an existing script.

    Under DDP, FSDP 1 and 2, tensor parallelism and every ``ParallelismConfig``. Call it on every rank, before
    or after ``prepare``; the script stays as it is:

    - ``clip_grad_norm_(parameters, max_norm, norm_type)`` returns the norm before clipping, a plain 0-dim
      float32 tensor, equal on all ranks. Any list of parameters will do, also a part of an FSDP model.
    - ``clip_grad_value_(parameters, clip_value)`` works under FSDP too. It clamps to its own ``clip_value``,
      whatever the strategy.
    - Where ``accelerator.sync_gradients`` is false (``accelerator.accumulate``, before the last micro-batch),
      both do nothing: the norm, which nobody has measured, is NaN.
    - Clipping the gradients of ``accelerator.no_sync`` is an error on every rank.
    - With a float16 scaler, gradients are unscaled exactly once, whichever parameters are clipped, and all
      ranks agree on whether there were infinities. ``accelerator.unscale_gradients`` may be called before.
    - Where a step is left out, ``optimizer.step_was_skipped`` and ``accelerator.optimizer_step_was_skipped``
      are true, so that a prepared scheduler does not advance. (For a fused optimizer on a GPU the host waits
      for the decision only where these are asked, as a prepared scheduler does in every step.)
    - ``save_state`` writes the strategy's state to a file of its own, which ``load_state`` reads if it is
      there: a checkpoint goes with and without distclip, and with another strategy (whose state begins anew;
      a line in the log says so). Copies and pickles of the accelerator are plain.

    To leave out a step, or to unscale, distclip has to know the optimizer: parameters of which no optimizer
    is prepared are an error then. What is no ``torch.optim.Optimizer`` (a wrapper, say) passes through
    ``accelerator.prepare`` unchanged, and has to go through ``accelerator.prepare_optimizer``.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        strategy: what decides in ``clip_grad_norm_``. ``max_norm`` and ``norm_type`` of the call are then not
            used, except that ``max_norm=inf`` only measures, in the call's norm. A strategy with state
            belongs to one list of parameters: for a script that clips several, pass what makes one for each,
            ``distclip.ZClip`` or a lambda. One that judges the loss gets that of ``accelerator.backward``.
            None: clip as the call says, like ``distclip.GlobalNorm(max_norm, norm_type)``.
        on_nonfinite: as for :class:`distclip.Clipper`. ``"skip"`` lets the next step of the optimizers which
            hold the parameters do nothing (for one that is not fused, the host waits for the decision). By
            default ``"skip"`` with a strategy, and ``"propagate"``, as Accelerate does, without.
        stages, process_group, accumulate: as for :class:`distclip.Clipper`.

    Raises:
        ValueError: DeepSpeed, Megatron-LM or XLA, which clip by their own means; or installed already. From
            the clip: no prepared optimizer holds the parameters, or LBFGS does, where that is no use.
        ModuleNotFoundError: Accelerate is not installed.
        TypeError: ``accelerator`` or ``strategy`` is none.

    Example:
        >>> from distclip.integrations.accelerate import install
        >>> accelerator = Accelerator(mixed_precision="bf16")
        >>> clipping = install(accelerator)
        >>> ...
        >>> accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as before
        >>> print(clipping.report)
        norm 3.41 → 1 (×0.293)
    """
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Accelerate is not installed: pip install 'distclip[accelerate]'"
        ) from error
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator={type(accelerator).__name__}: expected an accelerate.Accelerator")
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _REFUSED:
        raise ValueError(f"distclip cannot clip for this accelerator ({kind}): {_REFUSED[kind]}")
    if hasattr(accelerator, _HANDLE):
        raise ValueError("distclip is installed in this accelerator already: call .remove() on it first")
    if strategy is not None and not isinstance(strategy, Strategy) and not callable(strategy):
        raise TypeError(f"{strategy=}: expected a distclip.Strategy, what makes one, or None")
    if on_nonfinite is None:
        on_nonfinite = "propagate" if strategy is None else "skip"
    options = {"stages": stages, "process_group": process_group, "accumulate": accumulate}
    return Installed(accelerator, strategy, require_policy(on_nonfinite), options)


class Installed:
    """distclip inside an accelerator, as :func:`install` leaves it; a context manager that removes it.

    Attributes:
        report: of the last ``clip_grad_norm_`` that clipped, None before.
        clipper: the one that gave it, for ``describe()``, ``verify()`` and ``find_nonfinite()``; likewise.
    """

    def __init__(
        self,
        accelerator: Any,
        strategy: Strategy | Callable[[], Strategy] | None,
        on_nonfinite: OnNonfinite,
        options: dict[str, Any],
    ) -> None:
        self._accelerator, self._strategy = accelerator, strategy
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self.report: ClipReport | None = None
        self.clipper: Clipper | None = None
        self._lists = Lists(accelerator, strategy, on_nonfinite, options)
        self._optimizers = Optimizers(accelerator)
        self._loss = LossOfStep()
        self._handles: list[Any] = []
        setattr(accelerator, _HANDLE, self)
        self._overridden = {name: vars(accelerator)[name] for name in _PATCHED if name in vars(accelerator)}
        self._original = {name: getattr(accelerator, name) for name in _PATCHED}
        for name in _PATCHED:
            setattr(accelerator, name, getattr(self, f"_{name.strip('_')}"))
        self._scaler = None if accelerator.scaler is None else KeepingScaler(accelerator.scaler)
        leave_behind(accelerator, *_PATCHED, _HANDLE, instead=self._hooks_of_others)
        if strategy is not None:
            self._handles.append(accelerator.register_save_state_pre_hook(self._save))
            self._handles.append(accelerator.register_load_state_pre_hook(self._load))

    def remove(self) -> None:
        """Give the accelerator its own methods back. A second call does nothing."""
        if getattr(self._accelerator, _HANDLE, None) is not self:
            return
        for name in (*_PATCHED, _HANDLE, "__getstate__"):
            delattr(self._accelerator, name)
        vars(self._accelerator).update(self._overridden)
        for handle in self._handles:
            handle.remove()
        self._optimizers.remove()
        if self._scaler is not None:
            self._scaler.remove()
        self._lists.clear()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """The strategy's state for each list of parameters, in the order in which they were first clipped."""
        return self._lists.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks, before the first clip or later. What
        another strategy saved is left out, and a line in the log says so."""
        self._lists.load_state_dict(state)

    def _save(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        from accelerate.utils import save  # type: ignore[import-untyped]

        everywhere = self._accelerator.project_configuration.save_on_each_node
        save(self.state_dict(), os.path.join(directory, _SAVED), save_on_each_node=everywhere)

    def _load(self, models: list[nn.Module], directory: str) -> None:
        path = os.path.join(directory, _SAVED)
        if os.path.isfile(path):
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif not _OfRelease010.found(self, directory) and is_main_rank():
            logger.warning("%s was saved without distclip: %s starts anew", directory, self._strategy)

    def _hooks_of_others(self) -> dict[str, Any]:
        mine = {handle.id for handle in self._handles}
        hooks = ("_save_model_state_pre_hook", "_load_model_state_pre_hook")
        return {
            name: OrderedDict((k, hook) for k, hook in vars(self._accelerator)[name].items() if k not in mine)
            for name in hooks
        }

    # --- in the place of the accelerator's methods ------------------------------------------------------

    def _backward(self, loss: Tensor, **kwargs: Any) -> Any:
        self._optimizers.passes += 1
        if self._scaler is not None:
            self._scaler.forget()
        if self._strategy is not None and loss.numel() == 1:
            self._loss.add(loss.detach() / self._accelerator.gradient_accumulation_steps)
        return self._original["backward"](loss, **kwargs)

    @torch.no_grad()
    def _clip_grad_norm(self, parameters: Parameters, max_norm: float, norm_type: float | str = 2) -> Tensor:
        bound, p = require_bound("max_norm", max_norm), require_norm_type(norm_type)
        if not self._accelerator.sync_gradients:
            return torch.full((), math.nan, dtype=torch.float32, device=self._accelerator.device)
        decided = self._strategy is not None and not math.isinf(bound)
        lst = self._lists.of(parameters, None if decided else p)
        if isinstance(lst.clipper.strategy, AsCalled):
            lst.clipper.strategy.max_norm = bound
        report = self._clip(lst, self._on_nonfinite if decided or self._strategy is None else "propagate")
        if decided or self._strategy is None:
            self.report, self.clipper = report, lst.clipper
        return report.total_norm

    @torch.no_grad()
    def _clip_grad_value(self, parameters: Parameters, clip_value: float) -> None:
        bound = require_bound("clip_value", clip_value)
        if not self._accelerator.sync_gradients:
            return
        lst = self._lists.of(parameters, 2.0)
        owners = self._optimizers.that_hold(lst)
        if self.has_scaler:
            self._optimizers.require_held(lst, owners, skips=False)
        if lst.seems_unsynchronised():
            clipping = clipping_of(lst.clipper)
            clipping.begin()
            clipping.parameters.compare(lst.tensors)  # raises if that is so
        self._unscale(self._scaled(owners), lst)
        gradients = collect(lst.elementwise_plan(), lst.tensors)
        for bucket in gradients.buckets:
            kernels.clamp_(bucket.tensors, bound_on(bucket.tensors[0].device, bound))
        gradients.commit()

    def _unscale_gradients(self, optimizer: Any = None) -> None:
        if self._accelerator.sync_gradients:
            given = self._accelerator._optimizers if optimizer is None else optimizer
            given = list(given) if isinstance(given, list | tuple) else [given]
            self._unscale(self._scaled([unwrapped(o) for o in given]))

    def _free_memory(self, *objects: Any) -> Any:
        self._lists.clear()
        self.clipper = None
        return self._original["free_memory"](*objects)

    # --- one step ---------------------------------------------------------------------------------------

    def _clip(self, lst: ClippedList, policy: OnNonfinite) -> ClipReport:
        """Unscale, measure, decide, change: as ``Clipper.step`` does, up to the optimizer."""
        clipping, owners = clipping_of(lst.clipper), self._optimizers.that_hold(lst)
        if policy == "skip" or self.has_scaler:
            self._optimizers.require_held(lst, owners, skips=policy == "skip")
        scaled, called = self._scaled(owners), clipping.strategy
        words = f", max_norm={called.max_norm}" if isinstance(called, AsCalled) else ""
        with self._scale_of_gradients():
            clipping.begin(told(self._accelerator.scaler if self.has_scaler else None, owners) + words)
        inverse = None
        if scaled and scaled == owners and all(map(lst.covers, scaled)):
            # Unscaling joins the multiplication that clips, found_inf the norm's one reduction.
            with self._scale_of_gradients():
                inverse = LossScale.of(self._accelerator.scaler, scaled).inverse
        else:
            self._unscale(scaled, lst)
        outcome = clipping.carry_out(inverse, policy, self._loss.value)
        self._loss.used = True
        report = outcome.report
        if inverse is not None:
            for optimizer in scaled:
                record(self._accelerator.scaler, optimizer, report.nonfinite, OptState.UNSCALED)
        if outcome.may_skip:
            self._optimizers.require_held(lst, owners, skips=True)
            self._optimizers.leave_out(lst, report, scaled=self.has_scaler)
        clipping.finish(report)
        return report

    def _unscale(self, optimizers: list[torch.optim.Optimizer], lst: ClippedList | None = None) -> None:
        for optimizer in optimizers:
            if lst is None or not lst.covers(optimizer):
                lst = self._lists.of([p for group in optimizer.param_groups for p in group["params"]], 2.0)
            with self._scale_of_gradients():
                unscale_(self._accelerator.scaler, optimizer, lst.clipper)

    def _scale_of_gradients(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._scaler is None else self._scaler.of_gradients()

    @property
    def has_scaler(self) -> bool:
        """Whether the loss is scaled, so that the scaler skips what is not finite."""
        a = self._accelerator
        return bool(
            a.native_amp and a.mixed_precision == "fp16" and a.scaler is not None and a.scaler.is_enabled()
        )

    def _scaled(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Those whose gradients have not been unscaled yet."""
        if not self.has_scaler:
            return []
        known = states(self._accelerator.scaler)
        return [o for o in optimizers if known[id(o)]["stage"] is OptState.READY]


class _OfRelease010:
    """Stands among the accelerator's objects while it loads a checkpoint of distclip 0.1.0, which registered
    its state there."""

    def __init__(self, installed: Installed, others: list[Any]) -> None:
        self._installed, self._others = installed, others

    @staticmethod
    def found(installed: Installed, directory: str) -> bool:
        """Whether one file more than there are objects is there, and is ours: then it will be loaded."""
        objects = installed._accelerator._custom_objects
        saved = [name for name in os.listdir(directory) if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name)]
        if len(saved) != len(objects) + 1:
            return False
        for i in range(len(saved)):
            path = os.path.join(directory, f"custom_checkpoint_{i}.pkl")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # of another object: it may hold anything
                continue
            if isinstance(state, dict) and list(state) == ["lists"]:
                stand_in = _OfRelease010(installed, objects)
                installed._accelerator._custom_objects = [*objects[:i], stand_in, *objects[i:]]
                return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._installed._accelerator._custom_objects = self._others
        self._installed.load_state_dict(state)
