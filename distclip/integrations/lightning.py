"""Lightning: the optimizer step of a Trainer or of Fabric, taken by a clipper."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distclip.apply.change import OnNonfinite
from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper
from distclip.decide.report import ClipReport
from distclip.integrations._clippers import Clippers
from distclip.integrations._fabric import step as step
from distclip.integrations._stepping import LossOfStep, StepSkipper, weakly
from distclip.strategies._base import Strategy
from distclip.torch_private.grad_scaler import scale_of, states
from distclip.training.unscaling import unscale_

# Lightning comes under two names, whose classes are not each other's: the one in use.
_name = "lightning.pytorch"
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    _name = "pytorch_lightning"
try:
    pl: Any = importlib.import_module(_name)
    _closures: Any = importlib.import_module(f"{_name}.loops.optimization.closure")
    _optimizers: Any = importlib.import_module(f"{_name}.core.optimizer")
    _precision: Any = importlib.import_module(f"{_name}.plugins.precision")
    _model_helpers: Any = importlib.import_module(f"{_name}.utilities.model_helpers")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "distclip.integrations.lightning needs Lightning: pip install 'distclip[lightning]'"
    ) from error

_LOGGED = {
    "norm": "total_norm",
    "threshold": "threshold",
    "coefficient": "coefficient",
    "clipped": "clipped",
    "skipped": "skipped",
}
_LBFGS = "LBFGS runs backward several times within a step: it cannot be clipped"


class ClipGradients(pl.Callback):  # type: ignore[misc]  # a class that is known at run time only
    """Clips in a Trainer, with any strategy, however the model is spread: in place of
    ``Trainer(gradient_clip_val=…)``, which refuses to clip the norm under FSDP, and to clip at all a fused
    optimizer with ``precision="16-mixed"``.

    It takes over the step from Lightning's precision plugin: after the closure (backward, and in manual
    optimization nothing) and the hooks ``on_before_optimizer_step`` it calls
    :meth:`distclip.Clipper.step`, which unscales, clips, steps or skips, and updates the loss scale, alike on
    every rank. With ``"16-mixed"`` those hooks see gradients that are unscaled, and not yet clipped, as
    without it (which costs a pass over the gradients, only where there is such a hook). Automatic and manual
    optimization; with ``accumulate_grad_batches``, once for each accumulated batch.

    A step that does not pass by Lightning is clipped as well: of ``self.optimizers(use_pl_optimizer=False)``,
    of ``optimizer.optimizer`` in an ``optimizer_step`` of the module's own, of an optimizer that Lightning
    does not know, and ``scaler.step(optimizer)``.

    Each optimizer's parameters are clipped on their own, as they are at that step. Where there are several
    optimizers, each has a copy of the strategy, or one of its own from a list; a pattern of that strategy
    must fit a parameter of any of them. With a loss scaler, which they share, the scale is updated once all
    have stepped, at the next backward pass. A strategy that judges the loss gets that of the backward passes
    since the last step, in manual optimization of ``self.manual_backward``.

    ``clip/norm``, ``clip/threshold``, ``clip/coefficient``, ``clip/clipped`` and ``clip/skipped`` (whose
    means are the rates) are logged, without waiting for the device; of several optimizers as ``clip/norm/0``,
    ``clip/norm/1``, …. The strategy's state is saved in the Trainer's checkpoints and restored, on any number
    of ranks. (That of another strategy is left out, and a line in the log says so.)

    Args:
        strategy: the algorithm, e.g. ``distclip.ZClip()``; or one for each optimizer, in the order of
            ``configure_optimizers``.
        on_nonfinite, apply: as for :class:`distclip.Clipper`.
        log: False logs nothing.

    Attributes:
        report: that of the last step; None before the first.
        reports: by index of the optimizer, that of its last step.
        clippers: by index of the optimizer, from its first step on. (Those that Lightning does not know come
            last, in the order of their first steps.)

    Raises:
        ValueError: from ``trainer.fit``: the Trainer is to clip too, or the module overrides
            ``configure_gradient_clipping``, or the optimizer is LBFGS, or there are not as many strategies as
            optimizers; or a step past Lightning comes with scaled gradients, or with ``apply="deferred"``.
        TypeError: from ``trainer.fit``: a precision plugin that steps in a way of its own (DeepSpeed's
            engine clips by its own configuration, XLA reduces in the step).

    Example:
        >>> trainer = Trainer(strategy="fsdp", callbacks=[ClipGradients(distclip.GlobalNorm(1.0))])
        >>> trainer.fit(model, data)
    """

    def __init__(
        self,
        strategy: Strategy | Sequence[Strategy],
        *,
        on_nonfinite: OnNonfinite = "skip",
        apply: Literal["inplace", "deferred"] = "inplace",
        log: bool = True,
    ) -> None:
        self.strategy = strategy
        self.report: ClipReport | None = None
        self.reports: dict[int, ClipReport] = {}
        self._clippers = Clippers(strategy, on_nonfinite, apply)
        self._apply: Literal["inplace", "deferred"] = apply
        self._log = log
        self._unlogged: dict[int, ClipReport] = {}
        self._handles: list[Any] = []
        self._scaler: Any = None
        self._forget()

    def _forget(self) -> None:
        """What belongs to one fit."""
        self._clippers.let_go()
        self._skippers: dict[torch.optim.Optimizer, StepSkipper] = {}
        self._strangers: list[torch.optim.Optimizer] = []  # that Lightning does not know
        self._stepping: torch.optim.Optimizer | None = None  # whatever steps within that step is a part of it
        self._update_is_due = False  # of the scale
        self._loss = LossOfStep()

    # --- around a fit -----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and ClipGradients would both clip: "
                "leave gradient_clip_val out, and give the threshold to the strategy, distclip.GlobalNorm(…)"
            )
        if _model_helpers.is_overridden("configure_gradient_clipping", pl_module, pl.LightningModule):
            raise ValueError(
                f"{type(pl_module).__name__}.configure_gradient_clipping would not be called: ClipGradients "
                "takes its place. Remove one of them."
            )
        plugin = trainer.strategy.precision_plugin
        kinds = (_precision.Precision, _precision.MixedPrecision, _precision.FSDPPrecision)
        known = [kind.optimizer_step for kind in kinds]
        if type(plugin).optimizer_step not in known:
            raise TypeError(
                f"{type(plugin).__name__} takes optimizer steps in a way of its own, where ClipGradients "
                "cannot clip. (DeepSpeed's engine clips by its own configuration: "
                "Trainer(gradient_clip_val=…), or gradient_clipping in its config.)"
            )
        self._forget()
        self._trainer = trainer
        self._clippers.begin_anew()
        self.reports = {}
        plugin.optimizer_step = self._optimizer_step
        self._handles = [
            register_optimizer_step_pre_hook(weakly(self._before_step)),
            register_optimizer_step_post_hook(weakly(self._after_step)),
        ]
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self._scaler, self._scale, self._scaled_step = scaler, scaler.scale, scaler.step
            scaler.scale, scaler.step = self._scale_loss, self._scaler_step

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._clippers.require_fit(self._configured(), trainer.strategy.model)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(trainer.strategy.precision_plugin).pop("optimizer_step", None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._scaler is not None:
            self._update_scale()
            del self._scaler.scale, self._scaler.step
            self._scaler = None
        for skipper in self._skippers.values():
            skipper.remove()
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._update_is_due = False  # the scaler may be in the midst of a step
        self.teardown(trainer, pl_module, "fit")

    # --- a step by way of Lightning -----------------------------------------------------------------------

    def _optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """In place of the precision plugin's method of that name."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(_LBFGS)
        if kwargs:
            raise ValueError(f"optimizer.step({', '.join(kwargs)}=…): ClipGradients passes no arguments on")
        result = closure()
        if result is None and self._lacks_backward(optimizer, model, closure):
            return result
        if self._scaler is not None and self._is_observed(model):
            self._unscale(optimizer)
        # Lightning's hooks; it has no gradient_clip_val to clip to.
        self._trainer.strategy.precision_plugin._after_closure(model, optimizer)
        self._step(optimizer, update=None)
        return result

    def _lacks_backward(self, optimizer: torch.optim.Optimizer, model: Any, closure: Any) -> bool:
        """Whether there is nothing to step with: training_step has returned None, which Lightning refuses on
        several ranks. (A module's own ``optimizer_step`` may have called Lightning's closure before.)"""
        if not model.automatic_optimization or not isinstance(closure, _closures.AbstractClosure):
            return False
        return self._scaler is not None or all(p.grad is None for p in parameters_of(optimizer))

    def _step(self, optimizer: torch.optim.Optimizer, *, update: bool | None) -> None:
        """``update``: the loss scale; None: now if this is the only optimizer, else once all have stepped."""
        index, clipper = self._clipper_of(optimizer)
        later = update is None and self._scaler is not None and len(self._configured()) > 1
        if update is None:
            update = not later
        with self._within(optimizer):
            report = clipper.step(optimizer, self._scaler, loss=self._loss.value, update=update)
        self._update_is_due |= later
        self._note(index, report)

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self._is_scaled(optimizer):
            unscale_(self._scaler, optimizer, self._clipper_of(optimizer)[1])

    def _is_scaled(self, optimizer: torch.optim.Optimizer) -> bool:
        state = states(self._scaler).get(id(optimizer))
        return state is None or state["stage"] is OptState.READY

    def _is_observed(self, model: Any) -> bool:
        """Whether anybody looks at the gradients before the step."""
        hook, is_overridden = "on_before_optimizer_step", _model_helpers.is_overridden
        return is_overridden(hook, model, pl.LightningModule) or any(
            is_overridden(hook, callback, pl.Callback) for callback in self._trainer.callbacks
        )

    @contextlib.contextmanager
    def _within(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        self._stepping = optimizer
        try:
            yield
        finally:
            self._stepping = None

    # --- a step past Lightning ----------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Before the ``step`` of any optimizer of torch."""
        if self._stepping is not None or not self._trains(optimizer):
            return None
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(_LBFGS)
        kind = type(optimizer).__name__
        if self._apply == "deferred":
            raise ValueError(
                f"{kind}.step() was called past Lightning, so it cannot take the coefficient of "
                'apply="deferred" along: step Lightning\'s own, self.optimizers(), or leave apply out'
            )
        if self._scaler is not None and scale_of(self._scaler) is not None and self._is_scaled(optimizer):
            raise ValueError(
                f"{kind}.step() was called past Lightning, with gradients that are multiplied by the loss "
                "scale: step Lightning's own optimizer, self.optimizers(), which unscales them, or call "
                "scaler.step(optimizer)"
            )
        self._stepping = optimizer  # until _after_step
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._skipper_of(optimizer).note(self._clip(optimizer))
            return None

        def clipped() -> Any:
            result = closure()
            skipped = self._clip(optimizer)
            self._skipper_of(optimizer).leave_out(optimizer, skipped, skipped)
            return result

        if "closure" in kwargs:
            return args, kwargs | {"closure": clipped}
        return (args[0], clipped, *args[2:]), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is optimizer:
            self._stepping = None

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Whether the step is to be left out, [] bool."""
        index, clipper = self._clipper_of(optimizer)
        report = clipper.clip(loss=self._loss.value)
        self._note(index, report)
        return report.skipped

    def _scaler_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of the scaler's; its ``update`` is the script's to call."""
        own = optimizer.optimizer if isinstance(optimizer, _optimizers.LightningOptimizer) else optimizer
        if self._stepping is None and self._trains(own):
            return self._step(own, update=False)
        return self._scaled_step(optimizer, *args, **kwargs)

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it holds any parameter of the model."""
        if any(optimizer is known for known in (*self._configured(), *self._strangers)):
            return True
        own = {id(p) for p in self._trainer.strategy.model.parameters()}
        if not any(id(p) in own for p in parameters_of(optimizer)):
            return False
        self._strangers.append(optimizer)
        return True

    def _skipper_of(self, optimizer: torch.optim.Optimizer) -> StepSkipper:
        if optimizer not in self._skippers:
            self._skippers[optimizer] = StepSkipper(optimizer)
        return self._skippers[optimizer]

    # --- the loss and its scale ---------------------------------------------------------------------------

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if not self._clippers.uses_loss:
            return
        part = loss.detach()
        scale = None if self._scaler is None else scale_of(self._scaler)
        if scale is not None:
            part = part / scale.to(part.device)
        self._loss.add(part)

    def _scale_loss(self, outputs: Any) -> Any:
        """In the place of the scaler's ``scale``."""
        self._update_scale()
        return self._scale(outputs)

    def _update_scale(self) -> None:
        if self._update_is_due:
            self._update_is_due = False
            self._scaler.update()

    # --- what clips ---------------------------------------------------------------------------------------

    def _configured(self) -> list[torch.optim.Optimizer]:
        found = self._trainer.strategy.optimizers
        return [o for o in found if not isinstance(o, _optimizers._MockOptimizer)]

    @property
    def clippers(self) -> dict[int, Clipper]:
        return self._clippers.made

    def _clipper_of(self, optimizer: torch.optim.Optimizer) -> tuple[int, Clipper]:
        model = self._trainer.strategy.model
        return self._clippers.of(optimizer, self._configured(), self._strangers, model)

    def _note(self, index: int, report: ClipReport) -> None:
        self.report = self.reports[index] = self._unlogged[index] = report
        self._loss.used = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update_scale()
        self._stepping = None
        several = len(self._configured()) + len(self._strangers) > 1
        for index, report in self._unlogged.items() if self._log else ():
            end = f"/{index}" if several else ""
            values = {f"clip/{name}{end}": getattr(report, field) for name, field in _LOGGED.items()}
            # A threshold for each parameter is no line in a plot.
            pl_module.log_dict({name: value.float() for name, value in values.items() if value.dim() == 0})
        self._unlogged = {}

    # --- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self._clippers.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._clippers.load_state_dict(state_dict)
