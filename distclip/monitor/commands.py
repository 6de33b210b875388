"""The commands of the command line, see :mod:`distclip.cli`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from distclip._version import __version__
from distclip.decide.terminal import shown
from distclip.monitor.doctor import examine_installation, examine_runs
from distclip.monitor.notation import parse_strategy
from distclip.monitor.page import write_page
from distclip.monitor.picture import write_picture
from distclip.monitor.recommendation import Recommendation, recommend
from distclip.monitor.replaying import differences, is_stateless, require_replayable, tally
from distclip.monitor.run import HistoryError, Run, read
from distclip.monitor.watching import Tail, sparkline, view, watch

HELP = """Choose the clipping threshold from a run's own norms, and watch the run.

First record a history (rank 0 writes it, call it on every rank):

\b
    history = distclip.History("run.jsonl")
    ...
    history.record(clipper.clip(), loss=loss, lr=lr)

Then ask:

\b
    distclip recommend run.jsonl        which max_norm and strategy, and why
    distclip replay run.jsonl -s zclip  what another strategy would have done
    distclip report run.jsonl           one page with all plots
    distclip watch run.jsonl            the running job, here in the terminal
    distclip doctor run.jsonl           installation, environment, usual mistakes
    distclip bench --ranks 2            what clipping costs on this machine

Or let it look at a script that clips already:

\b
    distclip audit train.py             what its clipping does, and what is wrong with it
    distclip run train.py               the same script, with distclip in the place of its functions

\b
No history yet? A first run with GlobalNorm(math.inf) measures and never clips.
Any JSON lines with "step" and "total_norm" (or "grad_norm") will do as well.
"""


app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

OneRun = Annotated[Path, typer.Argument(help="A history: run.jsonl", metavar="RUN", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if show:
        print(f"distclip {__version__}")
        raise typer.Exit


@app.command("recommend", short_help="Which max_norm and strategy to use, and why.")
def recommend_command(
    run: OneRun,
    json_: AsJson = False,
) -> None:
    """Recommend a threshold and a strategy.

    Finds the warm-up, drift and spikes, and puts the threshold above 99 % of the ordinary steps of the
    steady phase. Prints percentiles, the expected clip rate, the reasons, and a line to paste.

    Example: distclip recommend run.jsonl
    """
    advised = recommend(_read([run], quiet=json_)[0])
    if json_:
        _print_json(advised.to_dict())
    else:
        _show_recommendation(_console(), str(run), advised)


@app.command("replay", short_help="What each strategy would have done in a run.")
def replay_command(
    run: OneRun,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", "-s", help="As in code, e.g. 'percentile(95, multiplier=2)'. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also plot the thresholds: a .html page or a .png."),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="Only the last so many steps (state starts anew).")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Replay strategies on the recorded norms: clip rate, mean coefficient, thresholds, skipped steps.

    Decisions are bit for bit those of a live run with these norms. Strategies are written as in Python,
    in any case: global(1.0), zclip, percentile(95, multiplier=2), skip_spikes(sigma=8),
    chain(skip_spikes, global(1)), per_parameter(0.1), adagc, global(warmup(10, 1, 1000)).

    Example: distclip replay run.jsonl -s zclip -s "percentile(95, multiplier=2)" -s "global(1.0)"
    """
    _replay(run, strategy or ["global(1.0)", "percentile", "zclip"], output, last, json_)


@app.command("report", short_help="One self-contained page with all plots.")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="One history, or several to compare.", metavar="RUN...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path(
        "report.html"
    ),
    png: Annotated[Path | None, typer.Option("--png", help="Also a still picture.")] = None,
    json_: AsJson = False,
) -> None:
    """Write an interactive page: norm and threshold, coefficient, clip rate, histogram, modules, spikes.

    The page needs no network and no server: mail it, or open it from a cluster's file browser.

    Example: distclip report before.jsonl after.jsonl -o compare.html --png compare.png
    """
    described = _read(runs, quiet=json_)
    with _progress("plots", len(described), quiet=json_) as advance:
        write_page(output, described, advance=advance)
    if png is not None:
        from distclip.monitor.picture import write_picture

        write_picture(png, described)
    written = [str(output)] + ([str(png)] if png else [])
    if json_:
        _print_json({"written": written})
    else:
        print("\n".join(f"wrote {path}" for path in written))


@app.command("watch", short_help="The running job, in the terminal.")
def watch_command(
    run: OneRun,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and stop.")] = False,
) -> None:
    """Follow a history while it grows. Stop with Ctrl-C; the job does not notice.

    Example: distclip watch run.jsonl
    """

    tail, console = Tail(run), _console()
    tail.look()
    if once:
        console.print(view(tail, console.width))
        return
    with Live(view(tail, console.width), console=console, auto_refresh=False) as live:
        try:
            watch(tail, lambda shown: live.update(shown, refresh=True), console.width, interval)
        except KeyboardInterrupt:
            return


