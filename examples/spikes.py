"""Which strategy copes with bad batches? The model and the text of ``char_lm.py``, with gradient spikes.

    python examples/spikes.py                                       # about ten minutes on one core
    torchrun --standalone --nproc-per-node 2 examples/spikes.py     # the same experiment on two ranks
    python examples/spikes.py --quick                               # does it run?

Now and then a batch is corrupted: its bytes are noise, and its loss is multiplied by 100, as where a loss was
summed instead of averaged. Every strategy gets the same models, batches and corruption, and has its default
settings: nothing is tuned. Another model, optimizer or kind of spike may well order them differently.

Prints a Markdown table. Final loss: mean over the clean batches among the last ``--tail`` steps, then mean
± standard deviation over the seeds. The last column is about the corrupted batches alone.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import char_lm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distclip

SEQ_LEN = 64
Make = Callable[[], distclip.Strategy]


def unclipped() -> distclip.Strategy:
    return distclip.GlobalNorm(math.inf)  # measures, never clips


STRATEGIES: dict[str, Make] = {
    "unclipped": unclipped,
    "`GlobalNorm(1.0)`": lambda: distclip.GlobalNorm(1.0),
    "`Percentile()`": distclip.Percentile,
    "`ZClip()`": distclip.ZClip,
    "`AdaGC()`": distclip.AdaGC,
    "`SkipSpikes()`": distclip.SkipSpikes,
    "`Chain(SkipSpikes(), GlobalNorm(1.0))`": lambda: distclip.Chain(
        distclip.SkipSpikes(), distclip.GlobalNorm(1.0)
    ),
}


@dataclass
class Run:
    """What one training run was like: its final loss, and shares of steps."""

    loss: float
    clipped: float
    skipped: float
    caught: float  # of the corrupted batches: clipped or skipped; NaN without any


def train(make: Make, seed: int, spiky: bool, args: argparse.Namespace) -> Run:
    corpus, offsets = char_lm.read_corpus(), torch.arange(SEQ_LEN + 1)
    share = slice(dist.get_rank(), None, dist.get_world_size())
    torch.manual_seed(seed)
    model = DistributedDataParallel(char_lm.ByteModel(args.model, SEQ_LEN).to(args.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    clipper = distclip.Clipper(model, make())
    draw = torch.Generator().manual_seed(seed)

    losses, reports, bad = [], [], []
    for _ in range(args.steps):
        starts = torch.randint(len(corpus) - SEQ_LEN, (args.batch_size, 1), generator=draw)
        batch = corpus[starts + offsets].to(torch.int64)
        noise = torch.randint(256, batch.shape, generator=draw)
        bad.append(torch.rand((), generator=draw).item() < args.rate and spiky)
        batch = (noise if bad[-1] else batch)[share].to(args.device)
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss * args.factor if bad[-1] else loss).backward()
        reports.append(clipper.step(optimizer))
        losses.append(loss.detach())
        args.bar.update()

    tail = zip(losses[-args.tail :], bad[-args.tail :], strict=True)
    final = torch.stack([loss for loss, corrupted in tail if not corrupted]).mean()
    dist.all_reduce(final)
    clipped, skipped = (torch.stack([getattr(r, x) for r in reports]) for x in ("clipped", "skipped"))
    return Run(
        final.item() / dist.get_world_size(),
        clipped.double().mean().item(),
        skipped.double().mean().item(),
        (clipped | skipped)[torch.tensor(bad, device=args.device)].double().mean().item(),
    )


def row(name: str, runs: list[Run]) -> str:
    losses = [run.loss for run in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    clipped, skipped, caught = (
        statistics.fmean(getattr(run, x) for run in runs) for x in ("clipped", "skipped", "caught")
    )
    return (
        f"| {name} | {statistics.fmean(losses):.3f} ± {spread:.3f} | {clipped:.1%} | {skipped:.1%} "
        f"| {'' if math.isnan(caught) else f'{caught:.0%}'} |"
    )


def main(args: argparse.Namespace) -> None:
    char_lm.WIDTH = args.width
    plan = [("unclipped, no bad batches", unclipped, False)]
    plan += [(name, make, True) for name, make in STRATEGIES.items()]
    table = [
        "| strategy | final loss | steps clipped | steps skipped | bad batches clipped or skipped |",
        "|---|---|---|---|---|",
    ]
    with tqdm(total=len(plan) * args.seeds * args.steps, disable=dist.get_rank() != 0) as args.bar:
        for name, make, spiky in plan:
            args.bar.set_description(name)
            table.append(row(name, [train(make, seed, spiky, args) for seed in range(args.seeds)]))
    if dist.get_rank() == 0:
        print("\n".join(table))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare clipping strategies where batches go bad.")
    parser.add_argument("--model", choices=["rnn", "transformer"], default="transformer")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tail", type=int, default=100, help="steps that the final loss is averaged over")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rate", type=float, default=0.02, help="share of the batches that are corrupted")
    parser.add_argument("--factor", type=float, default=100.0, help="what their loss is multiplied by")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see it run")
    args = parser.parse_args()
    if args.quick:
        args.width, args.steps, args.tail, args.seeds, args.batch_size, args.rate = 16, 12, 5, 2, 4, 0.3
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--batch-size {args.batch_size} cannot be shared out evenly over the ranks")
    return args


if __name__ == "__main__":
    arguments = parse()
    arguments.device = char_lm.start()
    main(arguments)
    char_lm.finish()
