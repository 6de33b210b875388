"""Hugging Face's Trainer: its ``max_grad_norm``, logs and checkpoints, with any strategy."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.apply.change import OnNonfinite
from distclip.decide.report import ClipReport
from distclip.integrations import accelerate
from distclip.strategies._base import Strategy

_HANDLE = "_distclip"  # attribute of a trainer that distclip is installed in
_NAME = "DistclipCallback"  # under which the state is found in trainer_state.json


def install(
    trainer: Any,
    strategy: Strategy | Callable[[], Strategy] | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    stages: dist.ProcessGroup | DeviceMesh | None = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Installed:
    """Clip with distclip wherever ``trainer`` clips, in one line between ``Trainer(...)`` and ``train()``.

    On every rank. ``TrainingArguments(max_grad_norm=...)`` stays what turns clipping on. Without a strategy
    it is the threshold, as before; with one, the strategy decides.

    Beside ``grad_norm`` (of the last step) the logs show ``clip_threshold`` (of the last step, where the
    strategy has one for all gradients, and it is finite), ``clip_rate`` and ``skip_rate`` (the shares of the
    steps since the last log whose gradients were clipped, and that were skipped, by the loss scaler too).
    The strategy's state is saved with the Trainer's checkpoints, in ``trainer_state.json``, and continued by
    ``train(resume_from_checkpoint=...)``. (That of another strategy is left out, and a line in the log says
    so.)

    Args:
        trainer: a ``transformers.Trainer`` or a subclass.
        strategy, on_nonfinite, stages, process_group, accumulate: as for
            :func:`distclip.integrations.accelerate.install`.

    Raises:
        ValueError: a strategy is given, and ``max_grad_norm`` is 0, so that the Trainer never clips;
            DeepSpeed, which clips by its own configuration; or installed already.
        ModuleNotFoundError: transformers or Accelerate is not installed.
        TypeError: ``trainer`` or ``strategy`` is none.

    Example:
        >>> from distclip.integrations.transformers import install
        >>> trainer = Trainer(model, TrainingArguments("out", max_grad_norm=1.0), train_dataset=data)
        >>> install(trainer, distclip.ZClip())
        >>> trainer.train()
        {'grad_norm': '1.37', 'clip_threshold': '1', 'clip_rate': '0.1', 'skip_rate': '0', ...}
    """
    try:
        from transformers import Trainer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "transformers is not installed: pip install 'distclip[transformers]'"
        ) from error
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer={type(trainer).__name__}: expected a transformers.Trainer")
    if strategy is not None and not trainer.args.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm={trainer.args.max_grad_norm}: the Trainer clips only where this is positive. "
            "Leave it at its default, 1.0; the strategy decides, whatever it is."
        )
    if hasattr(trainer, _HANDLE):
        raise ValueError("distclip is installed in this trainer already: call .remove() on it first")
    options = {
        "on_nonfinite": on_nonfinite,
        "stages": stages,
        "process_group": process_group,
        "accumulate": accumulate,
    }
    return Installed(trainer, strategy, options)


class Installed:
    """distclip inside a Trainer, as :func:`install` leaves it; a context manager that removes it.

    Attributes:
        clipping: what is installed in the Trainer's accelerator, with ``report`` and ``clipper``.
    """

    def __init__(
        self, trainer: Any, strategy: Strategy | Callable[[], Strategy] | None, options: dict[str, Any]
    ) -> None:
        self._trainer, self._strategy, self._options = trainer, strategy, options
        self.clipping = accelerate.install(trainer.accelerator, strategy, **options)
        self._seen: ClipReport | None = None
        self._steps = 0  # since the last log
        self._flagged: Tensor | None = None  # [2] float32, of those clipped and skipped
        self._log = trainer.log
        trainer.log = self._log_clipping
        # On mixed meshes the Trainer would clip by itself, and not ask its accelerator.
        self._patched = ["log"]
        if hasattr(trainer, "_has_mixed_mesh_grads"):
            trainer._has_mixed_mesh_grads = _never
            self._patched.append("_has_mixed_mesh_grads")
        self._callback = _callback_for(self)
        trainer.add_callback(self._callback)
        setattr(trainer, _HANDLE, self)

    @property
    def report(self) -> ClipReport | None:
        """Of the last step, None before the first."""
        return self.clipping.report

    def remove(self) -> None:
        """Give the Trainer and its accelerator their own methods back. A second call does nothing."""
        if getattr(self._trainer, _HANDLE, None) is not self:
            return
        for name in (*self._patched, _HANDLE):
            delattr(self._trainer, name)
        self._trainer.remove_callback(type(self._callback))
        self.clipping.remove()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def begin(self, saved: str | None) -> None:
        """Training begins, perhaps from a checkpoint."""
        if (
            self._trainer.accelerator is not self.clipping._accelerator
        ):  # a hyperparameter search made another
            self.clipping = accelerate.install(self._trainer.accelerator, self._strategy, **self._options)
        if saved is not None:
            # Rank 0 has written it, on its own GPU.
            state = torch.load(io.BytesIO(base64.b64decode(saved)), map_location="cpu", weights_only=True)
            self.clipping.load_state_dict(state)
        self._steps, self._flagged = 0, None

    def observe(self) -> None:
        """Take note of the step that is about to be taken; reads no value."""
        report = self.report
        if report is None:
            return
        self._seen, self._steps = report, self._steps + 1
        skipped = report.skipped | report.nonfinite if self.clipping.has_scaler else report.skipped
        flags = torch.stack([report.clipped, skipped]).float()
        self._flagged = flags if self._flagged is None else self._flagged + flags

    def saved(self) -> str:
        """The state as text, for ``trainer_state.json``."""
        buffer = io.BytesIO()
        torch.save(self.clipping.state_dict(), buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def _log_clipping(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and self._flagged is not None and self._seen is not None:
            threshold = self._seen.threshold.item() if self._seen.threshold.dim() == 0 else math.inf
            if math.isfinite(threshold):  # JSON has no other numbers
                logs["clip_threshold"] = threshold
            logs["clip_rate"], logs["skip_rate"] = (self._flagged / self._steps).tolist()
            self._steps, self._flagged = 0, None
        self._log(logs, *args, **kwargs)


def _never(model: Any) -> bool:
    return False


def _callback_for(installed: Installed) -> Any:
    """A callback of a class of its own: the Trainer may make another of that class when it resumes."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer has read the checkpoint's by now. One saved without distclip has no such entry, which
        # the Trainer expects when it saves the next.
        entry = state.stateful_callbacks.setdefault(_NAME, self.state())
        installed.begin(entry["attributes"]["saved"])

    def on_pre_optimizer_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        installed.observe()

    def state(self: Any) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": installed.saved()}}

    methods = {
        "on_train_begin": on_train_begin,
        "on_pre_optimizer_step": on_pre_optimizer_step,
        "state": state,
    }
    return type(_NAME, (TrainerCallback, ExportableState), methods)()
