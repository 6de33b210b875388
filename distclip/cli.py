"""The command line: ``distclip audit | run | recommend | replay | report | watch | doctor | bench``.

Exit codes: of ``audit`` and ``run`` the script's (with ``audit --strict`` 3 where training is wrong; of
``run`` 2 where nothing was replaced). Of the rest: 0, all is well; 1, ``doctor`` found a problem; 2, the
input or the arguments cannot be used. Needs no process group, and the extra ``cli``, except for ``audit`` and
``run``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from distclip.decide.terminal import never_raise
from distclip.errors import DistclipError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. ``arguments``: those of the process, by default."""
    never_raise()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["audit"], ["run"]):
        from distclip.audit import command

        return command.main(arguments)
    try:
        from distclip.monitor import commands
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distclip"):
            raise
        if arguments in (["--version"], ["doctor"]):  # which need torch alone
            return _plainly(arguments[0])
        print(f"distclip: the commands need {error.name}: pip install 'distclip[cli]'", file=sys.stderr)
        return 2
    try:
        return commands.run(arguments)
    except DistclipError as error:
        print(f"distclip: {error}", file=sys.stderr)
    except BrokenPipeError:  # `distclip recommend run.jsonl | head -3` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"distclip: {where}{error.strerror or error}", file=sys.stderr)
    return 2


def _plainly(command: str) -> int:
    """Without the extra, as plain text."""
    from distclip._version import __version__
    from distclip.inspection.installation import examine_installation

    if command == "--version":
        print(f"distclip {__version__}")
        return 0
    found = examine_installation()
    marks = {"ok": "✓", "note": "•", "problem": "✗"}
    for finding in found:
        print(f"{marks[finding.level]} {finding.topic:14} {finding.text}")
    return int(any(finding.level == "problem" for finding in found))


if __name__ == "__main__":
    sys.exit(main())
