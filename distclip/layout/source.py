"""What a list of parameters is read from, and whether it still holds what was read.

A program changes its parameters after they were first read: it replaces a head, registers a parameter, adds
adapters, loads with ``assign=True``, swaps an optimizer's list. Looking again is cheap, since it compares in
loops inside Python's C code what the source keeps them in: 0.07 µs a parameter, 0.2 where they are too many
for the processor's caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, eq, is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distclip.layout.life import life_of
from distclip.layout.parameters import Parameters, walk_modules
from distclip.torch_private.modules import children_of, held_by, parameters_of

_requires_grad = attrgetter("requires_grad")
_gradient = attrgetter("grad")


class Witness(Protocol):
    """What a source held when it was read."""

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        """Its tensors in order, as often as they occur; None if it holds others by now, or in another
        place."""


def witness_of(parameters: Parameters) -> Witness:
    """``parameters``: not an iterator, which could be read only once."""
    if isinstance(parameters, nn.Module):
        return _OfScripts([parameters]) if _is_scripted(parameters) else _OfModules([parameters])
    if isinstance(parameters, torch.optim.Optimizer):
        return _OfOptimizer(parameters)
    if isinstance(parameters, Tensor):
        return _OfTensors([parameters])
    items = list(parameters)
    if items and all(isinstance(item, nn.Module) for item in items):
        return _OfScripts(items) if any(map(_is_scripted, items)) else _OfModules(items)
    if any(isinstance(item, nn.Module) for item in items):
        return _OfMixture(items)
    return _OfTensors(items)


class _OfModules:
    """The dictionaries of modules, and what they held: the same objects under the same keys?"""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        inside = list({id(m): m for module in modules for m in module.modules()}.values())
        # Whoever loads a whole module into another's __dict__ puts other dictionaries there.
        self._attributes = list(map(vars, inside))
        self._copies = [(dict(parameters_of(m)), dict(children_of(m))) for m in inside]
        # Where a module defines equality in a way of its own, `==` would not tell that it is another one.
        self._odd = any(type(m).__eq__ is not object.__eq__ for m in inside)
        self._tensors = [p.tensor for p in walk_modules(modules)]

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        source: Any = [parameters] if isinstance(parameters, nn.Module) else parameters
        modules = list(source)
        return self._tensors if self._hold(modules) else None

    def _hold(self, modules: list[Any]) -> bool:
        if self._odd or len(modules) != len(self._modules) or not all(map(is_, modules, self._modules)):
            return False
        try:
            # One visit a module, as its memory is what takes the time. `==` of dictionaries asks first
            # whether both hold the same object, and asks tensors for equality only where they do not.
            with _OtherTensor():
                return all(map(eq, map(held_by, self._attributes), self._copies))
        except (_OtherTensorError, KeyError, RuntimeError):
            return False


class _OtherTensorError(Exception):
    pass


class _OtherTensor(TorchFunctionMode):
    """Tensors are asked whether they are equal: they are not the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _OtherTensorError


def _is_scripted(module: nn.Module) -> bool:
    return any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())


class _OfScripts:
    """Modules that ``torch.jit`` keeps outside Python, which have no dictionaries to look at: read anew."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._read = self._walk()

    def _walk(self) -> list[tuple[str, Tensor]]:
        return [(p.name, p.tensor) for p in walk_modules(self._modules)]

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        given: Any = parameters
        source = [given] if isinstance(given, nn.Module) else list(given)
        if len(source) != len(self._modules) or not all(map(is_, source, self._modules)):
            return None
        now = self._walk()
        if len(now) != len(self._read) or any(
            name != other or tensor is not kept
            for (name, tensor), (other, kept) in zip(now, self._read, strict=True)
        ):
            return None
        return [tensor for _, tensor in now]


class _OfTensors:
    """The tensors of a list, by identity; it keeps none of them alive."""

    def __init__(self, items: Sequence[Any]) -> None:
        bare = _bare(items)
        self._ids = list(map(id, bare))
        self._names = _names(items)
        self._gone = False
        me = weakref.ref(self)

        def forget(_: object) -> None:
            if (witness := me()) is not None:
                witness._gone = True  # and its address may be another's

        self._lives = [weakref.ref(life_of(t), forget) for t in bare if isinstance(t, Tensor)]

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        items = [parameters] if isinstance(parameters, Tensor) else list(parameters)  # type: ignore[arg-type]
        bare = _bare(items)
        if self._gone or list(map(id, bare)) != self._ids or _names(items) != self._names:
            return None
        return bare


class _OfOptimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lists = [_OfTensors(_group_items(g)) for g in optimizer.param_groups]

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        if not isinstance(parameters, torch.optim.Optimizer) or self._optimizer() is not parameters:
            return None
        groups = parameters.param_groups
        if len(groups) != len(self._lists):
            return None
        found: list[Tensor] = []
        for group, witness in zip(groups, self._lists, strict=True):
            tensors = witness.tensors(_group_items(group))
            if tensors is None:
                return None
            found += tensors
        return found


class _OfMixture:
    """Modules and tensors, each with a witness of its own."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._parts = [_OfModules([i]) if isinstance(i, nn.Module) else _OfTensors([i]) for i in items]

    def tensors(self, parameters: Parameters) -> list[Tensor] | None:
        items: list[Any] = list(parameters)  # type: ignore[arg-type]
        if len(items) != len(self._parts):
            return None
        found: list[Tensor] = []
        for item, witness in zip(items, self._parts, strict=True):
            is_module = isinstance(item, nn.Module)
            if is_module is not isinstance(witness, _OfModules):
                return None
            tensors = witness.tensors(item if is_module else [item])
            if tensors is None:
                return None
            found += tensors
        return found


def _group_items(group: dict[str, Any]) -> list[Any]:
    names = group.get("param_names")
    return list(zip(names, group["params"], strict=True)) if names else group["params"]


def _bare(items: Iterable[Any]) -> list[Any]:
    return [item[1] if type(item) is tuple and len(item) == 2 else item for item in items]


def _names(items: Iterable[Any]) -> list[Any]:
    return [item[0] for item in items if type(item) is tuple and len(item) == 2]


def begun_to_train(tensors: Sequence[Tensor], frozen: Sequence[int]) -> bool:
    """Whether any of those that did not require a gradient does so now."""
    return any(map(_requires_grad, map(tensors.__getitem__, frozen)))


def have_gradients(tensors: Sequence[Tensor], frozen: Sequence[int]) -> bool:
    """Whether any of those that did not require a gradient has one by now: thawed for a backward pass only,
    as in a GAN, or written by the program itself."""
    return not all(map(is_, map(_gradient, map(tensors.__getitem__, frozen)), repeat(None)))
