"""Lightning: the optimizer step of a Trainer or of Fabric, taken by a clipper."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from distclip.apply.change import OnNonfinite
from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper
from distclip.decide.report import ClipReport
from distclip.inspection.advice import is_main_rank, logger
from distclip.integrations._stepping import StepSkipper, load_if_it_fits
from distclip.layout.parameters import named_parameters
from distclip.layout.source import Witness, witness_of
from distclip.strategies._base import Strategy
from distclip.strategies._pattern import require_fit
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
        each = [strategy] if isinstance(strategy, Strategy) else strategy
        if not isinstance(each, list | tuple) or not each or not all(isinstance(s, Strategy) for s in each):
            raise TypeError(
                f"{strategy=}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0), or a list of one "
                "for each optimizer"
            )
        self.strategy = strategy
        self.report: ClipReport | None = None
        self.reports: dict[int, ClipReport] = {}
        self.clippers: dict[int, Clipper] = {}
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._apply: Literal["inplace", "deferred"] = apply
        self._log = log
        self._uses_loss = any(s.uses_loss for s in each)
        self._unlogged: dict[int, ClipReport] = {}
        self._loaded: dict[int, dict[str, Any]] = {}  # states whose clippers are not made yet
        self._handles: list[Any] = []
        self._scaler: Any = None
        self._forget()

    def _forget(self) -> None:
        """What belongs to one fit."""
        self._followed: dict[int, _Followed] = {}
        self._skippers: dict[int, tuple[torch.optim.Optimizer, StepSkipper]] = {}  # by the optimizer's id
        self._strangers: list[torch.optim.Optimizer] = []  # that Lightning does not know
        self._stepping: torch.optim.Optimizer | None = None  # whatever steps within that step is a part of it
        self._update_is_due = False  # of the scale
        self._loss: Tensor | None = None  # of the backward passes since the last step
        self._loss_used = False

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
        self._loaded = self.state_dict()["clippers"]  # another fit: other parameters, the same strategy
        self.clippers, self.reports = {}, {}
        plugin.optimizer_step = self._optimizer_step
        self._handles = [
            register_optimizer_step_pre_hook(_hook_of(self, "_before_step")),
            register_optimizer_step_post_hook(_hook_of(self, "_after_step")),
        ]
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self._scaler, self._scale, self._scaled_step = scaler, scaler.scale, scaler.step
            scaler.scale, scaler.step = self._scale_loss, self._scaler_step

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        optimizers = self._configured()
        if not isinstance(self.strategy, Strategy):
            if len(self.strategy) != len(optimizers):
                raise ValueError(
                    f"ClipGradients has {len(self.strategy)} strategies, and configure_optimizers returns "
                    f"{len(optimizers)} optimizers: give one strategy for each, or one for all"
                )
            return
        self._fresh = copy.deepcopy(self.strategy)
        if len(optimizers) > 1:
            held = {id(p) for o in optimizers for p in parameters_of(o)}
            named = named_parameters(trainer.strategy.model)
            require_fit(
                self._fresh, [p.info for p in named if p.tensor.requires_grad and id(p.tensor) in held]
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(trainer.strategy.precision_plugin).pop("optimizer_step", None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._scaler is not None:
            self._update_scale()
            del self._scaler.scale, self._scaler.step
            self._scaler = None
        for _, skipper in self._skippers.values():
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
        with self._within(optimizer):
            report = clipper.step(
                optimizer, self._scaler, loss=self._loss, update=not later if update is None else update
            )
        self._update_is_due |= later
        self._note(index, report)

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        state = self._scaler._per_optimizer_states.get(id(optimizer))
        if state is None or state["stage"] is OptState.READY:
            unscale_(self._scaler, optimizer, self._clipper_of(optimizer)[1])

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
        state = None if self._scaler is None else self._scaler._per_optimizer_states.get(id(optimizer))
        scaled = self._scaler is not None and self._scaler._scale is not None
        if scaled and (state is None or state["stage"] is OptState.READY):
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
        report = clipper.clip(loss=self._loss)
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
        if id(optimizer) not in self._skippers:
            self._skippers[id(optimizer)] = optimizer, StepSkipper(optimizer)
        return self._skippers[id(optimizer)][1]

    # --- the loss and its scale ---------------------------------------------------------------------------

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if not self._uses_loss:
            return
        part = loss.detach()
        if self._scaler is not None and self._scaler._scale is not None:
            part = part / self._scaler._scale.to(part.device)
        self._loss = part if self._loss is None or self._loss_used else self._loss + part
        self._loss_used = False

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

    def _clipper_of(self, optimizer: torch.optim.Optimizer) -> tuple[int, Clipper]:
        optimizers = [*self._configured(), *self._strangers]
        index = next(i for i, own in enumerate(optimizers) if own is optimizer)
        if index not in self._followed:
            clipper = Clipper(
                [], self._strategy_of(index), on_nonfinite=self._on_nonfinite, apply=self._apply
            )
            if index in self._loaded:
                load_if_it_fits(clipper, self._loaded.pop(index))
            self._followed[index] = _Followed(clipper)
            self.clippers[index] = clipper
        self._followed[index].look(optimizer, self._trainer.strategy.model)
        return index, self.clippers[index]

    def _strategy_of(self, index: int) -> Strategy:
        if not isinstance(self.strategy, Strategy):
            if index < len(self.strategy):
                return self.strategy[index]
            raise ValueError(
                f"ClipGradients has {len(self.strategy)} strategies, one for each optimizer of "
                "configure_optimizers, and another optimizer steps: return that from configure_optimizers "
                "too, or give one strategy for all"
            )
        if index == 0 and len(self._configured()) < 2:
            return self.strategy
        return copy.deepcopy(self._fresh)

    def _note(self, index: int, report: ClipReport) -> None:
        self.report = self.reports[index] = self._unlogged[index] = report
        self._loss_used = True

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
        states = {index: clipper.state_dict() for index, clipper in self.clippers.items()}
        # On the CPU: Lightning loads what goes with a sharded checkpoint to where it was saved from.
        states = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, states)
        return {"clippers": self._loaded | states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = dict(state_dict["clippers"])
        for index, clipper in self.clippers.items():
            if index in self._loaded:
                load_if_it_fits(clipper, self._loaded.pop(index))


class _Followed:
    """The clipper of one optimizer's parameters, whatever becomes of these."""

    def __init__(self, clipper: Clipper) -> None:
        self._clipper = clipper
        self._witnesses: tuple[Witness, Witness] | None = None

    def look(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Give the clipper the parameters that ``optimizer`` holds now, by their names in ``model``."""
        if self._holds(optimizer, model):
            return
        held = {id(p): p for p in parameters_of(optimizer)}
        named = [
            (p.name, p.tensor) for p in named_parameters(model) if held.pop(id(p.tensor), None) is not None
        ]
        if held and self._witnesses is not None and is_main_rank():
            logger.warning(
                "%s still holds %d parameters (the first of shape %s) that are not in %s any more: what has "
                "taken their place is trained only once the optimizer holds it (optimizer.add_param_group).",
                type(optimizer).__name__, len(held), tuple(next(iter(held.values())).shape),
                type(model).__name__,
            )  # fmt: skip
        named += [(f"not in the module[{i}]", p) for i, p in enumerate(held.values())]
        self._clipper.follow(named, [model])
        self._witnesses = witness_of(optimizer), witness_of(model)

    def _holds(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
        if self._witnesses is None:
            return False
        of_optimizer, of_model = self._witnesses
        return of_optimizer.tensors(optimizer) is not None and of_model.tensors(model) is not None


def _hook_of(callback: ClipGradients, name: str) -> Callable[..., Any]:
    """For torch's lists of hooks, which are to keep nothing alive."""
    reference = weakref.ref(callback)

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        target = reference()
        return None if target is None else getattr(target, name)(optimizer, args, kwargs)

    return hook


def step(fabric: Any, clipper: Clipper, optimizer: Any, *, loss: Tensor | float | None = None) -> ClipReport:
    """With Fabric, in place of ``fabric.clip_gradients(model, optimizer, …)`` and ``optimizer.step()``.

    Unscales, clips, steps or skips, and updates the loss scale, alike on every rank: also for FSDP, FSDP2 and
    tensor parallel models, and for fused optimizers with ``precision="16-mixed"``, where
    ``fabric.clip_gradients`` raises.

    Args:
        fabric: that has set up the model and the optimizer.
        clipper: made from the model that ``fabric.setup`` has returned.
        optimizer: as ``fabric.setup`` has returned it.
        loss: as for :meth:`distclip.Clipper.step`.

    Raises:
        TypeError: under DeepSpeed, whose engine clips by its own configuration.

    Example:
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
        >>> fabric.backward(loss)
        >>> report = step(fabric, clipper, optimizer)
        >>> optimizer.zero_grad()
    """
    if "DeepSpeed" in type(fabric.strategy).__name__:
        raise TypeError("DeepSpeed's engine clips by its own configuration: set gradient_clipping there")
    inner = getattr(optimizer, "optimizer", optimizer)
    report = clipper.step(inner, getattr(fabric.strategy.precision, "scaler", None), loss=loss)
    fabric.call("on_after_optimizer_step", strategy=fabric.strategy, optimizer=inner)
    return report
