"""Run a script as Python would: as ``__main__``, with its own arguments and exit code."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType


class Enough(SystemExit):
    """As many clips as were asked for."""


def run_program(target: str, arguments: Sequence[str], *, is_module: bool) -> int:
    """Its exit code; 1 where it raised, after the traceback, as Python has it."""
    sys.argv = [target, *arguments]
    previous = signal.getsignal(signal.SIGTERM)
    if previous is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)  # else there would be no time to say what was found
    try:
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
            runpy.run_path(target, run_name="__main__")
    except SystemExit as end:
        return _code_of(end)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        traceback.print_exception(type(error), error, _without_us(error.__traceback__))
        return 1
    finally:
        if previous is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    """From the script's own first line on."""
    ours = (__file__, runpy.__file__)
    while trace is not None and (
        trace.tb_frame.f_code.co_filename in ours or "runpy" in trace.tb_frame.f_code.co_filename
    ):
        trace = trace.tb_next
    return trace
