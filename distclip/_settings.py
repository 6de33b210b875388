"""How this rank is configured, in words that are the same on every rank that is configured alike."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from distclip.strategies._base import Strategy

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype)
_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has
_DEEPEST = 4  # a schedule may refer to itself
_FEW = 64  # numbers of a tensor that is kept as a setting


def settings_of(strategy: Strategy, options: Mapping[str, object]) -> dict[str, str]:
    """By field: the strategy with its arguments, and what was passed beside it."""
    return {
        "strategy": described(strategy),
        "options": ", ".join(f"{k}={_word(v)}" for k, v in options.items()),
    }


def described(strategy: Strategy) -> str:
    """The class, and every public attribute that tells something (of a class that is not ours, the others
    too); of the strategies and schedules inside likewise."""
    return f"{type(strategy).__name__}({', '.join(_words_of_module(strategy))})"


def _words_of_module(module: nn.Module) -> list[str]:
    ours = type(module).__module__.startswith("distclip.")
    own = {k: v for k, v in vars(module).items() if k not in _OF_MODULES and not (ours and k.startswith("_"))}
    words = [f"{k}={_word(v)}" for k, v in sorted(own.items())]
    for name, child in module.named_children():
        if isinstance(child, Strategy):
            words.append(f"{name}={described(child)}")
        else:
            words += [f"{name}.{word}" for word in _words_of_module(child)]
    words += [
        f"{name}={_values(buffer)}"
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and name.startswith("_")  # a setting, not state
    ]
    return words


def _word(value: Any, depth: int = 0) -> str:
    """Never an address, which differs between ranks that are configured alike."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth > _DEEPEST:
        return "…"
    inside = partial(_word, depth=depth + 1)
    if isinstance(value, Strategy):
        return described(value) if depth == 0 else type(value).__qualname__
    if isinstance(value, tuple | list | frozenset | set):
        words = list(map(inside, value))
        return f"({', '.join(sorted(words) if isinstance(value, frozenset | set) else words)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{inside(k)}: {inside(v)}' for k, v in value.items())}}}"
    if isinstance(value, torch.Tensor):
        return _values(value) if type(value) is torch.Tensor and value.numel() <= _FEW else "Tensor"
    if isinstance(value, nn.Module | type | weakref.ref):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, MethodType):
        return f"{inside(value.__self__)}.{value.__name__}"
    if isinstance(value, FunctionType):
        return _function(value, inside)
    if isinstance(value, functools.partial):
        return f"partial({inside(value.func)}, {inside(value.args)}, {inside(value.keywords)})"
    if is_dataclass(value) or (callable(value) and hasattr(value, "__dict__")):  # a schedule may be an object
        words = (
            [f"{k}={inside(v)}" for k, v in sorted(vars(value).items())] if hasattr(value, "__dict__") else []
        )
        return f"{type(value).__qualname__}({', '.join(words)})"
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "size", 0) == 1:  # of NumPy
        return repr(value.item())
    return getattr(value, "__qualname__", type(value).__qualname__)


def _function(function: FunctionType, inside: Callable[[Any], str]) -> str:
    """Its name, what it has caught and, since all lambdas are called alike, a hash of its code."""
    code, caught = function.__code__, {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty as yet
            caught[name] = cell.cell_contents
    words = [f"{name}={inside(value)}" for name, value in caught.items()]
    words += [inside(function.__defaults__ or ()), inside(function.__kwdefaults__ or {})]
    return (
        f"{function.__qualname__}[{_hash_of(code)}]({', '.join(w for w in words if w not in ('()', '{}'))})"
    )


def _hash_of(code: CodeType) -> str:
    found = hashlib.blake2b(code.co_code, digest_size=4)
    for constant in code.co_consts:
        found.update((_hash_of(constant) if isinstance(constant, CodeType) else _word(constant)).encode())
    found.update(" ".join(code.co_names).encode())
    return found.hexdigest()


def _values(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(f"{v:.9g}" for v in tensor.flatten().tolist()) + "]"


def state_of(strategy: Strategy) -> str:
    """What it remembers, in short; where ranks would quote thousands of numbers, their number and a hash."""
    found = hashlib.blake2b(digest_size=6)
    count, shown = 0, []
    for name, value in strategy.state_dict().items():
        if isinstance(value, torch.Tensor):
            numbers = value.detach().cpu().flatten().tolist()
        else:
            numbers = [repr(value)]
        found.update(f"{name}{numbers}".encode())
        count += len(numbers)
        if len(numbers) == 1 and isinstance(numbers[0], int | float) and math.isfinite(numbers[0]):
            shown.append(f"{name}={numbers[0]:.6g}")
    if not count:
        return "none"
    return f"{', '.join(shown[:6])} ({count} numbers, {found.hexdigest()})"
