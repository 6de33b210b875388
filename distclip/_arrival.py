"""Ranks meet before a plan's first collective, in the store of the process group, so that nobody waits in
silence.

A collective that not all ranks join never returns, and says nothing. Here each notes that it has come, and
one that waits for others says for which. Once the plan stands the store is not asked any more.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distclip.errors import OwnershipError, SettingsError

logger = logging.getLogger("distclip")

PATIENCE = 30.0
"""Seconds that a rank waits before it says so."""
_NAMED = 8  # ranks, and parameters, in a message
_LOOKED_FOR_BY_ALL = 64  # ranks
_NAPS_FOR_WORD = 30
_FIRST_NAP, _LONGEST_NAP = (
    0.0002,
    1.0,
)  # seconds; naps grow with the time waited, so that few ask a large store


# Of each life of the process group, by the name of the group: the number of the next.
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, int]] = weakref.WeakKeyDictionary()


def meet(group: dist.ProcessGroup, names: Sequence[str]) -> None:
    """Return when every rank of ``group`` has called this. Does nothing where there is no store.

    Raises:
        OwnershipError: some have not come within the timeout of the group: which.
        SettingsError: on every rank: they have come with different groups of these ranks.
    """
    # Groups of all ranks meet in one room: who was passed nothing finds those there that were passed another.
    whole = group.size() == dist.get_world_size()
    place = "all" if whole else group.group_name
    try:
        store = c10d._get_default_store()
        world = dist.group.WORLD
        assert world is not None  # there is a store
        meetings = _meetings.setdefault(world, {})
        number = meetings.get(place, 0)
        room = f"distclip/{place}/{number}"
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
        _wait(store, room, group, names)
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
            [f"{before}/{key}" for key in ("count", "all", "asked", "missing")]
            if dist.get_rank(group) == 0
            else []
        )
        for key in last:
            store.delete_key(key)


def _wait(store: dist.Store, room: str, group: dist.ProcessGroup, names: Sequence[str]) -> None:
    began = time.monotonic()
    limit = _timeout_of(group)
    said_at = min(PATIENCE, limit / 2)
    said = False
    while not store.check([f"{room}/all"]):
        waited = time.monotonic() - began
        if waited >= limit:
            if store.add(f"{room}/count", -1) == group.size() - 1:
                store.add(f"{room}/count", 1)  # the last has just come
                continue
            missing = _missing(store, room, group)
            store.delete_key(f"{room}/{dist.get_rank()}")
            if group.size() == dist.get_world_size():
                store.add(f"{room}/of {group.group_name}", -1)
            raise OwnershipError(f"{_sentence(waited, missing, names)} Gave up.")
        if waited >= said_at and not said:
            said = True
            logger.warning("%s", _sentence(waited, _missing(store, room, group), names))
        time.sleep(min(_LONGEST_NAP, max(_FIRST_NAP, waited / 10)))


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


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a collective of the group waits."""
    try:
        device = group._device_types[0]
        limit: timedelta = group._get_backend(torch.device(device)).options._timeout
        return limit.total_seconds()
    except (RuntimeError, AttributeError, IndexError):
        return c10d.default_pg_timeout.total_seconds()
