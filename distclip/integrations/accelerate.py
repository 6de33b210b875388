"""Hugging Face Accelerate: its clipping, unscaling and checkpoints, right for every parallelism it offers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distclip import kernels
from distclip.apply.change import OnNonfinite, require_policy
from distclip.apply.loss_scale import LossScale, record
from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper
from distclip.current.as_called import AsCalled
from distclip.decide.report import ClipReport
from distclip.decide.transfer import bound_on
from distclip.inspection.advice import is_main_rank
from distclip.integrations._stepping import (
    KeepingScaler,
    StepOfAccelerate,
    StepSkipper,
    holders_of,
    leave_behind,
    load_if_it_fits,
)
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source, named_parameters, walk_modules
from distclip.layout.placement import MANAGED
from distclip.layout.source import begun_to_train
from distclip.layout.synchronisation import Synchronisation
from distclip.measure.gradients import collect
from distclip.planning.plan import Plan, build_plan
from distclip.strategies._base import Strategy, require_bound, require_norm_type
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
_MOST_LISTS = 32  # of parameters; a script clips one or a few

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
        self._options = options
        self.report: ClipReport | None = None
        self.clipper: Clipper | None = None
        # By the identity of every parameter. What a list is planned for is found again from the lists that
        # the script passes, and dropped by calls that it makes: alike on every rank.
        self._lists: OrderedDict[tuple[Any, ...], _List] = OrderedDict()
        self._count = 0  # of lists made
        # Of the micro-batches since the last clip, for a strategy that judges it.
        self._loss: Tensor | None = None
        self._loss_used = False
        self._loaded: list[dict[str, Any]] = []  # states of lists that have not been clipped yet
        # By the optimizer, torch's; of any other, by Accelerate's wrapper of it.
        self._skippers: weakref.WeakKeyDictionary[torch.optim.Optimizer, StepSkipper] = (
            weakref.WeakKeyDictionary()
        )
        self._steps = weakref.WeakSet[StepOfAccelerate]()
        self._passes = 0  # of accelerator.backward
        # What each list's last clip said, for optimizers that are not prepared: when, and whether to skip.
        self._latest = weakref.WeakKeyDictionary[_List, tuple[int, Tensor]]()
        self._unheld_said = weakref.WeakSet[Clipper]()
        self._handles = [register_optimizer_step_pre_hook(_hook_of(self))]
        weakref.finalize(self, self._handles[0].remove)
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
        for step in self._steps:
            step.remove()
        for skipper in self._skippers.values():
            skipper.remove()
        if self._scaler is not None:
            self._scaler.remove()
        self._lists.clear()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """The strategy's state for each list of parameters, in the order in which they were first clipped."""
        return {"lists": [lst.clipper.state_dict() for lst in self._decided()] + self._loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks, before the first clip or later. What
        another strategy saved is left out, and a line in the log says so."""
        states = list(state["lists"])
        for lst in self._decided():
            if states:
                load_if_it_fits(lst.clipper, states.pop(0))
        self._loaded = states

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
        mine = {handle.id for handle in self._handles[1:]}
        hooks = ("_save_model_state_pre_hook", "_load_model_state_pre_hook")
        return {
            name: OrderedDict((k, hook) for k, hook in vars(self._accelerator)[name].items() if k not in mine)
            for name in hooks
        }

    def _decided(self) -> list[_List]:
        """Those that the user's strategy decides for, in order of their first clip."""
        return sorted((lst for lst in self._lists.values() if lst.decided), key=lambda lst: lst.number)

    # --- in the place of the accelerator's methods ------------------------------------------------------

    def _backward(self, loss: Tensor, **kwargs: Any) -> Any:
        self._passes += 1
        if self._scaler is not None:
            self._scaler.forget()
        if self._strategy is not None and loss.numel() == 1:
            part = loss.detach() / self._accelerator.gradient_accumulation_steps
            self._loss = part if self._loss is None or self._loss_used else self._loss + part
            self._loss_used = False
        return self._original["backward"](loss, **kwargs)

    @torch.no_grad()
    def _clip_grad_norm(self, parameters: Parameters, max_norm: float, norm_type: float | str = 2) -> Tensor:
        bound, p = require_bound("max_norm", max_norm), require_norm_type(norm_type)
        if not self._accelerator.sync_gradients:
            return torch.full((), math.nan, dtype=torch.float32, device=self._accelerator.device)
        decided = self._strategy is not None and not math.isinf(bound)
        lst = self._list(parameters, None if decided else p)
        if isinstance(lst.clipper.strategy, AsCalled):
            lst.clipper.strategy.bound = bound
        report = self._clip(lst, self._on_nonfinite if decided or self._strategy is None else "propagate")
        if decided or self._strategy is None:
            self.report, self.clipper = report, lst.clipper
        return report.total_norm

    @torch.no_grad()
    def _clip_grad_value(self, parameters: Parameters, clip_value: float) -> None:
        bound = require_bound("clip_value", clip_value)
        if not self._accelerator.sync_gradients:
            return
        lst = self._list(parameters, 2.0)
        owners = self._owners(lst)
        if self.has_scaler:
            self._require_held(lst, owners, skips=False)
        if lst.seems_unsynchronised():
            lst.clipper.begin()  # compares them, and raises if that is so
        self._unscale(self._scaled(owners), lst)
        gradients = collect(lst.elementwise_plan(), lst.tensors)
        for bucket in gradients.buckets:
            kernels.clamp_(bucket.tensors, bound_on(bucket.tensors[0].device, bound))
        gradients.commit()

    def _unscale_gradients(self, optimizer: Any = None) -> None:
        if self._accelerator.sync_gradients:
            given = self._accelerator._optimizers if optimizer is None else optimizer
            given = list(given) if isinstance(given, list | tuple) else [given]
            self._unscale(self._scaled([_unwrapped(o) for o in given]))

    def _free_memory(self, *objects: Any) -> Any:
        self._lists.clear()
        self.clipper = None
        return self._original["free_memory"](*objects)

    # --- one step ---------------------------------------------------------------------------------------

    def _clip(self, lst: _List, policy: OnNonfinite) -> ClipReport:
        """Unscale, measure, decide, change: as ``Clipper.step`` does, up to the optimizer."""
        clipper, owners = lst.clipper, self._owners(lst)
        if policy == "skip" or self.has_scaler:
            self._require_held(lst, owners, skips=policy == "skip")
        clipper.begin(self._accelerator.scaler if self.has_scaler else None)
        scaled = self._scaled(owners)
        inverse = None
        if scaled and scaled == owners and all(map(lst.covers, scaled)):
            # Unscaling joins the multiplication that clips, found_inf the norm's one reduction.
            with self._scale_of_gradients():
                inverse = LossScale.of(self._accelerator.scaler, scaled).inverse
        else:
            self._unscale(scaled, lst)
        outcome = clipper.carry_out(inverse, policy, self._loss)
        self._loss_used = True
        report = outcome.report
        if inverse is not None:
            for optimizer in scaled:
                record(self._accelerator.scaler, optimizer, report.nonfinite, OptState.UNSCALED)
        if outcome.may_skip:
            self._require_held(lst, owners, skips=True)
            self._leave_out(lst, report)
        clipper.observe(report)
        return report

    def _leave_out(self, lst: _List, report: ClipReport) -> None:
        """What holds these parameters is to skip its next step, if the report says so."""
        # Of prepared optimizers non-finite steps are the scaler's to skip, where there is one.
        skipped = report.skipped & ~report.nonfinite if self.has_scaler else report.skipped
        prepared = set()
        for accelerated in self._accelerator._optimizers:
            optimizer = _unwrapped(accelerated)
            prepared.add(id(optimizer))
            if any(id(p) in lst.ids for p in _held_by(optimizer)):
                skipper = self._skipper_of(optimizer, accelerated)
                skipper.note(skipped, of=self._passes, told=report.skipped)
        for optimizer, skipper in self._skippers.items():  # that have been seen to step by themselves
            other = skipper.hooked and id(optimizer) not in prepared
            if other and any(id(p) in lst.ids for p in parameters_of(optimizer)):
                skipper.note(report.skipped, of=self._passes)
        self._latest[lst] = self._passes, report.skipped

    def _skipper_of(self, optimizer: Any, accelerated: Any) -> StepSkipper:
        key = optimizer if isinstance(optimizer, torch.optim.Optimizer) else accelerated
        if key not in self._skippers:
            self._skippers[key] = StepSkipper(optimizer)
        skipper = self._skippers[key]
        if accelerated not in skipper.told:
            skipper.told.add(accelerated)
            if accelerated.scaler is not None or not skipper.hooked:
                self._steps.add(StepOfAccelerate(accelerated, skipper))
        return skipper

    def _any_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of torch, whosesoever, steps: one that is not prepared has to skip as well."""
        if optimizer in self._skippers:
            return
        for lst, (passes, skipped) in self._latest.items():
            if any(id(p) in lst.ids for p in parameters_of(optimizer)):
                skipper = self._skippers.setdefault(optimizer, StepSkipper(optimizer))
                skipper.note(skipped, of=passes)

    def _require_held(self, lst: _List, owners: list[Any], *, skips: bool) -> None:
        """
        Raises:
            ValueError: on every rank: the step that follows is out of reach.
        """
        lbfgs = next((o for o in owners if isinstance(o, torch.optim.LBFGS)), None)
        if skips and lbfgs is not None:
            raise ValueError(
                f"{type(lbfgs).__name__} runs backward several times within a step, none of which can be "
                "skipped: pass on_nonfinite='raise' or 'propagate' to install(), and no strategy that skips; "
                "or train with another optimizer"
            )
        if owners and (not skips or lst.clipper in self._unheld_said):
            return
        held = {id(p) for o in owners for p in _held_by(o)}
        held.update(id(p) for o, s in self._skippers.items() if s.hooked for p in parameters_of(o))
        unheld = [t for t in lst.tensors if t.requires_grad and id(t) not in held]
        self._unheld_said.add(lst.clipper)
        if not unheld or (owners and not is_main_rank()):
            return
        kinds = holders_of(unheld)
        what = (
            f"no optimizer that this accelerator has prepared holds {self._name_of(unheld[0])}"
            + (f" and {len(unheld) - 1} more of the parameters that are clipped" if unheld[1:] else "")
            + (f" ({', '.join(kinds)} does)" if kinds else "")
        )
        remedy = (
            "Pass the optimizer through accelerator.prepare, or accelerator.prepare_optimizer if it is no "
            "torch.optim.Optimizer (prepare hands such a one back as it is), and step what that returns"
        )
        if owners:
            logger.warning(
                "%s: a step that distclip skips may be taken there all the same. %s; if nothing is to train "
                "them, set requires_grad_(False).", what, remedy,
            )  # fmt: skip
            return
        scaled = "their gradients would stay multiplied by the loss scale"
        taken = "a step that is to be skipped would be taken all the same"
        raise ValueError(f"{what}: {taken if skips else scaled}. {remedy}.")

    def _name_of(self, tensor: Tensor) -> str:
        for model in self._accelerator._models:
            for name, parameter in model.named_parameters():
                if parameter is tensor:
                    return repr(name)
        return f"a parameter of shape {tuple(tensor.shape)}"

    def _unscale(self, optimizers: list[torch.optim.Optimizer], lst: _List | None = None) -> None:
        for optimizer in optimizers:
            if lst is None or not lst.covers(optimizer):
                lst = self._list([p for group in optimizer.param_groups for p in group["params"]], 2.0)
            with self._scale_of_gradients():
                unscale_(self._accelerator.scaler, optimizer, lst.clipper)

    def _scale_of_gradients(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._scaler is None else self._scaler.of_gradients()

    def _owners(self, lst: _List) -> list[torch.optim.Optimizer]:
        """The optimizers that hold some of the parameters."""
        optimizers = [_unwrapped(o) for o in self._accelerator._optimizers]
        return [o for o in optimizers if any(id(p) in lst.ids for p in _held_by(o))]

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
        states = self._accelerator.scaler._per_optimizer_states
        return [o for o in optimizers if states[id(o)]["stage"] is OptState.READY]

    def _list(self, parameters: Parameters, norm_type: float | None) -> _List:
        """What is kept for these parameters. ``norm_type``: the call's, None where the strategy decides."""
        tensors = bare_tensors(freeze_source(parameters, may_be_empty=self._may_be_empty))
        key = (norm_type, *map(id, tensors))
        if key not in self._lists:
            models = self._accelerator._models
            if norm_type is None and (former := self._former(tensors)) is not None:
                self._lists[key] = self._lists.pop(former)
                self._lists[key].hold(tensors, models)
                return self._lists[key]
            left = None
            if norm_type is not None and self._options["stages"] is None:
                left = self._left_by(norm_type, set(map(id, tensors)))
            self._drop_dead()
            strategy = self._strategy_of_one() if norm_type is None else AsCalled(norm_type)
            self._count += 1
            lst = _List(self._count, tensors, models, strategy, self._on_nonfinite, self._options)
            if left is not None:
                left.clipper.leave(lst.clipper)
            if lst.decided and self._loaded:
                load_if_it_fits(lst.clipper, self._loaded.pop(0))
            self._lists[key] = lst
        self._lists.move_to_end(key)
        return self._lists[key]

    def _left_by(self, norm_type: float, ids: set[int]) -> _List | None:
        """A new list has come from the latest that shares parameters with it, or has none that train: ranks
        for which nothing has changed wait in the step of that one, and are to be told."""
        trained = {id(p) for m in self._accelerator._models for p in m.parameters() if p.requires_grad}
        for key, lst in reversed(self._lists.items()):
            if key[0] == norm_type and not (lst.ids.isdisjoint(ids) and not lst.ids.isdisjoint(trained)):
                return lst
        return None

    def _former(self, tensors: list[Tensor]) -> tuple[Any, ...] | None:
        """The key of the list that the script has changed into this one, whose state goes on: it shares
        parameters, and those that it has beside are in no model any more, or frozen."""
        here = set(map(id, tensors))
        trained = {id(p) for m in self._accelerator._models for p in m.parameters() if p.requires_grad}
        for key, lst in self._lists.items():
            if lst.decided and not lst.ids.isdisjoint(here) and not (lst.ids - here) & trained:
                return key
            if lst.decided and lst.ids.isdisjoint(here) and lst.ids.isdisjoint(trained):
                return key  # all of them replaced, or adapters trained in their place
        return None

    @property
    def _may_be_empty(self) -> bool:
        return self._options["stages"] is not None or self._options["process_group"] is not None

    def _drop_dead(self) -> None:
        """Forget the lists of models that the accelerator has forgotten, and the least used of too many."""
        alive = {id(m) for m in self._accelerator._models}
        for key, lst in list(self._lists.items()):
            if any(id(m) not in alive for m in lst.models):
                del self._lists[key]
        while len(self._lists) >= _MOST_LISTS:
            self._lists.popitem(last=False)

    def _strategy_of_one(self) -> Strategy:
        if not isinstance(self._strategy, Strategy):
            assert self._strategy is not None
            return self._strategy()
        if self._decided() and any(True for _ in self._strategy.buffers()):
            raise ValueError(
                f"another list of parameters has been clipped by this {type(self._strategy).__name__}, whose "
                "state belongs to that one. Pass the same parameters in every step, all of them (frozen ones "
                "cost nothing), or pass install() what makes a strategy for each list, as in "
                f"install(accelerator, distclip.{type(self._strategy).__name__})"
            )
        return self._strategy


class _List:
    """One list of parameters that the script clips.

    Attributes:
        number: its place in the order of first clips.
        models: the prepared models that they belong to.
        decided: whether the user's strategy decides, not the call.
    """

    def __init__(
        self,
        number: int,
        tensors: list[Tensor],
        models: list[nn.Module],
        strategy: Strategy,
        on_nonfinite: OnNonfinite,
        options: dict[str, Any],
    ) -> None:
        self.number = number
        self.decided = not isinstance(strategy, AsCalled)
        self._elementwise: Plan | None = None
        self._synchronisation: Synchronisation | None = None
        self.clipper = Clipper([], strategy, on_nonfinite=on_nonfinite, **options)
        self.hold(tensors, models)

    def hold(self, tensors: list[Tensor], models: list[nn.Module]) -> None:
        """From now on it is these."""
        self.tensors, self.ids = tensors, frozenset(map(id, tensors))
        self.models = [m for m in models if any(id(p) in self.ids for p in m.parameters())]
        self._elementwise, self._synchronisation = None, None
        # Made from a list of parameters, the clipper does not know what synchronises them.
        self.clipper.follow(_named(tensors, self.models), self.models)

    def covers(self, optimizer: torch.optim.Optimizer) -> bool:
        return all(id(p) in self.ids for p in parameters_of(optimizer))

    def seems_unsynchronised(self) -> bool:
        """As far as DDP and FSDP tell, alike on every rank and without asking the others."""
        if self._synchronisation is None:
            self._synchronisation = Synchronisation(self.models, self.tensors)
        return self._synchronisation.was_off([t for t in self.tensors if hasattr(t, MANAGED)]) is not None

    def elementwise_plan(self) -> Plan:
        """For changes that need no other rank; the clipper's own plan would ask them."""
        if self._elementwise is None or begun_to_train(self.tensors, self._elementwise.frozen):
            self._elementwise = build_plan(named_parameters(self.tensors), alone=True)
        return self._elementwise


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


def _hook_of(installed: Installed) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    """For torch's list of hooks, which is to keep nothing alive."""
    reference = weakref.ref(installed)

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        target = reference()
        if target is not None:
            target._any_step(optimizer)

    return hook


def _held_by(optimizer: Any) -> Iterator[Tensor]:
    """The parameters of what has been prepared; of a wrapper without groups, of the optimizers in it."""
    if hasattr(optimizer, "param_groups"):
        yield from parameters_of(optimizer)
    else:
        for inner in vars(optimizer).values():
            if isinstance(inner, torch.optim.Optimizer):
                yield from parameters_of(inner)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def _named(tensors: list[Tensor], models: list[nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters with the names that they have in the script's own model; FSDP1's say how they lie."""
    names: dict[int, str] = {}
    for i, model in enumerate(models):
        prefix = f"models[{i}]." if len(models) > 1 else ""
        for p in walk_modules([model]):
            names.setdefault(id(p.tensor), prefix + p.name)
    return [(names.get(id(t), f"parameters[{k}]"), t) for k, t in enumerate(tensors)]
