"""Ranks that run a command of ``distclip``, as a launcher would start them."""

from __future__ import annotations

from pathlib import Path

from tests.starting import Ended, forked

SCRIPTS = Path(__file__).parent / "scripts"


def launch(ranks: int, *arguments: str | Path) -> Ended:
    """``audit`` or ``run`` and what they take; or ``alone`` and a script, which runs without."""
    ranks = ranks if ranks > 1 else 0
    if arguments[0] == "alone":
        return forked(ranks, Path(arguments[1]), *arguments[2:])
    return forked(ranks, SCRIPTS / "distclip_command.py", *arguments)
