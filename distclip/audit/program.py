"""Run a script as Python would: as ``__main__``, with its own arguments and exit code."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import CodeType, FrameType, ModuleType, TracebackType
from typing import Any


class Enough(SystemExit):
    """As many clips as were asked for."""


def run_program(target: str, arguments: Sequence[str], *, is_module: bool) -> int:
    """Its exit code; 1 where it raised, after the traceback, as Python has it. Its ``__main__`` stays: what
    runs at exit, and pickles, may look for it."""
    sys.argv = [target, *arguments]
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else there is no time to say what was found
        signal.signal(signal.SIGTERM, _terminate)
        os.register_at_fork(after_in_child=_as_without)
    try:
        module, code = _module(target) if is_module else _script(target)
        sys.modules["__main__"] = module
        exec(code, vars(module))
    except SystemExit as end:
        return _code_of(end)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        traceback.print_exception(type(error), error, _without_us(error.__traceback__))
        return 1
    return 0


def _script(target: str) -> tuple[ModuleType, CodeType]:
    path = os.path.abspath(target)
    sys.path.insert(0, os.path.dirname(path))
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    return _main(__file__=path, __spec__=None, __package__=None), code


def _module(target: str) -> tuple[ModuleType, CodeType]:
    sys.path.insert(0, os.getcwd())
    spec = importlib.util.find_spec(target)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{target}.__main__")
    loader: Any = None if spec is None else spec.loader
    if spec is None or loader is None:
        raise ImportError(f"there is no module {target} that can be run")
    sys.argv[0] = spec.origin or target
    return _main(__file__=spec.origin, __spec__=spec, __package__=spec.parent), loader.get_code(spec.name)


def _main(**attributes: object) -> ModuleType:
    module = ModuleType("__main__")
    vars(module).update(attributes, __builtins__=builtins)
    return module


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _as_without() -> None:
    """In a forked process of the script's."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    """From the script's own first line on."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
