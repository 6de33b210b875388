"""How the notes of all ranks come together: through the process group's store, where nobody has to be waited
for. A rank that does not come is one whose notes are not there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from distclip.audit.note import Notes, Sample
from distclip.torch_private.groups import default_store

_KEY = "distclip/audit"
_PATIENCE = 20.0  # seconds that rank 0 waits for the others to end
_CHUNK = 1 << 20  # bytes a value


class Exchange:
    """Holds the store that the script's process group met in, also after the group has been destroyed."""

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        self._chunks: list[int] = []  # of each sample that has been left
        self._left: set[int] = set()  # those, by identity: notes hold them to the end

    def hold(self) -> None:
        """Take the store, if there is one by now."""
        if self._store is None and dist.is_available() and dist.is_initialized():
            self._store = default_store()

    def note(self, notes: Notes) -> None:
        """Leave what this rank has noted since the last time."""
        self.hold()
        if self._store is None:
            return
        samples = [(i, sample) for i, place in enumerate(notes.places) for sample in place.samples]
        for i, sample in (pair for pair in samples if id(pair[1]) not in self._left):
            text = json.dumps([i, asdict(sample)]).encode()
            chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
            for k, chunk in enumerate(chunks):
                key = f"{_KEY}/{notes.rank}/{len(self._chunks)}/{k}"
                self._store.set(key, chunk)  # type: ignore[arg-type]
            self._chunks.append(len(chunks))
            self._left.add(id(sample))
        head = {"ended": notes.ended, "chunks": self._chunks, "notes": notes.to_json()}
        self._store.set(f"{_KEY}/{notes.rank}", json.dumps(head))

    def collect(self, own: Notes) -> dict[int, Notes]:
        """On rank 0: by rank, what has come. Waits a while for those that have not ended."""
        found = {own.rank: own}
        if self._store is None or own.world_size == 1:
            return found
        missing = set(range(own.world_size)) - {own.rank}
        end = time.monotonic() + _PATIENCE
        while missing and time.monotonic() < end:
            for rank in list(missing):
                if (self._head(rank) or {}).get("ended"):
                    missing.discard(rank)
            time.sleep(0.02 if len(missing) else 0)
        for rank in set(range(own.world_size)) - {own.rank}:
            with contextlib.suppress(Exception):
                if (head := self._head(rank)) is not None:
                    found[rank] = self._read(rank, head)
        return dict(sorted(found.items()))

    @property
    def is_alone(self) -> bool:
        """Whether ranks have never met."""
        return self._store is None

    def wait_for_rank_0(self, own: Notes, *, failed: bool) -> None:
        """Rank 0 may be reading what this rank has in a store that ends with it. ``failed``: it may wait for
        this rank to end, which has raised."""
        if self._store is not None and own.world_size > 1:
            end = time.monotonic() + (2.0 if failed else _PATIENCE)
            with contextlib.suppress(Exception):
                while not self._store.check([f"{_KEY}/read"]) and time.monotonic() < end:
                    time.sleep(0.02)

    def say_read(self) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(f"{_KEY}/read", "1")

    def _head(self, rank: int) -> Mapping[str, Any] | None:
        """What this rank has left last: whether it has ended, its notes, and of how many chunks each of its
        samples is."""
        assert self._store is not None
        with contextlib.suppress(Exception):
            if self._store.check([f"{_KEY}/{rank}"]):
                head: Mapping[str, Any] = json.loads(self._store.get(f"{_KEY}/{rank}"))
                return head
        return None

    def _read(self, rank: int, head: Mapping[str, Any]) -> Notes:
        assert self._store is not None
        notes = Notes.from_json(head["notes"])
        for i, count in enumerate(head["chunks"]):
            chunks = [self._store.get(f"{_KEY}/{rank}/{i}/{k}") for k in range(count)]
            place, sample = json.loads(b"".join(chunks))
            notes.places[place].samples.append(Sample.from_dict(sample))
        return notes


def ranks_in_words(ranks: Mapping[int, object] | set[int] | list[int]) -> str:
    listed = sorted(ranks)
    return ", ".join(map(str, listed[:8])) + (f", … ({len(listed)} ranks)" if listed[8:] else "")
