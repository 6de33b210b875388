"""From what a user passes as ``parameters`` to named, unique parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from distclip._fsdp1 import annotate_fsdp1
from distclip._placement import whole_shape, whole_units

Parameters: TypeAlias = (
    nn.Module | torch.optim.Optimizer | Tensor | Iterable[Tensor | tuple[str, Tensor] | nn.Module]
)
"""What every public function accepts: a Module, several Modules, an Optimizer, a Tensor, or an
iterable of Tensors or of ``(name, Tensor)``."""


@dataclass(frozen=True)
class ParameterInfo:
    """What a strategy may know of a parameter: its name, its whole shape, its optimizer group (0 without),
    and how many rows it has (1 where it has one dim or none)."""

    name: str
    shape: torch.Size
    optimizer_group: int = 0
    units: int = 1


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
        return list(parameters.parameters())
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
    if isinstance(parameters, Tensor):
        yield NamedParameter("parameter", parameters)
    elif isinstance(parameters, nn.Module):
        yield from _walk_module("", parameters)
    elif isinstance(parameters, torch.optim.Optimizer):
        for g, group in enumerate(parameters.param_groups):
            names = group.get("param_names")
            for i, tensor in enumerate(group["params"]):
                yield NamedParameter(names[i] if names else f"param_groups[{g}][{i}]", tensor, g)
    elif isinstance(parameters, Iterable) and not isinstance(parameters, str | bytes | dict):
        for i, item in enumerate(parameters):
            if isinstance(item, nn.Module):
                yield from _walk_module(f"modules[{i}].", item)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                yield NamedParameter(item[0], item[1])
            else:
                yield NamedParameter(f"parameters[{i}]", item)
    else:
        raise TypeError(
            f"parameters={type(parameters).__name__}: expected a Module, several Modules, an Optimizer, "
            "a Tensor, or an iterable of Tensors or of (name, Tensor)"
        )


def _walk_module(prefix: str, module: nn.Module) -> Iterator[NamedParameter]:
    annotate_fsdp1(module)
    for name, tensor in module.named_parameters():
        yield NamedParameter(prefix + name.replace("_fsdp_wrapped_module.", ""), tensor)


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
