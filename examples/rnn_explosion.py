"""The exploding gradient (Pascanu et al., 2013), and what clipping by value, norm and percentile does to it.

    python examples/rnn_explosion.py                            # a table, and runs/rnn_explosion.png
    python examples/rnn_explosion.py --lr 0.06                  # a step size at which it is rarer

A tanh RNN has to say at each time what it read ``DELAY`` steps before. Its recurrent matrix starts as 1.5
times a rotation, so what flows back through time grows; SGD with momentum does the rest, at a step size that
was chosen for it. Every strategy sees the same models and batches; no threshold was searched for. Takes half
a minute.

Look at Percentile alone: a threshold that only follows the norms follows an explosion too. At this step size
it needs a cap, as ZClip has one and ``Chain`` gives it one; at ``--lr 0.06`` it needs none, and ends lower
than those that have one.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distclip

WIDTH, TIME, DELAY, BATCH, GAIN = 48, 50, 5, 16, 1.5
GUESS = 1 / 3  # the variance of uniform numbers between -1 and 1
TAIL = 50  # steps that the final loss is averaged over


def following() -> distclip.Strategy:
    """The threshold is what 90 % of the last 200 norms are below; 1 for the first 20."""
    return distclip.Percentile(90, multiplier=1, history=200, warmup=20, initial=1.0)


STRATEGIES: dict[str, Callable[[], distclip.Strategy]] = {
    "unclipped": lambda: distclip.GlobalNorm(math.inf),
    "Value(0.1)": lambda: distclip.Value(0.1, measure_direction=True),
    "GlobalNorm(1)": lambda: distclip.GlobalNorm(1.0),
    "Percentile(90)": following,
    "Chain(Percentile(90),\nGlobalNorm(1))": lambda: distclip.Chain(following(), distclip.GlobalNorm(1.0)),
    "ZClip(), at most 1": distclip.ZClip,
}


@dataclass
class Run:
    """One training run, [steps] each."""

    loss: Tensor
    norm: Tensor  # before clipping
    threshold: Tensor
    clipped: Tensor
    direction: Tensor  # cosine between the gradient before and after

    @property
    def final(self) -> float:
        return self.loss[-TAIL:].mean().item()

    @property
    def exploded(self) -> bool:
        """Whether it ended worse than a guess, or not at a number at all."""
        return not self.final <= GUESS


class Echo(nn.Module):
    """Numbers [batch, time] -> what it thinks they were ``DELAY`` steps before."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(1, WIDTH, batch_first=True), nn.Linear(WIDTH, 1)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain=GAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.unsqueeze(-1))[0]).squeeze(-1)


def train(make: Callable[[], distclip.Strategy], seed: int, args: argparse.Namespace) -> Run:
    torch.manual_seed(seed)
    model, draw = Echo(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    clipper = distclip.Clipper(model, make(), on_nonfinite="propagate")  # what has exploded, stays so
    rows = []
    for _ in range(args.steps):
        x = 2 * torch.rand(BATCH, TIME, generator=draw) - 1
        loss = F.mse_loss(model(x)[:, DELAY:], x[:, :-DELAY])
        optimizer.zero_grad()
        loss.backward()
        report = clipper.step(optimizer)
        direction = torch.tensor(1.0) if report.direction is None else report.direction
        row = (loss.detach(), report.total_norm, report.threshold, report.clipped, direction)
        rows.append(torch.stack([value.float() for value in row]))
    return Run(*torch.stack(rows, 1))


def table(runs: dict[str, list[Run]]) -> str:
    """Means over the seeds; the final loss of those that did not explode."""
    lines = [
        "| strategy | exploded | final loss | largest norm | steps clipped | direction (cosine) |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in runs.items():
        fine = [run.final for run in of if not run.exploded]
        lines.append(
            f"| {' '.join(name.split())} | {len(of) - len(fine)} of {len(of)} "
            f"| {f'{statistics.fmean(fine):.4f}' if fine else ''} "
            f"| {max(run.norm.nan_to_num(nan=math.inf).max().item() for run in of):.3g} "
            f"| {statistics.fmean(run.clipped.mean().item() for run in of):.0%} "
            f"| {statistics.fmean(run.direction.mean().item() for run in of):.2f} |"
        )
    return "\n".join(lines)


def plot(runs: dict[str, list[Run]], args: argparse.Namespace) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(runs), figsize=(14, 5.5), sharex=True, sharey="row")
    for (name, of), (upper, lower) in zip(runs.items(), axes.T, strict=True):
        for run in of:
            colour = "C3" if run.exploded else "C0"
            upper.plot(run.loss, color=colour, linewidth=0.8)
            lower.plot(run.norm, color=colour, linewidth=0.5, alpha=0.6)
            if run.threshold.isfinite().any() and not name.startswith("Value"):  # which has none for the norm
                lower.plot(run.threshold, color="black", linewidth=1)
        upper.axhline(GUESS, color="grey", linestyle=":", linewidth=1)
        exploded = sum(run.exploded for run in of)
        upper.set_title(f"{name}\n{exploded} of {len(of)} exploded", fontsize=10)
        lower.set_xlabel("step")
    axes[0, 0].set(ylabel="loss (dotted: a guess)", yscale="log", ylim=(1e-3, 1e2))
    axes[1, 0].set(ylabel="norm before clipping\n(black: threshold)", yscale="log", ylim=(1e-2, 1e3))
    figure.suptitle(f"A tanh RNN, SGD at lr {args.lr:g}: {args.seeds} seeds each; red: exploded")
    figure.tight_layout()
    args.picture.parent.mkdir(exist_ok=True)
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What clipping does to exploding gradients.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--picture", type=Path, default=Path("runs/rnn_explosion.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small matrices, and the same rounding on every machine
    logging.getLogger("distclip").setLevel(logging.ERROR)  # that thresholds are too low is the point
    everything = {
        name: [train(make, seed, arguments) for seed in range(arguments.seeds)]
        for name, make in STRATEGIES.items()
    }
    print(table(everything))
    plot(everything, arguments)