@app.command("doctor", short_help="Installation, environment, usual mistakes.")
def doctor_command(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Histories to look for mistakes in.", metavar="[RUN]...")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Check torch, devices, backends and launch variables; and, in histories, the usual mistakes.

    Clipped in more than 95 % of the steps, never clipped, a growing norm, bursts of NaN, a threshold far
    from the data, and norms that depend on the number of ranks (give one history of each).
    Exits with 1 if there is a problem.

    Example: distclip doctor one_rank.jsonl two_ranks.jsonl
    """

    found = [*examine_installation(), *examine_runs(_read(runs or [], quiet=json_))]
    if json_:
        _print_json([finding.to_dict() for finding in found])
    else:
        console = _console()
        marks = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[bold red]✗[/]"}
        table = _grid(None, None, None)
        for finding in found:
            table.add_row(marks[finding.level], _plain(finding.topic), _plain(finding.text))
        console.print(table)
    if any(finding.level == "problem" for finding in found):
        raise typer.Exit(1)


@app.command(
    "bench",
    short_help="What clipping costs here, beside torch and others.",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_command(context: typer.Context) -> None:
    """Time distclip, torch and the peers that are installed: see distclip bench --help."""
    from distclip.bench.__main__ import main

    raise typer.Exit(main(context.args))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code.

    Raises:
        HistoryError, OSError: the input cannot be used, or the output not be written.
    """
    try:
        app(args=arguments, prog_name="distclip")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _replay(path: Path, texts: Sequence[str], output: Path | None, last: int | None, json_: bool) -> None:

    if output is not None and output.suffix not in (".html", ".png"):
        raise HistoryError(f"{output}: expected a name that ends in .html or .png")
    try:
        strategies = [parse_strategy(text) for text in texts]
    except ValueError as error:
        raise HistoryError(str(error)) from error
    run = _read([path], quiet=json_)[0]
    if last is not None:
        run = run.last(last)
    run.require_finite()
    for strategy in strategies:
        require_replayable(run, strategy)
    with _progress("steps", len(run) * len(strategies), quiet=json_) as advance:
        tallies = [
            tally(run, strategy, text, advance=advance)
            for text, strategy in zip(texts, strategies, strict=True)
        ]
    if output is not None and output.suffix == ".html":
        write_page(output, [run], replays=tallies)
    elif output is not None:
        write_picture(output, [run], replays=tallies)
    summaries = [t.summary() for t in tallies]
    if json_:
        _print_json(summaries)
        return
    console = _console()
    table = _grid(
        "strategy", ">clipped", ">mean coefficient", ">threshold", ">skipped", "clip rate over the run"
    )
    for summary, t in zip(summaries, tallies, strict=True):
        low, high = float(summary["threshold_min"]), float(summary["threshold_max"])
        span = "–" if math.isnan(low) else f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        table.add_row(
            _plain(str(summary["strategy"])),
            f"{summary['clip_rate']:.1%}",
            f"{summary['mean_coefficient']:.3g}",
            span,
            str(summary["skipped"]),
            _shares(t.clipped),
        )
    console.print(
        f"[bold]{len(run):,}[/] steps of {run.name}   norm {sparkline(run.norm[-20_000:].tolist(), 40)}"
    )
    console.print(table)
    if not all(map(is_stateless, strategies)):
        for sentence in differences(run):
            console.print(_plain(f"• {sentence}"))
    if output is not None:
        print(f"wrote {output}")


def _show_recommendation(console: Console, name: str, advised: Recommendation) -> None:
    console.print(
        f"[bold]{name}[/]: {advised.steps:,} steps, {advised.observed_clip_rate:.1%} of them clipped"
    )
    table = _grid(*(f">{'max' if q == '100' else q + ' %'}" for q in advised.percentiles))
    table.add_row(*(f"{value:.3g}" for value in advised.percentiles.values()))
    console.print("\nnorms of the steady phase, percentiles")
    console.print(table)
    if advised.spikes:
        table = _grid(">step", ">norm", ">× surroundings", ">steps")
        largest = sorted(advised.spikes, key=lambda spike: -spike.ratio)[:5]
        for spike in largest:
            table.add_row(f"{spike.step:,}", f"{spike.norm:.4g}", f"{spike.ratio:.3g}", str(spike.steps))
        console.print(f"\nspikes, the largest {len(largest)} of {len(advised.spikes)}")
        console.print(table)
    console.print(
        f"\n[bold green]{advised.strategy}[/]   expected clip rate {advised.expected_clip_rate:.1%}\n"
    )
    table = _grid(None, None)
    for reason in advised.reasons:
        table.add_row(" •", _plain(reason))
    console.print(table)
    console.print("\npaste:")
    print(f"    {advised.code}")


def _read(paths: Sequence[Path], *, quiet: bool) -> list[Run]:

    size = sum(path.stat().st_size for path in paths if path.is_file())
    with _progress("reading", size, quiet=quiet or size < 20_000_000) as advance:
        return [read(path, advance=advance) for path in paths]


@contextmanager
def _progress(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, if that is a terminal; ``yield``s what moves it."""
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


def _console() -> Console:

    return Console(width=None if sys.stdout.isatty() else 120)


def _grid(*columns: str | None) -> Table:
    """A borderless table; ``>`` aligns a column right."""

    table = Table(box=None, show_header=any(columns), header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        right = (column or "").startswith(">")
        table.add_column((column or "").lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def _plain(text: str) -> Text:

    return Text(text)


def _shares(flags: Any, width: int = 24) -> str:
    """The share of true flags over the run, as bars from 0 to 100 %."""

    parts = np.array_split(flags, min(width, len(flags)))
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * part.mean()))] if part.any() else "·" for part in parts)


def _print_json(value: Any) -> None:
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
    print(text if shown(text) == text else json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor ∞: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
