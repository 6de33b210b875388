"""The file of a history: JSON lines that are only ever appended whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

STEP_PREFIX = b'{"step":'
"""How every line of a step begins, so that a step is found without parsing the line."""


class Journal:
    """Appends lines to a file, and takes it over from a process that was killed.

    A torn last line (the process died while writing it) is cut off. Lines are never lost otherwise: those
    of steps that are to be recorded again, because the run went back to a checkpoint, are moved to
    ``<path>.replaced``.

    Attributes:
        last_step: of the last line that has a step; 0 in a new file.

    Raises:
        OSError: the file cannot be opened for writing.
        ValueError: it holds something that is no history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # open for as long as the run
        try:
            self._require_history()
            self._size = self._mend()
            self.last_step = self._find_last_step()
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: bytes, last_step: int | None = None) -> None:
        """Write whole lines at once; all of them are in the file, or none.

        Raises:
            OSError: they could not be written (the disk is full).
        """
        try:
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(f"{written} of {len(lines)} bytes written")
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(lines)
        if last_step is not None:
            self.last_step = last_step

    def rewind(self, step: int) -> int:
        """Move everything from the line of ``step`` (or the first later one) on to ``<path>.replaced``; how
        many lines that was.

        Raises:
            OSError: that file could not be written; nothing was moved.
        """
        lines = self._read(0).splitlines(keepends=True)
        steps = [step_of(line) for line in lines]
        cut = next((i for i, found in enumerate(steps) if found is not None and found >= step), len(lines))
        with open(f"{self.path}.replaced", "ab") as aside:
            aside.writelines(lines[cut:])
            aside.flush()
            os.fsync(aside.fileno())
        self._size = sum(map(len, lines[:cut]))
        self._file.truncate(self._size)
        self.last_step = max((found for found in steps[:cut] if found is not None), default=0)
        return len(lines) - cut

    def close(self) -> None:
        self._file.close()

    def _read(self, start: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read()

    def _require_history(self) -> None:
        with open(self.path, "rb") as file:
            first = file.readline(1_000_000)
        if first and not first.startswith((b'{"distclip"', STEP_PREFIX)) and first.endswith(b"\n"):
            raise ValueError(f"{self.path} is no history of distclip: it begins with {first[:40]!r}")

    def _mend(self) -> int:
        """Cut off, or end, a last line without a newline; the size of the file."""
        size = os.path.getsize(self.path)
        tail_at = max(0, size - 64_000_000)
        tail = self._read(tail_at)
        if not tail or tail.endswith(b"\n"):
            return size
        torn = tail[tail.rfind(b"\n") + 1 :]
        try:
            json.loads(torn)
        except ValueError:
            self._file.truncate(size - len(torn))
            return size - len(torn)
        self._file.write(b"\n")
        return size + 1

    def _find_last_step(self) -> int:
        reach = 65_536
        while True:
            start = max(0, self._size - reach)
            lines = self._read(start).splitlines()
            for line in reversed(lines if start == 0 else lines[1:]):
                step = step_of(line)
                if step is not None:
                    return step
            if start == 0:
                return 0
            reach *= 16


def step_of(line: bytes) -> int | None:
    """The step that a line is of, without parsing the rest of it."""
    if not line.startswith(STEP_PREFIX):
        return None
    digits = line[len(STEP_PREFIX) : len(STEP_PREFIX) + 24].split(b",", 1)[0].split(b"}", 1)[0]
    return int(digits)
