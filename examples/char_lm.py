"""Train a small byte-level language model on Python's own source code, with and without clipping.

    torchrun --standalone --nproc-per-node 2 examples/char_lm.py                  # clipped: it learns
    torchrun --standalone --nproc-per-node 2 examples/char_lm.py --unclipped      # the same, blows up
    torchrun --standalone --nproc-per-node 2 examples/char_lm.py --parallel fsdp2 --strategy per-parameter
    python examples/char_lm.py --model transformer                                # one process, no launcher

Runs on the CPU (gloo), or with one GPU per rank (NCCL) where there are enough of them. About a minute.

Every rank draws the same global batch and takes its share, so the norms do not depend on how many ranks
there are, nor on how the model is spread over them: with the same seed, the ``first norms`` printed at the
end agree for ``--parallel ddp``, ``fsdp2``, ``hsdp`` and ``tp``. At the default step size the unclipped run
is NaN within twenty steps or so. At ``--lr 0.3`` it learns too, more slowly: clipping is what makes the
larger step usable.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distclip
from distclip.launching import require_launch

WIDTH = 256
HEADS = 4
TAIL = 20  # steps that the final loss is averaged over
REFRESH = 10  # steps between two looks at the numbers: only these wait for the device


class Recurrent(nn.Module):
    """``h_t = tanh(W x_t + U h_{t-1})``. U starts as 1.2 times a rotation, so gradients grow through time."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(WIDTH, WIDTH)
        self.recurrent = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.recurrent.weight, gain=1.2)

    def forward(self, x: Tensor) -> Tensor:
        h, states = torch.zeros_like(x[:, 0]), []
        for driven in self.input(x).unbind(1):
            h = torch.tanh(driven + self.recurrent(h))
            states.append(h)
        return torch.stack(states, 1)


class Attention(nn.Module):
    """Causal self-attention. The projections of a head lie side by side: a rank can take whole heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.norm(x)).unflatten(-1, (-1, 3 * WIDTH // HEADS)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*heads.chunk(3, -1), is_causal=True)
        return x + self.down(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class ByteModel(nn.Module):
    """Bytes [batch, time] -> logits of the next byte [batch * time, 256]."""

    def __init__(self, kind: str, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(seq_len, WIDTH)) if kind == "transformer" else 0.0
        bodies = [Recurrent()] if kind == "rnn" else [Attention(), MLP(), Attention()]
        self.blocks = nn.Sequential(*bodies, MLP())
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).flatten(0, 1))


def spread(model: ByteModel, parallel: str, device: torch.device) -> nn.Module:
    """The model, spread over all ranks."""
    world = dist.get_world_size()
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "tp":
        # The recurrence and the layer norms are left as they are: plain replicas beside sharded layers.
        whole = ColwiseParallel(output_layouts=Replicate())
        styles = {"embed": whole, "up": ColwiseParallel(), "down": RowwiseParallel(), "head": whole}
        names = [name for name, _ in model.named_modules() if name.split(".")[-1] in styles]
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("tp",))
        return parallelize_module(model, mesh, {name: styles[name.split(".")[-1]] for name in names})
    if parallel == "hsdp":
        mesh = init_device_mesh(device.type, (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_clipper(model: nn.Module, args: argparse.Namespace) -> distclip.Clipper:
    if args.unclipped:  # measures all the same, and lets a NaN through as plain training would
        return distclip.Clipper(model, distclip.GlobalNorm(math.inf), on_nonfinite="propagate")
    limit = args.max_norm
    strategy: distclip.Strategy = {
        "global": lambda: distclip.GlobalNorm(limit),
        "value": lambda: distclip.Value(limit),
        "per-parameter": lambda: distclip.PerParameter(limit),
        "per-group": lambda: distclip.PerGroup({"*embed*": limit, "*head*": limit, "*": limit}),
    }[args.strategy]()
    # A step of zeros is no step for plain SGD, so a non-finite gradient is left out without asking first.
    return distclip.Clipper(model, strategy, on_nonfinite="zero")


def read_corpus(limit: int = 2_000_000) -> Tensor:
    """[limit] uint8: real text that every machine has, the sources of Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))[:limit]), dtype=torch.uint8)


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    # Tensor-parallel ranks work on the same batch together; all others share it out.
    share = slice(None) if args.parallel == "tp" else slice(rank, None, world)
    corpus, offsets = read_corpus(), torch.arange(args.seq_len + 1)
    torch.manual_seed(args.seed)
    model = spread(ByteModel(args.model, args.seq_len).to(device), args.parallel, device)
    # foreach operators do not take DTensors and plain tensors together, which tensor parallelism leaves.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, foreach=False)
    clipper = make_clipper(model, args)
    history = distclip.History(args.history, strategy=clipper.strategy)  # of None, it records nothing
    draw = torch.Generator().manual_seed(args.seed)

    losses, norms, clipped = [], [], torch.zeros((), device=device)
    bar = tqdm(range(1, args.steps + 1), disable=rank != 0, mininterval=0, miniters=REFRESH)
    for step in bar:
        starts = torch.randint(len(corpus) - args.seq_len, (args.batch_size,), generator=draw)
        batch = corpus[starts[share, None] + offsets].to(device, torch.int64)
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        report = clipper.clip(param_norms=history.wants_param_norms)
        optimizer.step()
        history.record(report, loss=loss, lr=args.lr)

        losses.append(loss.detach())
        norms.append(report.total_norm)
        clipped += report.clipped
        if step % REFRESH == 0 and rank == 0:
            seen = report.to_dict()
            bar.set_postfix_str(
                f"loss {loss.item():.3f}, norm {seen['total_norm']:.3g}, ×{seen['coefficient']:.3g}, "
                f"clipped {clipped.item() / step:.0%}",
                refresh=False,
            )
    bar.close()
    history.close()
    summarise(torch.stack(losses), torch.stack(norms), clipped / args.steps)
    if args.history is not None and rank == 0:
        advise(args.history)


