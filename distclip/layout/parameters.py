"""From what a user passes as ``parameters`` to named, unique parameters."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from distclip.decide.parameter_info import ParameterInfo
from distclip.layout.fsdp1 import annotate_fsdp1
from distclip.layout.placement import whole_shape, whole_units
from distclip.torch_private.modules import CHILDREN, WRAPPERS, children_of, parameters_of, wrapper_classes

Parameters: TypeAlias = (
    nn.Module | torch.optim.Optimizer | Tensor | Iterable[Tensor | tuple[str, Tensor] | nn.Module]
)
"""What every public function accepts: a Module, several Modules, an Optimizer, a Tensor, or an
iterable of Tensors or of ``(name, Tensor)``."""


class NamedParameter(NamedTuple):
    """A parameter and what it is called."""

    name: str
    tensor: Tensor
    optimizer_group: int = 0

    @property
    def info(self) -> ParameterInfo:
        shape, units = whole_shape(self.tensor), whole_units(self.tensor)
        return ParameterInfo(self.name, torch.Size(shape), self.optimizer_group, units)


def freeze_source(parameters: Parameters, *, may_be_empty: bool = False) -> Parameters:
    """Make ``parameters`` readable more than once: an iterator becomes a list, all else stays.

    An iterator that yields nothing was most likely consumed before (``params = model.parameters()``
    given to the optimizer first), which would silently clip nothing: it is a ``ValueError``, unless
    ``may_be_empty`` says that a rank may really hold nothing.
    """
    if isinstance(parameters, Iterator):
        parameters = list(parameters)
        if not parameters and not may_be_empty:
            raise ValueError(
                "parameters is an iterator that yields nothing: probably it was consumed before, as in "
                "`params = model.parameters(); SGD(params); clip_grad_norm_(params, 1.0)`. Pass the "
                "module itself, or a list. (A rank that really holds no parameter passes [].)"
            )
    return parameters


def bare_tensors(parameters: Parameters) -> list[Tensor]:
    """The tensors of ``parameters`` in order, quickly: unchecked, and as often as they occur."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        found: list[Tensor] = list(parameters.parameters())
        if all(map(isinstance, found, repeat(nn.Parameter))):  # FSDP1 may show views in their place
            return found
        return [p.tensor for p in _walk(parameters)]
    if isinstance(parameters, list | tuple) and all(isinstance(p, Tensor) for p in parameters):
        return list(parameters)
    return [p.tensor for p in _walk(parameters)]


def named_parameters(parameters: Parameters) -> list[NamedParameter]:
    """The parameters of ``parameters``, as :func:`bare_tensors` has them, each with a name that all ranks
    share.

    Raises:
        ValueError: gradients or non-leaf tensors were passed where parameters are meant.
        TypeError: something that is no parameter at all was passed.
    """
    named = list(_walk(parameters))
    for parameter in named:
        _require_parameter(parameter)
    return named


def _walk(parameters: Parameters) -> Iterator[NamedParameter]:
    given = _GivenNames()
    if isinstance(parameters, Tensor):
        yield NamedParameter("parameter", parameters)
    elif isinstance(parameters, nn.Module):
        yield from walk_modules([parameters])
    elif isinstance(parameters, torch.optim.Optimizer):
        for g, group in enumerate(parameters.param_groups):
            names = group.get("param_names")
            for i, tensor in enumerate(group["params"]):
                name = given(names[i], tensor) if names else f"param_groups[{g}][{i}]"
                yield NamedParameter(name, tensor, g)
    elif isinstance(parameters, Iterable) and not isinstance(parameters, str | bytes | dict):
        for i, item in enumerate(parameters):
            if isinstance(item, nn.Module):
                yield from _walk_module(f"modules[{i}].", item)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                yield NamedParameter(given(item[0], item[1]), item[1])
            else:
                yield NamedParameter(f"parameters[{i}]", item)
    else:
        remedy = ": pass its items(), where its values are parameters" if isinstance(parameters, dict) else ""
        raise TypeError(
            f"parameters={type(parameters).__name__}: expected a Module, several Modules, an Optimizer, "
            f"a Tensor, or an iterable of Tensors or of (name, Tensor){remedy}"
        )


def walk_modules(modules: Sequence[nn.Module]) -> Iterator[NamedParameter]:
    """The parameters of modules, named as they are in the user's own: one module, or several."""
    if len(modules) == 1:
        yield from _walk_module("", modules[0])
        return
    for i, module in enumerate(modules):
        yield from _walk_module(f"modules[{i}].", module)


