"""Who uses what: a strategy with state belongs to one clipper, and a model needs no new one each step."""

from __future__ import annotations

import gc
import logging
import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor

from distclip.inspection.advice import is_main_rank
from distclip.layout.life import Life, life_of
from distclip.strategies._base import Strategy
from distclip.torch_private.modules import persistent_buffers

logger = logging.getLogger("distclip")

_owners: weakref.WeakKeyDictionary[Strategy, weakref.ref[Any]] = weakref.WeakKeyDictionary()

_OFTEN = 4
"""New clippers in a row for the same parameters, each used once, before it is said that one would do."""


_clock = count()


class Usage:
    """How often a clipper has clipped, and how many before it, for the same parameters, clipped once each and
    were made one after the other."""

    def __init__(self) -> None:
        self.clips = 0
        self.row = 0
        self.made = next(_clock)
        self.used = self.made


# By the first parameter.
_latest: weakref.WeakKeyDictionary[Life, Usage] = weakref.WeakKeyDictionary()
_said: weakref.WeakSet[Life] = weakref.WeakSet()


def claim(strategy: Strategy, clipper: Any) -> None:
    """``clipper`` uses ``strategy`` from now on.

    Raises:
        ValueError: it has state, itself or a strategy inside it, and belongs to another clipper that is
            alive and has clipped: which the program has done, and so on every rank.
    """
    for part in strategy.modules():
        if not isinstance(part, Strategy) or not has_state(part):
            continue
        owner = _owner_of(part)
        if owner is not None and owner is not clipper:
            del owner
            gc.collect()  # whether garbage has been collected yet is no fact that ranks share
            owner = _owner_of(part)
        if owner is not None and owner is not clipper:
            name = type(part).__name__
            raise ValueError(
                f"this {name} object has been used by another Clipper, which is still alive: both would feed "
                f"one history. Make one for each, distclip.{name}(...) or copy.deepcopy(strategy); or let go "
                "of the other Clipper first, where this one is to go on from its state."
            )
        _owners[part] = weakref.ref(clipper)


def _owner_of(part: Strategy) -> Any:
    reference = _owners.get(part)
    return None if reference is None else reference()


def has_state(strategy: torch.nn.Module) -> bool:
    """Whether a step leaves anything behind in it, or in a module inside it."""
    return any(
        persistent_buffers(m) or type(m).get_extra_state is not torch.nn.Module.get_extra_state
        for m in strategy.modules()
    )


def require_nobody_absent(strategy: Strategy, *, talks: bool) -> None:
    """For a step that a rank without a batch would leave out.

    Raises:
        ValueError: it would miss the step's message, or a step that its strategy has to know of.
    """
    why = ""
    if talks or strategy.uses_loss:
        why = "takes part in DDP's messages only, and the others would wait for it in the one of this step"
    elif has_state(strategy):
        why = f"misses steps that {type(strategy).__name__} keeps a history of, and would then clip otherwise"
    if why:
        raise ValueError(
            f"under torch's Join a rank that has run out of batches {why}. Use "
            "Join(..., throw_on_early_termination=True), give every rank as many batches (drop_last=True of "
            "DistributedSampler), or clip by a strategy without state that judges norms, GlobalNorm say"
        )


def count_use(usage: Usage, first: Tensor | None) -> None:
    """Note the first clip of a clipper with this first parameter; say once where each step makes one."""
    usage.clips += 1
    usage.used = next(_clock)
    if first is None:
        return
    life = life_of(first)
    before = _latest.get(life)
    follows = before is not None and before.clips == 1 and usage.made > before.used
    usage.row = before.row + 1 if before is not None and follows else 1
    _latest[life] = usage
    if usage.row == _OFTEN and life not in _said:
        _said.add(life)
        if is_main_rank():
            logger.warning(
                "%d Clippers in a row were made for the same parameters, and each clipped once: made anew in "
                "every step, it plans in every step, and a strategy with a history never learns. Make it "
                "once, before the loop: clipper = distclip.Clipper(model, strategy).", _OFTEN,
            )  # fmt: skip
