"""How this rank is configured, in words that are the same on every rank that is configured alike."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from distclip.strategies._base import Strategy
from distclip.strategies._threshold import Threshold
from distclip.torch_private.modules import transient_buffers

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


def described(strategy: Strategy, depth: int = 0) -> str:
    """The class, and every attribute that tells something (of a class of ours the public ones); of the
    strategies and schedules inside likewise."""
    return f"{type(strategy).__name__}({', '.join(_words_of_module(strategy, depth))})"


def _words_of_module(module: nn.Module, depth: int) -> list[str]:
    ours = type(module).__module__.startswith("distclip.")
    words = []
    for key, value in sorted(vars(module).items()):
        # Which rank it is on a strategy may know, as long as it decides nothing by it.
        if key not in _OF_MODULES and not (ours and key.startswith("_")) and "rank" not in key:
            words.append(f"{key}={_word(value, depth)}")
    if isinstance(module, Strategy):
        sized = {
            module.sizes[name]: buffer for name, buffer in module.named_buffers() if name in module.sizes
        }
        words += [f"{argument}={len(buffer)}" for argument, buffer in sized.items()]
    for name, child in module.named_children():
        if isinstance(child, Strategy):
            words.append(f"{name}={described(child, depth)}")
        elif isinstance(child, Threshold) and not isinstance(child.value, nn.Module):
            words.append(f"{child.name}={_word(child.value, depth)}")
        else:
            words.append(f"{name}={type(child).__name__}")
            words += [f"{name}.{word}" for word in _words_of_module(child, depth)]
    words += [
        f"{name}={_values(buffer)}"
        for name, buffer in module.named_buffers(recurse=False)
        if name in transient_buffers(module) and name.startswith("_")  # a setting, not state
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
        return described(value, depth + 1)
    if isinstance(value, tuple | list | frozenset | set):
        words = list(map(inside, value))
        return f"({', '.join(sorted(words) if isinstance(value, frozenset | set) else words)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{inside(k)}: {inside(v)}' for k, v in value.items())}}}"
    if isinstance(value, torch.Tensor):
        tells = type(value) is torch.Tensor and value.numel() <= _FEW and not value.is_meta
        return _values(value) if tells else "Tensor"
    if isinstance(value, MethodType):
        return f"{inside(value.__self__)}.{value.__name__}"
    if isinstance(value, FunctionType):
        return _function(value, inside)
    if isinstance(value, functools.partial):
        return f"partial({inside(value.func)}, {inside(value.args)}, {inside(value.keywords)})"
    if getattr(value, "size", None) == 1 and hasattr(value, "dtype") and hasattr(value, "item"):  # of NumPy
        return repr(value.item())
    name: str = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, nn.Module | type) or not (callable(value) or is_dataclass(value)):
        return name
    # A schedule may be an object.
    told = ", ".join(f"{k}={inside(v)}" for k, v in sorted(getattr(value, "__dict__", {}).items()))
    return f"{name}({told})"


def _function(function: FunctionType, inside: Callable[[Any], str]) -> str:
    """Its name, what it has caught and, since all lambdas are called alike, a hash of its code."""
    code, caught = function.__code__, {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty as yet
            caught[name] = cell.cell_contents
    caught |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    caught |= function.__kwdefaults__ or {}
    told = ", ".join(f"{name}={inside(value)}" for name, value in caught.items())
    return f"{function.__qualname__}[{_hash_of(code)}]({told})"


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
