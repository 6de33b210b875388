"""Text on a terminal that may not know all of its characters, where ``print`` would raise in mid-training."""

from __future__ import annotations

import codecs
import sys
from typing import TextIO

_PLAIN = {"→": "->", "×": "x", "…": "...", "–": "-", "—": "-", "·": "-", "•": "*", "✓": "+", "✗": "x"}
_PLAIN |= {"∞": "inf", "≥": ">=", "≤": "<=", "‖": "||", "−": "-"}
_PLAIN |= dict(zip("▁▂▃▄▅▆▇█", "_.-:=+*#", strict=True))
_PLAIN |= dict.fromkeys("─━═╌╍", "-") | dict.fromkeys("│┃║", "|")

_HANDLER = "distclip.plain"


def shown(text: str, stream: TextIO | None = None) -> str:
    """``text``, with what ``stream`` (the standard output) cannot encode in plainer characters."""
    encoding = getattr(stream or sys.stdout, "encoding", None)
    try:
        return text.encode(encoding or "utf-8", _HANDLER).decode(encoding or "utf-8")
    except (LookupError, TypeError, UnicodeError):  # no encoding that Python knows
        return text.encode("ascii", _HANDLER).decode("ascii")


def never_raise() -> None:
    """From now on nothing that the standard output cannot encode makes a program of ours end. (The standard
    error never does that.)"""
    if callable(reconfigure := getattr(sys.stdout, "reconfigure", None)):
        reconfigure(errors=_HANDLER)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _plainly)