def summarise(losses: Tensor, norms: Tensor, clip_rate: Tensor) -> None:
    """Print the run on rank 0. Losses, [steps], are of this rank's share; norms, [steps], of the whole."""
    final = losses[-TAIL:].mean()
    dist.all_reduce(final)
    low, high = (norms.nan_to_num(nan=-1.0) for _ in range(2))  # a NaN is not equal to itself
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        agree = "bit-identical" if torch.equal(low, high) else "DIFFERENT"
        print(f"first norms: {' '.join(f'{norm:.9g}' for norm in norms[:3].tolist())}")
        print(f"clip rate: {clip_rate.item():.3f}")
        print(f"final loss: {final.item() / dist.get_world_size():.4f}")
        print(f"norms on all {dist.get_world_size()} ranks: {agree}")


def advise(path: Path) -> None:
    """What the norms of the run say about the threshold, and a page to look at."""
    from distclip.monitor import read, recommend, write_page  # needs pip install 'distclip[cli]'

    try:
        run = read(path)
        advised = recommend(run)
        write_page(path.with_suffix(".html"), [run])
    except ValueError as error:  # no finite norm, or too few steps
        print(f"no recommendation: {error}")
        return
    rate = f"{advised.expected_clip_rate:.1%} of the steps clipped, here {run.clip_rate:.1%}"
    print(f"recommended: {advised.strategy} ({rate})")
    print(f"report: {path.with_suffix('.html')}")


def start() -> torch.device:
    """Join the other ranks, if a launcher started any; the device of this one."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    require_launch(backend=backend)  # says what does not fit, before ranks wait for each other
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def finish() -> None:
    """Leave the other ranks. No model may be held any more: gloo aborts at exit where an FSDP2 model
    outlives its process group."""
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level language model on Python's sources.")
    parser.add_argument("--model", choices=["rnn", "transformer"], default="rnn")
    parser.add_argument("--parallel", choices=["ddp", "fsdp2", "hsdp", "tp"], default="ddp")
    parser.add_argument(
        "--strategy", choices=["global", "value", "per-parameter", "per-group"], default="global"
    )
    parser.add_argument("--max-norm", type=float, default=1.0, help="the strategy's threshold")
    parser.add_argument("--unclipped", action="store_true", help="only measure")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=Path, help="record the norms here, and recommend a threshold")
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.parallel != "tp" and args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size} cannot be shared out evenly over {world} ranks")
    if args.parallel == "hsdp" and world % 2:
        parser.error(f"--parallel hsdp shards over pairs of ranks: start an even number, not {world}")
    return args


if __name__ == "__main__":
    arguments = parse()
    here = start()
    train(arguments, here)
    finish()
