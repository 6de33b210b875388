"""Lightning: the optimizer step of a Trainer or of Fabric, taken by a clipper."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map

from distclip._apply import OnNonfinite
from distclip._parameters import named_parameters
from distclip._report import ClipReport
from distclip.clipper import Clipper
from distclip.strategies._base import Strategy

# Lightning comes under two names, whose classes are not each other's: the one in use.
_name = "lightning.pytorch"
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    _name = "pytorch_lightning"
try:
    pl: Any = importlib.import_module(_name)
    _precision: Any = importlib.import_module(f"{_name}.plugins.precision")
    _model_helpers: Any = importlib.import_module(f"{_name}.utilities.model_helpers")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "distclip.integrations.lightning needs Lightning: pip install 'distclip[lightning]'"
    ) from error

_LOGGED = {"norm": "total_norm", "threshold": "threshold", "coefficient": "coefficient", "clipped": "clipped"}


class ClipGradients(pl.Callback):  # type: ignore[misc]  # a class that is known at run time only
    """Clips in a Trainer, with any strategy, however the model is spread: in place of
    ``Trainer(gradient_clip_val=…)``, which refuses to clip the norm under FSDP, and to clip at all a fused
    optimizer with ``precision="16-mixed"``.

    It takes over the step from Lightning's precision plugin: after the closure (backward, and in manual
    optimization nothing) and the hooks ``on_before_optimizer_step`` it calls
    :meth:`distclip.Clipper.step`, which unscales, clips, steps or skips, and updates the loss scale, alike on
    every rank. So with ``"16-mixed"`` those hooks see gradients that are still multiplied by the loss scale.
    Automatic and manual optimization; with ``accumulate_grad_batches``, once for each accumulated batch.
    Where there are several optimizers, each is clipped on its own, by a copy of the strategy.

    ``clip/norm``, ``clip/threshold``, ``clip/coefficient`` and ``clip/clipped`` (whose mean is the clip rate)
    are logged, without waiting for the device. The strategy's state is saved in the Trainer's checkpoints and
    restored, on any number of ranks.

    Args:
        strategy: the algorithm, e.g. ``distclip.ZClip()``.
        on_nonfinite, apply: as for :class:`distclip.Clipper`.
        log: False logs nothing.

    Attributes:
        report: that of the last step; None before the first.
        clippers: by index of the optimizer, from its first step on.

    Raises:
        ValueError: from ``trainer.fit``: the Trainer is to clip too, or the module overrides
            ``configure_gradient_clipping``, or the optimizer is LBFGS.
        TypeError: from ``trainer.fit``: a precision plugin that steps in a way of its own (DeepSpeed's
            engine clips by its own configuration, XLA reduces in the step).

    Example:
        >>> trainer = Trainer(strategy="fsdp", callbacks=[ClipGradients(distclip.GlobalNorm(1.0))])
        >>> trainer.fit(model, data)
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        on_nonfinite: OnNonfinite = "skip",
        apply: Literal["inplace", "deferred"] = "inplace",
        log: bool = True,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"{strategy=}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0)")
        self.strategy = strategy
        self.report: ClipReport | None = None
        self.clippers: dict[int, Clipper] = {}
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._apply: Literal["inplace", "deferred"] = apply
        self._log, self._unlogged = log, False
        self._loaded: dict[int, dict[str, Any]] = {}  # states whose clippers are not made yet

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
        plugin.optimizer_step = self._optimizer_step
        self._trainer = trainer
        self._loaded = self.state_dict()["clippers"]  # another fit: other parameters, the same strategy
        self.clippers = {}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(trainer.strategy.precision_plugin).pop("optimizer_step", None)

    def _optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """In place of the precision plugin's method of that name."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS runs backward several times within a step: it cannot be clipped")
        if kwargs:
            raise ValueError(f"optimizer.step({', '.join(kwargs)}=…): ClipGradients passes no arguments on")
        trainer = self._trainer
        result = closure()
        if result is None and model.automatic_optimization:
            return result  # training_step returned None: there was no backward pass
        plugin = trainer.strategy.precision_plugin
        plugin._after_closure(model, optimizer)  # its hooks; it has no gradient_clip_val to clip to
        scaler = getattr(plugin, "scaler", None)
        self.report = self._clipper_of(optimizer).step(optimizer, scaler)
        self._unlogged = True
        return result

    def _clipper_of(self, optimizer: torch.optim.Optimizer) -> Clipper:
        optimizers = self._trainer.strategy.optimizers
        index = next(i for i, own in enumerate(optimizers) if own is optimizer)
        if index not in self.clippers:
            wrapped = self._trainer.strategy.model
            source: Any = wrapped
            strategy = self.strategy
            if len(optimizers) > 1:
                own = {id(p) for group in optimizer.param_groups for p in group["params"]}
                source = [(p.name, p.tensor) for p in named_parameters(wrapped) if id(p.tensor) in own]
                strategy = copy.deepcopy(strategy)
            clipper = Clipper(source, strategy, on_nonfinite=self._on_nonfinite, apply=self._apply)
            if index in self._loaded:
                clipper.load_state_dict(self._loaded.pop(index))
            self.clippers[index] = clipper
        return self.clippers[index]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._log and self._unlogged and self.report is not None:
            values = {f"clip/{name}": getattr(self.report, field) for name, field in _LOGGED.items()}
            # A threshold for each parameter is no line in a plot.
            pl_module.log_dict({name: value.float() for name, value in values.items() if value.dim() == 0})
        self._unlogged = False

    def state_dict(self) -> dict[str, Any]:
        states = {index: clipper.state_dict() for index, clipper in self.clippers.items()}
        # On the CPU: Lightning loads what goes with a sharded checkpoint to where it was saved from.
        states = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, states)
        return {"clippers": self._loaded | states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = dict(state_dict["clippers"])
        for index, clipper in self.clippers.items():
            if index in self._loaded:
                clipper.load_state_dict(self._loaded.pop(index))


def step(fabric: Any, clipper: Clipper, optimizer: Any) -> ClipReport:
    """With Fabric, in place of ``fabric.clip_gradients(model, optimizer, …)`` and ``optimizer.step()``.

    Unscales, clips, steps or skips, and updates the loss scale, alike on every rank: also for FSDP, FSDP2 and
    tensor parallel models, and for fused optimizers with ``precision="16-mixed"``, where
    ``fabric.clip_gradients`` raises.

    Args:
        fabric: that has set up the model and the optimizer.
        clipper: made from the model that ``fabric.setup`` has returned.
        optimizer: as ``fabric.setup`` has returned it.

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
    report = clipper.step(inner, getattr(fabric.strategy.precision, "scaler", None))
    fabric.call("on_after_optimizer_step", strategy=fabric.strategy, optimizer=inner)
    return report
