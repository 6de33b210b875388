"""How this rank is configured, in words that are the same on every rank that is configured alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from distclip.strategies._base import Strategy

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def settings_of(strategy: Strategy, options: Mapping[str, object], *, with_state: bool) -> dict[str, str]:
    """By field: the strategy with its arguments, what was passed beside it and, if asked for, its state."""
    words = {
        "strategy": described(strategy),
        "options": ", ".join(f"{k}={_word(v)}" for k, v in options.items()),
    }
    if with_state:
        words["state"] = _state(strategy)
    return words


def described(strategy: Strategy) -> str:
    """The class, and every public attribute that is a plain value; of the strategies and schedules inside
    too."""
    own = {k: v for k, v in vars(strategy).items() if not k.startswith("_") and k != "training"}
    inside = dict(strategy.named_children())
    words = [f"{k}={_word(v)}" for k, v in sorted(own.items()) if _word(v)]
    for name, module in inside.items():
        if isinstance(module, Strategy):
            words.append(f"{name}={described(module)}")
        else:
            plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
            words += [f"{name}.{k}={_word(v)}" for k, v in sorted(plain.items()) if _word(v)]
            words += [
                f"{name}.{k}={described(m)}" for k, m in module.named_children() if isinstance(m, Strategy)
            ]
    hidden = [
        f"{name}={_values(buffer)}"
        for name, buffer in strategy.named_buffers(recurse=False)
        if name in strategy._non_persistent_buffers_set and name.startswith("_")  # a setting, not state
    ]
    return f"{type(strategy).__name__}({', '.join(words + hidden)})"


def _word(value: Any) -> str:
    """Never an address, which differs between ranks that are configured alike."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list | frozenset | set):
        words = list(map(_word, value))
        return f"({', '.join(sorted(words) if isinstance(value, frozenset | set) else words)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_word(k)}: {_word(v)}' for k, v in value.items())}}}"
    if is_dataclass(value):
        inside = ", ".join(f"{f.name}={_word(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({inside})"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _values(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(f"{v:.9g}" for v in tensor.flatten().tolist()) + "]"


def _state(strategy: Strategy) -> str:
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
