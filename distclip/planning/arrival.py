"""Ranks meet before a plan's first collective, in the store of the process group, so that nobody waits in
silence.

A collective that not all ranks join never returns, and says nothing. Here each notes that it has come, and
one that waits for others says for which. Once the plan stands the store is not asked any more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Sequence

import torch.distributed as dist

from distclip.errors import OwnershipError, SettingsError
from distclip.layout.placement import resolve_group
from distclip.torch_private import groups

logger = logging.getLogger("distclip")

PATIENCE = 30.0
"""Seconds that a rank waits before it says so."""
_NAMED = 8  # ranks, and parameters, in a message
_LOOKED_FOR_BY_ALL = 64  # ranks
_NAPS_FOR_WORD = 30
_FIRST_LOOK = 1.0  # seconds, after which a rank says where it waits; then it looks where the others are
_FIRST_NAP, _LONGEST_NAP = (
    0.0002,
    1.0,
)  # seconds; naps grow with the time waited, so that few ask a large store


# Of each life of the process group, by the name of the group: the number of the next.
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, int]] = weakref.WeakKeyDictionary()


def meet(group: dist.ProcessGroup, names: Sequence[str], call: int = 0) -> None:
    """Return when every rank of ``group`` has called this. Does nothing where there is no store.

    ``call``: for the how manieth of a clipper, where it has planned before, see :func:`leave_word`.

    Raises:
        OwnershipError: some have not come within the timeout of the group: which. Or they have left word.
        SettingsError: on every rank: they have come with different groups of these ranks.
    """
    # Groups of all ranks meet in one room: who was passed nothing finds those there that were passed another.
    whole = group.size() == dist.get_world_size()
    place = _place_of(group)
    meetings = _meetings_of_world()
    number = meetings.get(place, 0)
    room = f"distclip/{place}/{number}"
    try:
        store = groups.default_store()
        alike = store.add(f"{room}/of {group.group_name}", 1) if whole else group.size()
        here = store.add(f"{room}/count", 1)
        store.set(f"{room}/{dist.get_rank()}", "here")
    except (RuntimeError, NotImplementedError):
        return
    if here == group.size():
        # All have said of which group they are before they were counted.
        alike = store.add(f"{room}/of {group.group_name}", 0) if whole else alike
        store.set(f"{room}/all", "here" if alike == group.size() else "apart")
    else:
        _wait(store, room, group, names, call)
    meetings[place] = number + 1
    if whole and store.get(f"{room}/all") == b"apart":
        raise SettingsError(
            "ranks clip together over different process groups of the same ranks, and would wait each in its "
            f"own (that of rank {dist.get_rank()} is named {group.group_name!r}): pass process_group= and "
            "stages= alike on every rank, or on none"
        )
    if number:  # all have left that one, or they would not have come to this
        before = f"distclip/{place}/{number - 1}"
        last = [f"{before}/{dist.get_rank()}", f"{before}/of {group.group_name}"]
        last += (
            [f"{before}/{key}" for key in ("count", "all", "asked", "missing", "word")]
            if dist.get_rank(group) == 0
            else []
        )
        for key in last:
            store.delete_key(key)


def leave_word(group: dist.ProcessGroup, call: int, why: str) -> None:
    """This rank raises in a clipper's ``call``-th call, and others of ``group`` may go to plan it anew: they
    are told in the next meeting that it does not come there."""
    place = _place_of(group)
    room = f"distclip/{place}/{_meetings_of_world().get(place, 0)}"
    with contextlib.suppress(RuntimeError, NotImplementedError):
        groups.default_store().set(f"{room}/word/{call}", _raised(why))


def _raised(why: str) -> str:
    return f"the plan cannot be made together with all ranks, since rank {dist.get_rank()} has raised: {why}"


def _place_of(group: dist.ProcessGroup) -> str:
    return "all" if group.size() == dist.get_world_size() else group.group_name


def _meetings_of_world() -> dict[str, int]:
    assert dist.group.WORLD is not None  # there is a group
    return _meetings.setdefault(dist.group.WORLD, {})


def _wait(store: dist.Store, room: str, group: dist.ProcessGroup, names: Sequence[str], call: int) -> None:
    """
    Raises:
        OwnershipError: as :func:`meet`; others who wait here are told why this one has not stayed.
    """
    began = time.monotonic()
    limit = groups.timeout_of(group)
    said_at, look_at = min(PATIENCE, limit / 2), _FIRST_LOOK
    me = f"distclip/waits/{dist.get_rank()}"
    words = {f"{room}/word/{call}": ""} if call else {}
    words[f"{room}/word"] = _read(store, f"{room}/word")  # what has been said there before counts no more
    try:
        while not store.check([f"{room}/all"]):
            waited = time.monotonic() - began
            why = ""
            if waited >= _FIRST_LOOK:
                why = next((now for word, was in words.items() if (now := _read(store, word)) != was), "")
            if waited >= look_at and not why:
                # Each says where it waits before any looks, so that both of two find each other.
                store.set(me, room)
                why = _cross_purposes(store, room, group) if look_at > _FIRST_LOOK else ""
                look_at *= 2
            if waited >= limit and not why:
                why = f"{_sentence(waited, _missing(store, room, group), names)} Gave up."
            if why:
                if store.add(f"{room}/count", -1) == group.size() - 1:
                    store.add(f"{room}/count", 1)  # the last has just come
                    words, look_at, limit = {}, math.inf, math.inf
                    continue
                store.delete_key(f"{room}/{dist.get_rank()}")
                if group.size() == dist.get_world_size():
                    store.add(f"{room}/of {group.group_name}", -1)
                store.set(f"{room}/word", why)
                raise OwnershipError(why)
            if waited >= said_at:
                said_at = math.inf
                logger.warning("%s", _sentence(waited, _missing(store, room, group), names))
            time.sleep(min(_LONGEST_NAP, max(_FIRST_NAP, waited / 10)))
    finally:
        if look_at > _FIRST_LOOK:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # rank 0, which has it, may be gone
                store.delete_key(me)


def _cross_purposes(store: dist.Store, room: str, group: dist.ProcessGroup) -> str:
    """What is wrong where one that is missing waits for this rank in another room, and is told there."""
    ranks = dist.get_process_group_ranks(group)
    for rank in ranks if len(ranks) <= _LOOKED_FOR_BY_ALL else ():
        elsewhere = "" if store.check([f"{room}/{rank}"]) else _read(store, f"distclip/waits/{rank}")
        place = elsewhere.removeprefix("distclip/").rpartition("/")[0]
        if place and place != _place_of(group) and (place == "all" or _is_known(place)):
            me = dist.get_rank()
            why = (
                f"rank {me} plans to clip together with {group.size()} ranks, and rank {rank}, one of them, "
                f"at the same time with others, {me} among them, so that each would wait for the other: "
                "their parameters lie over different ranks (other meshes, other groups of DDP, none that "
                "train), or have changed on some ranks only. Change them on every rank in the same step, or "
                "pass process_group= with the ranks that clip together."
            )
            store.set(f"{elsewhere}/word", why)
            return why
    return ""


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _is_known(group_name: str) -> bool:
    """Whether this rank is in the group."""
    try:
        resolve_group(group_name)
    except ValueError:
        return False
    return True


def _missing(store: dist.Store, room: str, group: dist.ProcessGroup) -> list[int]:
    """Those that have not come. The first to ask looks for each of them, and leaves word for the others, who
    may be thousands; they look again whether these have come since."""
    ranks = dist.get_process_group_ranks(group)
    if store.add(f"{room}/asked", 1) > 1 and len(ranks) > _LOOKED_FOR_BY_ALL:
        for _ in range(_NAPS_FOR_WORD):
            if store.check([f"{room}/missing"]):
                ranks = [int(rank) for rank in store.get(f"{room}/missing").decode().split()]
                break
            time.sleep(_LONGEST_NAP)
        if len(ranks) > _LOOKED_FOR_BY_ALL:
            return ranks
        return [rank for rank in ranks if not store.check([f"{room}/{rank}"])]
    missing = [rank for rank in ranks if not store.check([f"{room}/{rank}"])]
    store.set(f"{room}/missing", " ".join(map(str, missing)))
    return missing


def _sentence(waited: float, missing: Sequence[int], names: Sequence[str]) -> str:
    ranks = ", ".join(map(str, missing[:_NAMED])) + (
        f", … ({len(missing)} ranks)" if missing[_NAMED:] else ""
    )
    shown = ", ".join(map(repr, names[:2])) + (", …" if names[2:] else "")
    return (
        f"rank {dist.get_rank()} has waited {waited:.0f} s to plan the clipping of {len(names)} parameter(s) "
        f"({shown}) together with rank(s) {ranks}, which have not come. Mostly clip() (or describe(), or "
        "another function that all ranks call) is called on some ranks only, the parameters were changed on "
        "this rank alone, or those ranks train another model: then pass process_group= with the ranks of "
        "this one."
    )
