"""A recorded run as columns, read fast from its JSON lines."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from distclip.errors import DistclipError

Floats = NDArray[np.float64]
CHUNK = 1_000_000
"""Bytes that are parsed at a time: bounds the memory that the parsed lines need."""
NORM_NAMES = ("total_norm", "grad_norm")
"""What the norm may be called; the second is what the Hugging Face Trainer logs."""


class HistoryError(DistclipError, ValueError):
    """A history cannot be read, or does not hold what was asked of it: names file and line."""


@dataclass(frozen=True, eq=False)
class Run:
    """The record of a run, one element a step, in order of steps.

    Attributes:
        step: int64, strictly increasing.
        norm: total norm before clipping, float32 values; NaN or ∞ where it was.
        threshold: NaN where none was recorded (one threshold for every parameter, say).
        coefficient: 1 where nothing was clipped.
        loss, lr: NaN where not recorded.
        param_steps: int64, the steps whose per-parameter norms were recorded.
        param_norms: [len(param_steps), len(param_names)] float32.
        norm_type: p of the norms.
        whole: whether the threshold is one on the norm of the whole gradient.
        by_module: whether ``param_norms`` are norms of modules.
        torn: whether the last line was torn, and left out.
    """

    name: str
    step: NDArray[np.int64]
    norm: Floats
    threshold: Floats
    coefficient: Floats
    clipped: NDArray[np.bool_]
    skipped: NDArray[np.bool_]
    nonfinite: NDArray[np.bool_]
    loss: Floats
    lr: Floats
    param_steps: NDArray[np.int64]
    param_norms: NDArray[np.float32]
    param_names: tuple[str, ...] = ()
    norm_type: float = 2.0
    world_size: int | None = None
    strategy: str | None = None
    whole: bool = True
    by_module: bool = False
    torn: bool = False

    def __len__(self) -> int:
        return len(self.step)

    @property
    def clip_rate(self) -> float:
        return float(self.clipped.mean())

    def last(self, count: int) -> Run:
        """The last ``count`` steps only."""
        columns = (
            "step",
            "norm",
            "threshold",
            "coefficient",
            "clipped",
            "skipped",
            "nonfinite",
            "loss",
            "lr",
        )
        shorter = replace(self, **{name: getattr(self, name)[-count:] for name in columns})
        kept = shorter.param_steps >= shorter.step[0]
        return replace(shorter, param_steps=self.param_steps[kept], param_norms=self.param_norms[kept])

    def require_finite(self) -> None:
        """Raises:
        HistoryError: no norm is finite and positive.
        """
        if not (np.isfinite(self.norm) & (self.norm > 0)).any():
            raise HistoryError(
                f"{self.name}: all {len(self)} norms, from line 1 on, are NaN, infinite or 0: there is "
                "nothing to go by"
            )


def read(path: str | Path, *, advance: Callable[[int], object] | None = None) -> Run:
    """Read a history: what :class:`distclip.History` wrote, or any JSON lines with ``total_norm`` or
    ``grad_norm`` and, if there is one, ``step``. Reading never changes the file.

    A torn last line is left out. Of a step that occurs twice, the later line counts.

    Args:
        advance: called with the number of bytes read since the last call, to draw progress.

    Raises:
        HistoryError: the file is missing, empty, not JSON lines or without norms; with the line number.
    """
    reader = _Reader(Path(path))
    collects = gc.isenabled()
    gc.disable()  # parsed lines make no cycles, and to look for some takes longer than all the rest
    try:
        for lines in _chunks(reader, advance):
            reader.take(lines)
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror or error}") from error
    finally:
        if collects:
            gc.enable()
    return reader.finish()


def _chunks(reader: _Reader, advance: Callable[[int], object] | None) -> Iterator[list[bytes]]:
    rest = b""
    with open(reader.path, "rb") as file:
        while chunk := file.read(CHUNK):
            whole, newline, after = chunk.rpartition(b"\n")
            if newline:
                yield (rest + whole).split(b"\n")
                rest = after
            else:
                rest += chunk
            if advance is not None:
                advance(len(chunk))
    if rest.strip():
        try:
            orjson.loads(rest)
        except orjson.JSONDecodeError:
            if reader.line == 0:
                raise HistoryError(f"{reader.path}:1: not JSON, or torn: {_shown(rest)}") from None
            reader.torn = True
        else:
            yield [rest]


class _Reader:
    """Turns parsed lines into columns, chunk by chunk."""

    NUMBERS = ("threshold", "loss", "lr")
    FLAGS = ("clipped", "skipped", "nonfinite")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0  # lines read so far
        self.torn = False
        self.head: dict[str, Any] = {}
        self.columns: dict[str, list[NDArray[Any]]] = {}
        self.details: list[tuple[int, list[float]]] = []
        self.names: tuple[str, ...] = ()
        self.strange: tuple[int, list[str]] | None = None  # the first line that is no step, and its fields

    def take(self, lines: list[bytes]) -> None:
        if not lines[-1].strip():
            lines = lines[:-1]
        rows = self._parse(lines)
        numbers = None  # of the lines of steps; None: all are
        if not all("total_norm" in row and "param_norms" not in row for row in rows):
            numbers = [n for n, row in enumerate(rows) if self._is_step(self.line + 1 + n, row)]
            rows = [rows[n] for n in numbers]
        if rows:
            self._keep(_Steps(self.path, self.line + 1, numbers, rows))
        self.line += len(lines)

    def _keep(self, steps: _Steps) -> None:
        norm = "total_norm" if "total_norm" in steps.rows[0] else "grad_norm"
        if "step" in steps.rows[0]:
            step = steps.column("step")
        else:  # no step in any: count them
            before = sum(map(len, self.columns.get("step", ())))
            step = np.arange(before + 1.0, before + 1 + len(steps.rows))
        columns = {
            "step": step,
            "norm": steps.column(norm),
            "coefficient": steps.column("coefficient", 1.0),
            **{name: steps.column(name, math.nan) for name in self.NUMBERS},
            **{name: steps.column(name, False) != 0 for name in self.FLAGS},
        }
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values)

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(lines) + b"]")
            if len(rows) == len(lines) and set(map(type, rows)) <= {dict}:
                return rows
        except orjson.JSONDecodeError:
            pass  # find the line below
        return [self._parse_line(n, line) for n, line in enumerate(lines, self.line + 1)]

    def _parse_line(self, n: int, line: bytes) -> dict[str, Any]:
        if not line.strip():
            return {"blank": True}
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = _lenient(line)
        if not isinstance(row, dict):
            raise HistoryError(f"{self.path}:{n}: not a line of JSON: {_shown(line)}")
        return row

    def _is_step(self, n: int, row: dict[str, Any]) -> bool:
        if "distclip" in row:
            self.head = row
            return False
        if "names" in row:
            if not isinstance(row["names"], list):
                raise HistoryError(f"{self.path}:{n}: names={_shown(row['names'])}: expected a list")
            names = tuple(map(str, row["names"]))
            if names != self.names:
                self.names, self.details = names, []  # others train now: what was before has other columns
            return False
        if "param_norms" in row:
            values = row["param_norms"]
            if not isinstance(values, list) or len(values) != len(self.names):
                raise HistoryError(
                    f"{self.path}:{n}: param_norms: expected {len(self.names)} numbers, one for each name"
                )
            try:
                self.details.append((row["step"], [float(value) for value in values]))
            except (TypeError, ValueError, KeyError):
                raise HistoryError(f"{self.path}:{n}: param_norms: expected numbers, and a step") from None
        if "total_norm" not in row and "grad_norm" not in row:
            if "blank" not in row:  # other lines of a log: evaluation results, say
                self.strange = self.strange or (n, list(row))
            return False
        return True

    def finish(self) -> Run:
        if not self.columns and self.strange is not None:
            n, fields = self.strange
            raise HistoryError(
                f"{self.path}:{n}: no total_norm in {_shown(fields)}: expected what distclip.History writes, "
                'or lines with "step" and "total_norm" (or "grad_norm")'
            )
        if not self.columns:
            raise HistoryError(f"{self.path}:{max(1, self.line)}: no step is recorded (yet)")
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        steps = columns.pop("step").astype(np.int64)
        kept = _last_of_each(steps)
        columns = {name: values[kept] for name, values in columns.items()}
        columns["nonfinite"] |= ~np.isfinite(columns["norm"])
        details = dict(self.details)
        detailed = sorted(details.keys() & set(steps[kept].tolist())) if details else []
        return Run(
            name=str(self.path),
            step=steps[kept],
            **columns,
            param_steps=np.array(detailed, dtype=np.int64),
            param_norms=np.array([details[s] for s in detailed], dtype=np.float32).reshape(
                len(detailed), len(self.names)
            ),
            param_names=self.names,
            norm_type=float(self.head.get("norm_type", 2.0)),
            by_module="module_depth" in self.head,
            world_size=self.head.get("world_size"),
            strategy=self.head.get("strategy"),
            whole=bool(self.head.get("whole", True)),
            torn=self.torn,
        )


class _Steps:
    """Parsed lines of steps, to be read field by field.

    ``rows[i]`` is line ``first + numbers[i]`` of the file (``first + i`` where ``numbers`` is None).
    """

    def __init__(self, path: Path, first: int, numbers: list[int] | None, rows: list[dict[str, Any]]) -> None:
        self.path, self.first, self.numbers, self.rows = path, first, numbers, rows
        self.fields = set(chain.from_iterable(rows))

    def column(self, name: str, default: float | None = None) -> Floats:
        """One number of every line. Without a default, it has to be there.

        Raises:
            HistoryError: it is no number, or a step that is no integer; or is missing.
        """
        if default is not None and name not in self.fields:
            return np.full(len(self.rows), default, dtype=np.float64)
        try:
            if default is None:
                values = [row[name] for row in self.rows]
            else:
                values = [row.get(name, default) for row in self.rows]
            column = np.array(values)
            if column.dtype.kind not in "fiub":
                column = np.array([float(value) for value in values])
            if name != "step" or bool((np.isfinite(column) & (column == np.floor(column))).all()):
                return column.astype(np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise self._first_wrong(name, default)

    def _first_wrong(self, name: str, default: float | None) -> HistoryError:
        for i, row in enumerate(self.rows):
            value = row.get(name, default)
            try:
                if value is not None and (name != "step" or float(value).is_integer()):
                    float(value)
                    continue
            except (TypeError, ValueError, OverflowError):
                pass
            n = self.first + (i if self.numbers is None else self.numbers[i])
            expected = "an integer" if name == "step" else "a number"
            return HistoryError(f"{self.path}:{n}: {name}={_shown(value)}: expected {expected}")
        return HistoryError(f"{self.path}:{self.first}: {name} cannot be read")


def _last_of_each(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the last line of each step is, in order of steps."""
    if len(steps) < 2 or bool((np.diff(steps) > 0).all()):
        return np.arange(len(steps))
    _, from_behind = np.unique(steps[::-1], return_index=True)
    return len(steps) - 1 - from_behind


def _lenient(line: bytes) -> Any:
    """NaN and Infinity are no JSON, but Python's json module writes them."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _shown(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
