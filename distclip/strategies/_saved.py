"""A saved state against the strategy that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

_REMEDY = "load it into a strategy made as the one that saved it was, or leave it out to start anew"


class Stateful(Protocol):
    """What is asked of a strategy here."""

    @property
    def sizes(self) -> Mapping[str, str]: ...
    def since_then(self) -> frozenset[str]: ...
    def state_dict(self) -> dict[str, Any]: ...


def require_own(strategy: Stateful, state: Mapping[str, Any], where: str = "") -> None:
    """
    Args:
        where: which strategy within the one that is loaded, ``"links[1]: "``.

    Raises:
        ValueError: it was not saved by such a strategy: says by which, or which size differs.
    """
    name = type(strategy).__name__
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}{state!r} is no state of {name}: expected what its state_dict() returned")
    links = getattr(strategy, "links", None)
    of_links = _by_link(state)
    if links is not None and (of_links or not state) and set(of_links) <= set(range(len(links))):
        for i, link in enumerate(links):
            require_own(link, of_links.get(i, {}), f"{where}links[{i}]: ")
        return
    own = {} if links is not None else strategy.state_dict()
    missing, unknown = set(own) - set(state) - strategy.since_then(), set(state) - set(own)
    if missing or unknown:
        by, differs = saved_by(state), ", ".join(sorted(missing or unknown)[:4])
        if by == name:
            by = f"{name} with other settings ({'it lacks' if missing else 'it also has'} {differs})"
        raise ValueError(f"{where}the state was saved by {by}, this is {_this(strategy)}: {_REMEDY}")
    for key, value in own.items():
        saved = state.get(key, value)
        if not isinstance(value, Tensor) or getattr(saved, "shape", value.shape) == value.shape:
            continue
        argument = strategy.sizes.get(key, key)
        then, now = (tuple(t.shape) if t.dim() != 1 else len(t) for t in (saved, value))
        raise ValueError(
            f"{where}the state of {name} was saved with {argument}={then}, this one has {argument}={now}: "
            f"make it with {argument}={then}, or leave the state out to start anew"
        )


def saved_by(state: Mapping[str, Any]) -> str:
    """Which strategy has such a state, in words."""
    keys = set(state)
    of_links = _by_link(state)
    if of_links:
        inner = (saved_by(of_links[i]) if i in of_links else "…" for i in range(max(of_links) + 1))
        return f"Chain({', '.join(inner)})"
    if not keys:
        return "a strategy without state (GlobalNorm, say)"
    if {"mean", "variance", "first", "seen"} <= keys:
        return "ZClip"
    if {"skips", "losses.values"} & keys:
        return "SkipSpikes"
    if keys == {"history.values", "history.seen"}:
        return "Percentile"
    if keys == {"step", "_extra_state"}:
        return "AdaGC"
    if keys == {"threshold.step"}:
        return "a strategy with a threshold that depends on the step"
    return f"another strategy (one with {', '.join(sorted(keys)[:4])})"


def _this(strategy: Stateful) -> str:
    links = getattr(strategy, "links", None)
    name = type(strategy).__name__
    return name if links is None else f"{name}({', '.join(map(_this, links))})"


def _by_link(state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The states of a chain's links, by position; {} if it is no chain's."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        first, _, rest = str(key).partition(".")
        number, _, name = rest.partition(".")
        if first != "links" or not number.isdigit():
            return {}
        found.setdefault(int(number), {})[name] = value
    return found