def _hides(module: nn.Module, child: str) -> bool:
    """Whether the name of this child is a wrapper's, and no part of the names in the user's module."""
    return child in WRAPPERS and isinstance(module, wrapper_classes(child, sys.modules))


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``module`` and those inside it, each once, in the order of :meth:`torch.nn.Module.named_modules`: the
    prefix of what each holds, without that of any wrapper."""
    seen: set[int] = set()
    waiting = [(prefix, module)]
    while waiting:
        path, current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield path, current
        children = [
            (path if _hides(current, name) else f"{path}{name}.", child)
            for name, child in children_of(current).items()
            if child is not None
        ]
        waiting.extend(reversed(children))


def _walk_module(prefix: str, module: nn.Module) -> Iterator[NamedParameter]:
    own = annotate_fsdp1(module)
    seen: set[int] = set()
    for path, current in named_modules(module, prefix):
        held: dict[str, Any] = parameters_of(current)
        if own:  # FSDP1 may have put views in their place: between a forward pass and its backward
            held = held | {n: p for n in held if (p := own.get((id(current), n))) is not None}
        for name, tensor in held.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield NamedParameter(path + name, tensor)


def order_in_modules(tensors: Sequence[Tensor]) -> list[tuple[int, str]] | None:
    """Of tensors that came as a bare list: which of them each is in the order of the module that holds them
    all, and its name there; None where there is no such module, or no two tensors could be taken for each
    other.

    So ranks can tell that their lists are in another order, though every list calls its first
    ``parameters[0]``. (The module is found by the garbage collector; its outer wrappers, which may differ,
    change no order.)
    """
    kinds = {(t.shape, t.dtype) for t in tensors}
    if len(kinds) == len(tensors):
        return None
    wanted = {id(t) for t in tensors}
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    inside = {id(child) for module in modules for child in children_of(module).values()}
    for module in modules:
        if id(module) in inside:
            continue
        named = [p for p in walk_modules([module]) if id(p.tensor) in wanted]
        if len(named) == len(wanted):
            place = {id(p.tensor): (k, p.name) for k, p in enumerate(named)}
            return [place[id(t)] for t in tensors]
    return None


class _GivenNames:
    """Names that the program has read itself, from ``named_parameters()`` of a wrapped module say.

    The wrapper may be gone by now, but for DDP, without which there is nothing to clip together. So a part
    called ``module`` goes where a living wrapper is found that put it there, and the others, of which nobody
    names an attribute by chance, unless a module of the user's own is found to have it.
    """

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[list[str], bool]]] | None = None

    def __call__(self, name: str, tensor: Tensor) -> str:
        parts = name.split(".")
        if WRAPPERS.keys().isdisjoint(parts):
            return name
        if self._parts is None:
            self._parts = _parts_of_wrappers()
        hidden = {i for i, part in enumerate(parts) if part in WRAPPERS and part != "module"}
        for end, is_hidden in self._parts.get(id(tensor), ()):
            if parts[-len(end) :] == end:
                (hidden.add if is_hidden else hidden.discard)(len(parts) - len(end))
        return ".".join(part for i, part in enumerate(parts) if i not in hidden)


def _parts_of_wrappers() -> dict[int, list[tuple[list[str], bool]]]:
    """By the id of a parameter: ends of its names that begin with what a wrapper's attribute is called, and
    whether it is a wrapper's (and not the user's). Found by the garbage collector."""
    found: dict[int, list[tuple[list[str], bool]]] = {}
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        for attribute in WRAPPERS.keys() & vars(module).get(CHILDREN, {}).keys():
            is_hidden, child = _hides(module, attribute), children_of(module)[attribute]
            if child is None:
                continue
            for name, tensor in child.named_parameters(remove_duplicate=False):
                found.setdefault(id(tensor), []).append(([attribute, *name.split(".")], is_hidden))
    return found


def ddp_modules() -> list[nn.parallel.DistributedDataParallel]:
    """All that there are in this process, found by the garbage collector, as parameters do not know
    theirs."""
    ddp = nn.parallel.DistributedDataParallel
    everything = gc.get_objects()
    kinds = tuple(kind for kind in set(map(type, everything)) if issubclass(kind, ddp))
    return [o for o in everything if type(o) in kinds] if kinds else []


def _require_parameter(parameter: NamedParameter) -> None:
    tensor, name = parameter.tensor, parameter.name
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a parameter (a Tensor)")
    if isinstance(tensor, nn.Parameter):
        return
    if not tensor.requires_grad and tensor.grad is None:
        raise ValueError(
            f"{name} (shape {tuple(tensor.shape)}) is a plain tensor that requires no gradient and has "
            "none: a gradient seems to have been passed where the parameter is meant. Pass the "
            "parameters themselves; distclip reads their .grad."
        )
    if not tensor.is_leaf and not tensor.retains_grad:
        raise ValueError(
            f"{name} (shape {tuple(tensor.shape)}) is not a leaf tensor, so backward leaves no .grad on "
            "it: pass the parameters that it was computed from, or call retain_grad() on it."
        )
