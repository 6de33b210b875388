"""What a Clipper saves, and how another one goes on from it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from distclip.step.clipping import Clipping
from distclip.strategies._base import Strategy


def state_of(clipping: Clipping, steps: int) -> dict[str, Any]:
    strategy = clipping.strategy
    return {
        "saved_by": {"strategy": _names(strategy), "settings": told(strategy)},
        "strategy": strategy.state_dict(),
        "micro_batches": clipping.window.position,
        "steps": steps,
    }


def load(clipping: Clipping, state: Any) -> int:
    """See ``Clipper.load_state_dict``; returns the number of steps."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}: expected what clipper.state_dict() returned")
    strategy = clipping.strategy
    own = told(strategy)
    if not isinstance(state.get("strategy"), Mapping):
        keys = ", ".join(map(repr, list(state)[:4])) or "nothing"
        raise ValueError(
            f"state holds {keys} and no 'strategy': expected what clipper.state_dict() returned. (Is it "
            "that of the model or the optimizer, or empty?)"
        )
    try:
        position, steps = int(state.get("micro_batches", 0)), int(state.get("steps", 0))
        saved = dict(state.get("saved_by", {}))  # not by 0.1.0
        was = saved["settings"] if saved else "another strategy, or with other settings"
        names = saved.get("strategy")
        if position < 0 or steps < 0:
            raise ValueError(f"{steps=}, micro_batches={position}")
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"state is not what clipper.state_dict() returned, or has been changed since ({error})"
        ) from error
    if saved and names != _names(strategy):
        raise ValueError(
            f"the state was saved by {was}, this is {own}: make the Clipper with the strategy that it "
            "was saved with, or begin without this state"
        )
    before = copy.deepcopy(strategy.state_dict())
    try:
        strategy.load_state_dict(state["strategy"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        with contextlib.suppress(RuntimeError):
            strategy.load_state_dict(before)
        raise ValueError(
            f"the state does not fit: it was saved by {was}, this is {own}. Make the strategy with the "
            f"settings that it was saved with, or begin without this state. ({_first_line_of(error)})"
        ) from error
    clipping.parameters.agree_on_state()
    clipping.window.close()
    clipping.window.position = position
    return steps


def told(strategy: Strategy) -> str:
    """On one line: ``Chain(SkipSpikes(sigma=6.0, ...), GlobalNorm(max_norm=1.0, norm_type=2.0))``."""
    inner = [told(s) for child in strategy.children() for s in _outermost(child)]
    return f"{type(strategy).__name__}({', '.join(filter(None, [strategy.extra_repr(), *inner]))})"


def _outermost(module: nn.Module) -> list[Strategy]:
    if isinstance(module, Strategy):
        return [module]
    return [s for child in module.children() for s in _outermost(child)]


def _names(strategy: Strategy) -> list[str]:
    """The classes of a strategy and of those inside it."""
    return [type(m).__name__ for m in strategy.modules() if isinstance(m, Strategy)]


def _first_line_of(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
