"""Watch a run and choose its threshold: record norms, replay strategies on them, recommend, report.

In come reports, step by step, or the file of a run; out go a file, tables, pages and advice. Takes no part
in a step, and imports neither ``step`` nor the integrations.

:class:`History` records, with torch alone. All else reads what it wrote, and needs the libraries of the
extra ``cli`` (``pip install 'distclip[cli]'``); it is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distclip.monitor.history import History

if TYPE_CHECKING:
    from distclip.monitor.doctor import examine_runs
    from distclip.monitor.notation import parse_strategy
    from distclip.monitor.page import write_page
    from distclip.monitor.picture import write_picture
    from distclip.monitor.recommendation import Recommendation, recommend
    from distclip.monitor.replaying import replay
    from distclip.monitor.run import Run, read

_HOMES = {
    "Recommendation": "recommendation",
    "Run": "run",
    "examine_runs": "doctor",
    "parse_strategy": "notation",
    "read": "run",
    "recommend": "recommendation",
    "replay": "replaying",
    "write_page": "page",
    "write_picture": "picture",
}

__all__ = [
    "History",
    "Recommendation",
    "Run",
    "examine_runs",
    "parse_strategy",
    "read",
    "recommend",
    "replay",
    "write_page",
    "write_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"distclip.monitor.{name} needs {error.name}: pip install 'distclip[cli]'", name=error.name
        ) from error
