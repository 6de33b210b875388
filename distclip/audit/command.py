"""``distclip audit`` and ``distclip run``: what they take, and what they leave behind. Need torch alone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distclip.audit.exchange import Exchange
from distclip.audit.judgement import Judgement, judge
from distclip.audit.output import as_text, write_history, write_json, write_page
from distclip.audit.program import run_program
from distclip.audit.recorder import Recorder
from distclip.audit.replacing import Replacing, strategy_named
from distclip.audit.watching import FUNCTIONS, Watch
from distclip.decide.terminal import shown

WRONG = 3  # the exit code of --strict


def main(arguments: Sequence[str]) -> int:
    """``arguments``: from ``audit`` or ``run`` on. The exit code."""
    command, *rest = arguments
    own, target, theirs, is_module = _split(command, rest)
    if command == "audit":
        return _audit(own, target, theirs, is_module)
    return _run(own, target, theirs, is_module)


def _split(command: str, arguments: list[str]) -> tuple[argparse.Namespace, str, list[str], bool]:
    """Our options end where the script begins."""
    parser = _PARSERS[command]()
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as `python -m` does"
    )
    parser.add_argument("script", nargs="?", help="the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    own = parser.parse_args(arguments)
    if own.module:
        return own, own.module[0], own.module[1:], True
    if not own.script:
        parser.error("which script? distclip audit train.py")
    if not os.path.exists(own.script):
        parser.error(f"there is no {own.script}")
    return own, own.script, own.arguments, False


def _parser_of_audit() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {function.label}" for function in FUNCTIONS)
    parser = argparse.ArgumentParser(
        prog="distclip audit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a training script unchanged, and say whether its gradient clipping is right.\n\n"
        "    distclip audit train.py --lr 1e-3\n"
        "    torchrun --nproc-per-node 8 -m distclip audit train.py --lr 1e-3\n"
        "    accelerate launch -m distclip audit train.py",
        epilog=f"Functions that are watched:\n{listed}",
    )
    parser.add_argument("--every", type=_positive, default=50, metavar="K",
                        help="after 20 calls at a place look into each K-th (default: 50)")  # fmt: skip
    parser.add_argument(
        "--steps", type=_positive, default=0, metavar="N", help="end the script after N clips"
    )
    parser.add_argument("--json", type=_path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--html", type=_path, metavar="FILE", help="write a page for a browser")
    parser.add_argument("--history", type=_path, metavar="FILE",
                        help="write the norms as JSON lines, for distclip recommend and report")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help=f"exit with {WRONG} where training is wrong")
    return parser


def _parser_of_run() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distclip run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a training script with distclip in the place of its clipping functions.\n\n"
        "    torchrun --nproc-per-node 8 -m distclip run train.py --lr 1e-3\n"
        "    distclip run --strategy zclip train.py",
    )
    parser.add_argument(
        "--strategy",
        type=strategy_named,
        metavar="NAME",
        help="zclip, adagc, percentile, …: in place of max_norm",
    )
    parser.add_argument(
        "--history", type=_path, metavar="FILE", help="record every step, for distclip report"
    )
    return parser


_PARSERS = {"audit": _parser_of_audit, "run": _parser_of_run}


def _audit(own: argparse.Namespace, target: str, theirs: list[str], is_module: bool) -> int:
    exchange, process = Exchange(), os.getpid()
    recorder = Recorder(every=own.every, steps=own.steps, note=exchange.note, hold=exchange.hold)
    watch = Watch(recorder)
    watch.install()
    code = run_program(target, theirs, is_module=is_module)
    if os.getpid() != process:  # forked by the script
        return code
    watch.remove()
    recorder.remove()
    try:
        judgement = _judged(recorder, exchange, failed=code != 0)
    except Exception as error:  # of the audit's own, which is no fault of the script's
        _say(f"distclip audit: {type(error).__name__}: {error}")
        return code
    if judgement is None:
        return code
    _say(f"\n{as_text(judgement)}")
    for path, write in (
        (own.json, write_json),
        (own.html, partial(write_page, program=target)),
        (own.history, write_history),
    ):
        if path is not None:
            try:
                write(path, judgement)
            except OSError as error:
                _say(f"distclip audit: {path}: {error.strerror or error}")
                code = code or 2
    return WRONG if own.strict and judgement.verdict == "wrong" and code in (0, 2) else code


def _judged(recorder: Recorder, exchange: Exchange, *, failed: bool) -> Judgement | None:
    """On rank 0."""
    notes = recorder.finish()
    exchange.note(notes)
    if exchange.is_alone:  # whatever the launcher has set
        notes.world_size = 1
    if notes.rank:
        exchange.wait_for_rank_0(notes, failed=failed)
        return None
    every = exchange.collect(notes)
    exchange.say_read()
    return judge(every)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(shown(text, sys.stderr), file=sys.stderr, flush=True)


def _run(own: argparse.Namespace, target: str, theirs: list[str], is_module: bool) -> int:
    replacing = Replacing(own.strategy, own.history)
    watch = Watch(replacing, [f for f in FUNCTIONS if replacing.can_replace(f)])
    watch.install()
    process = os.getpid()
    code = run_program(target, theirs, is_module=is_module)
    if os.getpid() != process:  # forked by the script
        return code
    watch.remove()
    replacing.close()
    if int(os.environ.get("RANK", 0)) == 0:
        _say(f"\n{replacing.as_text()}")
    if code == 0 and not replacing.replaced:
        return 2
    return code


def _path(text: str) -> Path:
    """Absolute, since the script may go elsewhere."""
    path = Path(text).absolute()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number ≥ 1")
    return number
