"""What distclip was run with: the rows of launch/matrix.sh, and where this installation stands among them."""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

FRAMEWORKS = ("accelerate", "transformers", "lightning", "megatron-core")


@cache
def rows() -> list[dict[str, Any]]:
    """One per environment: ``torch``, ``python``, ``frameworks`` (release by name), ``tests``, ``passed``,
    ``failed`` (names), ``skipped`` (count by reason), ``minutes``, ``date``."""
    text = resources.files(__package__).joinpath("compatibility.json").read_text(encoding="utf-8")
    return list(json.loads(text).values())


def standing() -> dict[str, tuple[str, str]]:
    """By what is installed: its release, and where that stands among those that distclip was run with."""
    found = {
        "torch": (torch.__version__, among(torch.__version__, [row["torch"] for row in rows()])),
        "Python": (
            platform.python_version(),
            among(platform.python_version(), [row["python"] for row in rows()]),
        ),
    }
    for name in FRAMEWORKS:
        try:
            release = version(name)
        except PackageNotFoundError:
            continue
        known = [row["frameworks"][name] for row in rows() if name in row["frameworks"]]
        found[name] = release, among(release, known)
    return found


def among(release: str, known: list[str]) -> str:
    """``"tested"``, or in words why not. What counts is the first two numbers of a release."""
    here, there = release_numbers(release), sorted({release_numbers(k) for k in known})
    if not there:
        return "not tested"
    if here in there:
        return "tested"
    words = [".".join(map(str, numbers)) for numbers in there]
    if here < there[0]:
        return f"older than {words[0]}, the oldest that distclip was run with"
    if here > there[-1]:
        return f"newer than {words[-1]}, the newest that distclip was run with"
    below = max(i for i, numbers in enumerate(there) if numbers < here)
    return f"not run with; between {words[below]} and {words[below + 1]}, which were"


def release_numbers(release: str) -> tuple[int, ...]:
    """The first two."""
    parts = release.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
