"""Strategies as they are written on a command line: ``zclip``, ``percentile(95, multiplier=2)``."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

from distclip import strategies
from distclip.strategies import Strategy

NAMES: dict[str, Callable[..., Any]] = {
    name.lower(): getattr(strategies, name) for name in strategies.__all__ if name != "Strategy"
}


def parse_strategy(text: str) -> Strategy:
    """The strategy that ``text`` describes: a name, or a call of it with numbers, other calls, dicts or None.

    Names are those of the classes, in any case and with or without underscores; ``global`` is short for
    ``GlobalNorm``.

    Raises:
        ValueError: it is no such description, or the strategy does not take these arguments.

    Example:
        >>> parse_strategy("chain(skip_spikes(sigma=8), global(warmup(10, 1, 1000)))")
    """
    try:
        # `global` is a keyword of Python: no name that its parser takes.
        strategy = _value(ast.parse(re.sub(r"\bglobal\b", "GlobalNorm", text.strip()), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, KeyError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error.args[0] if error.args else error
        raise ValueError(f"strategy {text!r}: {reason}") from error
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy {text!r}: not a strategy; known are {', '.join(sorted(NAMES))}")
    return strategy


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in ("inf", "infinity"):
        return math.inf
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        arguments = [_value(a) for a in node.args]
        keywords = {k.arg: _value(k.value) for k in node.keywords if k.arg is not None}
        return _known(_word(node.func))(*arguments, **keywords)
    if isinstance(node, ast.Name | ast.Attribute):
        return _known(_word(node))()
    return ast.literal_eval(node)


def _word(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


def _known(name: str) -> Callable[..., Any]:
    key = name.lower().replace("_", "")
    if key not in NAMES:
        raise ValueError(f"unknown name {name!r}; known are {', '.join(sorted(NAMES))}")
    return NAMES[key]
