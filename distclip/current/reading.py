"""What has been read from a source of parameters, to be compared with what is there later."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.layout import declarations
from distclip.layout.declarations import Declared
from distclip.layout.life import life_of
from distclip.layout.parameters import NamedParameter, Parameters, named_parameters
from distclip.strategies._base import Strategy

logger = logging.getLogger("distclip")

_OTHER_GRADIENTS = ("main_grad", "decoupled_grad")  # where Megatron and others keep theirs


class Read:
    """What was read from a source."""

    def __init__(self, parameters: Parameters) -> None:
        self.named = named_parameters(parameters)
        self.names = tuple(p.name for p in self.named)
        self._places = [(p.name, p.optimizer_group) for p in self.named]
        self._lives = [weakref.ref(life_of(p.tensor)) for p in self.named]
        declarations.require_none_pickled(modules_of(parameters))
        self.declared = Declared(self.named)
        self._declarations = [self.declared.of.get(id(p.tensor)) for p in self.named]

    def same_as(self, before: Read) -> bool:
        return (
            self._places == before._places
            and all(ref() is life_of(p.tensor) for ref, p in zip(before._lives, self.named, strict=True))
            and self._declarations == before._declarations
        )

    def require_declarations_kept(self, before: Read) -> None:
        """
        Raises:
            ValueError: something was declared of a parameter object, or of a module, that another has taken
                the place of.
        """
        known = {
            name: declaration
            for name, declaration in zip(before.names, before._declarations, strict=True)
            if declaration is not None
        }
        for p in self.named:
            old = known.get(p.name)
            if old is not None and id(p.tensor) not in self.declared.of:
                raise ValueError(
                    f"another parameter has taken the place of {p.name}, of which was {old.label}: declare "
                    "that of the new one too, or of its module, whose names stay"
                )


def modules_of(parameters: Parameters) -> list[nn.Module]:
    source: Any = parameters if isinstance(parameters, list | tuple) else [parameters]
    return [m for m in source if isinstance(m, nn.Module)]


def require_gradients_in_grad(named: Sequence[NamedParameter]) -> None:
    """
    Raises:
        ValueError: gradients are kept where nothing here reads them.
    """
    for p in named:
        for attribute in _OTHER_GRADIENTS:
            if _is_kept_in(attribute, p.tensor):
                raise ValueError(
                    f"{p.name} has its gradient in .{attribute} and none in .grad, which is what is clipped: "
                    f"set parameter.grad = parameter.{attribute} for each before the clip (Megatron's "
                    "optimizer.prepare_grads() does), or clip the optimizer's own copies, "
                    "optimizer.get_parameters()"
                )


def are_elsewhere(tensors: Sequence[Tensor]) -> bool:
    """Whether any has its gradient where nothing here reads it."""
    return any(_is_kept_in(attribute, t) for attribute in _OTHER_GRADIENTS for t in tensors)


def _is_kept_in(attribute: str, tensor: Tensor) -> bool:
    return tensor.grad is None and isinstance(getattr(tensor, attribute, None), Tensor)


def say_what_changed(before: Sequence[str], now: Sequence[str]) -> None:
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    if (gone or new) and (not dist.is_initialized() or dist.get_rank() == 0):
        parts = [
            f"{len(names)} {word} ({_listed(names)})"
            for word, names in (("new", new), ("gone", gone))
            if names
        ]
        logger.info(
            "the parameters have changed: %s; what was learned of the others goes on", ", ".join(parts)
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """Numbers are made on the CPU, where the default device may be one without memory. (Only there, since
    torch then passes each of its functions through Python.)"""
    cpu = torch.device("cpu")
    return contextlib.nullcontext() if torch.get_default_device() == cpu else cpu


def tells_apart(strategy: Strategy) -> bool:
    """Whether which parameter is which matters to it."""
    return strategy.per_parameter or strategy.per_unit or len(strategy.groups) > 1
