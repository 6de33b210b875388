"""Clip by value or by the norm of each parameter while backward runs, before all gradients are there.

Three places to do it, which mean different things:

====================================  ==========================================  =======================
what                                  plain model and DDP                         FSDP2 (``fully_shard``)
====================================  ==========================================  =======================
``when="gradient"``                   what one backward pass adds, before it is   runs no such hook:
                                      added to ``.grad``; before DDP averages     ``ValueError``
``when="accumulated"``                ``.grad`` after adding; still before DDP    ``.grad`` after the
                                      averages                                    average, sharded
:func:`ddp_clip_hook`                 ``.grad`` after adding and averaging        (for DDP only)
====================================  ==========================================  =======================

With gradients 4 and 0 on two DDP ranks and a bound of 1, clipping before the average gives
mean(1, 0) = 0.5, clipping after it clip(2) = 1. The first bounds what any one rank can contribute; the second
is what one device with the whole batch would do, and what ``distclip.Clipper`` does after backward.

- Micro-batches: ``"gradient"`` clips each one's contribution. ``"accumulated"`` clips the sum so far, in
  every backward pass. Under FSDP2 without gradient synchronisation nothing runs until the last one.
- Order: torch runs the hooks of a parameter in the order in which they were registered. A hook of yours that
  was registered before sees the gradient unclipped, one registered after sees it clipped.
- Norms are those of the whole parameter. A sharded one (DTensor, or ``distclip.declare``) is reduced over its
  shard group inside the hook: one all-reduce of one number per parameter and sharded axis, in the order of
  backward. For many parameters ``distclip.Clipper(model, distclip.PerParameter(max_norm))`` is cheaper: one
  all-reduce in all. A plain parameter counts as whole; here nobody compares it with other ranks.
- Parameters that are replaced, added or unfrozen later have no hook yet. Of modules, not of lists, this is
  found at their next forward pass, and from then on the hooks are theirs; under FSDP2 register anew.
- NaN stays NaN. An infinite element becomes the bound by value, and NaN by norm, as with torch.
- Register after ``fully_shard`` (which replaces the parameters), and pass FSDP1 models as modules, so that
  they can be refused: FSDP1 runs no hooks of its parameters.
- Not differentiable: not for ``backward(create_graph=True)``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip import kernels
from distclip.decide.transfer import bound_on
from distclip.layout.averaging import after_averaging
from distclip.layout.declarations import Declared
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source, named_parameters
from distclip.layout.placement import PlacementReader
from distclip.layout.source import begun_to_train, witness_of
from distclip.layout.synchronisation import is_fsdp2
from distclip.measure.gradients import Gradients
from distclip.measure.single import Single, coefficient_to, norm_from, sums_of
from distclip.strategies._base import require_bound, require_norm_type

When: TypeAlias = Literal["gradient", "accumulated"]

_EPS = 1e-6  # added to norms before dividing, as everywhere


class Handle:
    """Hooks that are registered. Removing them twice is removing them once; keeps no parameter alive.

    Also a context manager, which removes them at its end.

    Example:
        >>> with distclip.hooks.clip_value(model, 0.5):
        ...     loss.backward()
    """

    def __init__(self, removers: Sequence[Callable[[], None]]) -> None:
        self._removers = list(removers)

    def remove(self) -> None:
        """Take every hook away."""
        while self._removers:
            self._removers.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def clip_value(parameters: Parameters, clip_value: float, *, when: When = "gradient") -> Handle:
    """Clamp gradient elements to ``[-clip_value, clip_value]`` as they arrive; complex ones by magnitude.

    Args:
        parameters: a Module, several Modules, an Optimizer, a Tensor, or an iterable of Tensors or of
            ``(name, Tensor)``. Those that require no gradient are left out.
        clip_value: the bound, ≥ 0.
        when: ``"gradient"`` (each backward pass's contribution; one copy of it) or ``"accumulated"``
            (``.grad``, in place). See the table above.

    Raises:
        ValueError: an argument cannot be meant, or the gradient of a parameter cannot be clipped in a hook
            (FSDP1, ``partial_over=`` and ``tied_over=`` declarations). From backward: ``"gradient"`` under
            FSDP2.

    Example:
        >>> handle = distclip.hooks.clip_value(model, 0.5)
        >>> loss.backward()
        >>> handle.remove()
    """
    return _register(parameters, _ByValue(require_bound("clip_value", clip_value)), when)


def clip_norm(
    parameters: Parameters, max_norm: float, *, norm_type: float | str = 2.0, when: When = "gradient"
) -> Handle:
    """Scale each parameter's gradient so that its own norm is at most ``max_norm``, as it arrives.

    .. math:: g_i \\leftarrow g_i \\cdot \\min(1, \\text{max\\_norm} / (\\|g_i\\|_p + 10^{-6}))

    Args:
        parameters, when: as for :func:`clip_value`.
        max_norm: largest allowed norm of each parameter's gradient, ≥ 0.
        norm_type: p, one of 0.5, 1, 2, 3, ∞.

    Raises:
        ValueError: as :func:`clip_value`.

    Example:
        >>> with distclip.hooks.clip_norm(model, 1.0, when="accumulated"):
        ...     loss.backward()
    """
    return _register(
        parameters, _ByNorm(require_bound("max_norm", max_norm), require_norm_type(norm_type)), when
    )


def ddp_clip_hook(
    model: DistributedDataParallel,
    *,
    clip_value: float | None = None,
    max_norm: float | None = None,
    norm_type: float | str = 2.0,
) -> Handle:
    """A communication hook for DDP that averages as DDP does and then clips, bucket by bucket.

    The norm is that of each parameter. No further collective: after averaging all ranks hold the same.

    DDP takes one communication hook in its life and cannot give it back. After removal the hook stays and
    averages, as DDP does without one; it refers to no model, parameter or other object of yours, and a later
    ``ddp_clip_hook`` on the same model uses it again.

    Args:
        model: DDP, without a communication hook of your own.
        clip_value: clamp elements to ``[-clip_value, clip_value]``, ≥ 0. Either this,
        max_norm: or scale each parameter's gradient to at most this norm, ≥ 0,
        norm_type: of order p, one of 0.5, 1, 2, 3, ∞.

    Raises:
        TypeError: ``model`` is not DDP.
        ValueError: not exactly one of ``clip_value`` and ``max_norm``, one that cannot be meant, a hook of
            distclip or of someone else that is there already, or ``max_norm`` where the ranks that DDP
            averages over are not the only ones that hold a parameter (tensor parallelism).

    Example:
        >>> model = DistributedDataParallel(model)
        >>> handle = distclip.hooks.ddp_clip_hook(model, clip_value=0.5)
    """
    if (clip_value is None) == (max_norm is None):
        raise ValueError(f"{clip_value=}, {max_norm=}: pass one of them")
    if clip_value is not None:
        by_value = _ByValue(require_bound("clip_value", clip_value))
        return Handle([after_averaging(model, lambda bucket: by_value.clip(_filled(bucket))).remove])
    by_norm = _ByNorm(require_bound("max_norm", max_norm or 0.0), require_norm_type(norm_type))
    if isinstance(model, DistributedDataParallel):
        require_whole(model)
    return Handle([after_averaging(model, lambda bucket: by_norm.clip_each(_filled(bucket))).remove])


def require_whole(model: DistributedDataParallel) -> None:
    """
    Raises:
        ValueError: a rank holds only a part of a parameter, so its norm would need other ranks.
    """
    named = named_parameters(model)
    read = PlacementReader(Declared(named).of)
    for name, parameter, _ in named:
        placement = read(name, parameter)
        if placement.shards or placement.partial or placement.tied:
            raise ValueError(
                f"{name} is {placement.label}: what DDP averages is only a part of its gradient, so it "
                "cannot be clipped by norm there. Use distclip.Clipper after backward."
            )


def _filled(bucket: dist.GradBucket) -> list[Tensor]:
    return [gradient for gradient in bucket.gradients() if gradient.numel()]


@dataclass(frozen=True)
class _ByValue:
    bound: float

    def __call__(self, gradients: Gradients, single: Single) -> None:
        for bucket in gradients.buckets:
            self.clip(bucket.tensors)

    def clip(self, tensors: list[Tensor]) -> None:
        if tensors:
            kernels.clamp_(tensors, bound_on(tensors[0].device, self.bound))


@dataclass(frozen=True)
class _ByNorm:
    max_norm: float
    norm_type: float

    def __call__(self, gradients: Gradients, single: Single) -> None:
        norm = single.norm(single.power_sums(gradients, self.norm_type), self.norm_type)
        coefficient = coefficient_to(norm, self.max_norm, _EPS)
        if coefficient.device.type == "cpu" and coefficient.item() == 1:
            return
        for bucket in gradients.buckets:
            kernels.scale_(bucket.tensors, coefficient)

    def clip_each(self, tensors: list[Tensor]) -> None:
        """Tensors that this rank holds whole, each by its own norm."""
        if tensors:
            wide = tensors[0].dtype in (torch.float64, torch.complex128)
            distance = kernels.distance(self.norm_type) if wide else 0
            norms = norm_from(sums_of(tensors, self.norm_type, distance), self.norm_type)
            kernels.scale_each_(tensors, coefficient_to(norms, self.max_norm, _EPS))


def _register(parameters: Parameters, clip: _ByValue | _ByNorm, when: When) -> Handle:
    if when not in ("gradient", "accumulated"):
        raise ValueError(f"{when=}: expected 'gradient' or 'accumulated'")
    return Handle([_Registered(freeze_source(parameters), clip, when).remove])


class _Registered:
    """The hooks of a source's parameters; keeps none alive. Where it is of modules, each of their forward
    passes looks whether they hold other parameters by now, or others train: then the hooks are theirs."""

    def __init__(self, source: Parameters, clip: _ByValue | _ByNorm, when: When) -> None:
        self._clip, self._when = clip, when
        self._handles: list[Any] = []
        self.register(source)
        parts: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
        modules = [m for m in parts if isinstance(m, nn.Module)]
        # FSDP2 puts others in the place of sharded parameters between forward and backward.
        sharded = any(is_fsdp2(m) for module in modules for m in module.modules())
        self._looking: list[Any] = []
        if len(modules) == len(parts) and not sharded:
            look = _Look(modules, self)
            self._looking = [m.register_forward_pre_hook(look, prepend=True) for m in modules]

    def register(self, source: Parameters) -> None:
        """In place of those that are there."""
        named = named_parameters(source)
        training = {id(p.tensor): p for p in named if p.tensor.requires_grad}
        singles = [(p.tensor, Single(p)) for p in training.values()]  # raises before any hook is there
        _remove(self._handles)
        self.frozen = [i for i, p in enumerate(named) if not p.tensor.requires_grad]
        for tensor, single in singles:
            if self._when == "accumulated":
                self._handles.append(_on_accumulated(tensor, _accumulated_hook(single, self._clip)))
                continue
            arrived = _Arrived()
            hook = _gradient_hook(single, self._clip, arrived)
            self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
            if isinstance(tensor, DTensor):
                self._handles.append(_on_accumulated(tensor, _guard(single, arrived)))

    def remove(self) -> None:
        _remove(self._handles)
        _remove(self._looking)


class _Look:
    """A hook of the modules, which own it and are not kept alive by it."""

    def __init__(self, modules: list[nn.Module], registered: _Registered) -> None:
        self._modules, self._registered = list(map(weakref.ref, modules)), weakref.ref(registered)
        self._witness = witness_of(bare_tensors(modules))

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        registered = self._registered()
        modules = [m for ref in self._modules if (m := ref()) is not None]
        if registered is None or torch.compiler.is_compiling() or len(modules) < len(self._modules):
            return
        tensors = bare_tensors(modules)
        if self._witness.tensors(tensors) is None or begun_to_train(tensors, registered.frozen):
            registered.register(modules)
            self._witness = witness_of(tensors)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _on_accumulated(tensor: Tensor, hook: Callable[[Tensor], None]) -> Any:
    return tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _accumulated_hook(single: Single, clip: _ByValue | _ByNorm) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hook(parameter: Tensor) -> None:
        gradients = single.collect(parameter)
        clip(gradients, single)
        gradients.commit()

    return hook


@dataclass
class _Arrived:
    """Whether the tensor hook of a parameter has ever run."""

    yes: bool = False


def _gradient_hook(
    single: Single, clip: _ByValue | _ByNorm, arrived: _Arrived
) -> Callable[[Tensor], Tensor | None]:
    @torch.no_grad()
    def hook(gradient: Tensor) -> Tensor | None:
        arrived.yes = True
        # A stand-in for the parameter: the hook's argument must not be changed, and is no .grad yet.
        holder = gradient.detach()
        holder.grad = gradient.detach().clone()
        gradients = single.collect(holder)
        clip(gradients, single)
        gradients.commit()
        return holder.grad

    return hook


def _guard(single: Single, arrived: _Arrived) -> Callable[[Tensor], None]:
    """FSDP2 sets the gradient of a sharded parameter without autograd, so without tensor hooks."""

    def hook(parameter: Tensor) -> None:
        if not arrived.yes:
            raise ValueError(
                f'{single.name}: when="gradient" cannot work under FSDP2, which runs no tensor hook of a '
                'sharded parameter. Use when="accumulated", which clips after the average.'
            )

    return hook
