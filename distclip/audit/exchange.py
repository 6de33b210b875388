"""How the notes of all ranks come together: through the process group's store, where nobody has to be waited
for. A rank that does not come is one whose notes are not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import torch.distributed as dist

from distclip.audit.note import Notes
from distclip.torch_private.groups import default_store

_KEY = "distclip/audit"
_PATIENCE = 20.0  # seconds that rank 0 waits for the others to end
_CHUNK = 1 << 20  # bytes a value


class Exchange:
    """Holds the store that the script's process group met in, also after the group has been destroyed."""

    def __init__(self) -> None:
        self._store: dist.Store | None = None

    def hold(self) -> None:
        """Take the store, if there is one by now."""
        if self._store is None and dist.is_available() and dist.is_initialized():
            self._store = default_store()

    def note(self, notes: Notes) -> None:
        """Leave what this rank has noted so far."""
        self.hold()
        if self._store is None:
            return
        text = notes.to_json().encode()
        chunks = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
        for i, chunk in enumerate(chunks):
            self._store.set(f"{_KEY}/{notes.rank}/{i}", chunk)  # type: ignore[arg-type]
        self._store.set(f"{_KEY}/{notes.rank}", f"{len(chunks)} {int(notes.ended)}")

    def collect(self, own: Notes) -> dict[int, Notes]:
        """On rank 0: by rank, what has come. Waits a while for those that have not ended."""
        found = {own.rank: own}
        if self._store is None or own.world_size == 1:
            return found
        missing = set(range(own.world_size)) - {own.rank}
        end = time.monotonic() + _PATIENCE
        while missing and time.monotonic() < end:
            for rank in list(missing):
                if self._state(rank)[1]:
                    missing.discard(rank)
            time.sleep(0.02 if len(missing) else 0)
        for rank in range(own.world_size):
            count, _ = self._state(rank) if rank != own.rank else (0, True)
            if count:
                with contextlib.suppress(Exception):
                    chunks = [self._store.get(f"{_KEY}/{rank}/{i}") for i in range(count)]
                    found[rank] = Notes.from_json(b"".join(chunks).decode())
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

    def _state(self, rank: int) -> tuple[int, bool]:
        """How many values this rank has left, and whether it has ended."""
        assert self._store is not None
        with contextlib.suppress(Exception):
            if self._store.check([f"{_KEY}/{rank}"]):
                count, ended = self._store.get(f"{_KEY}/{rank}").decode().split()
                return int(count), ended == "1"
        return 0, False


def ranks_in_words(ranks: Mapping[int, object] | set[int] | list[int]) -> str:
    listed = sorted(ranks)
    return ", ".join(map(str, listed[:8])) + (f", … ({len(listed)} ranks)" if listed[8:] else "")
