"""An ordinary Accelerate script, made right by one line: a byte-level transformer on Python's own sources.

    python examples/accelerate_train.py                                        # one process
    accelerate launch --cpu --num-processes 2 examples/accelerate_train.py     # DDP on two CPU ranks
    torchrun --standalone --nproc-per-node 2 examples/accelerate_train.py --mixed-precision bf16
    accelerate launch --use-fsdp --fsdp-version 2 examples/accelerate_train.py # on GPUs
    python examples/accelerate_train.py --strategy percentile --checkpoint run # resumes, if that is there

``accelerator.clip_grad_norm_`` is called as in any such script. With a strategy, that decides in the place of
``--max-norm``, and its history is part of the accelerator's checkpoint.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distclip
from distclip.integrations.accelerate import install

WIDTH, LENGTH, BATCH = 64, 64, 16


class ByteModel(nn.Module):
    """Bytes [batch, LENGTH] -> logits of the next byte [batch, LENGTH, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = {"nhead": 4, "dim_feedforward": 4 * WIDTH, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, **layer) for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        h = self.embed(x) + self.position.weight
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(h)


def text(pieces: int) -> TensorDataset:
    """Real text that every machine has, the sources of Python's standard library, in pieces."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
    return TensorDataset(data.long().unfold(0, LENGTH + 1, LENGTH)[:pieces])


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    options = {"mixed_precision": args.mixed_precision, "gradient_accumulation_steps": args.accumulate}
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), **options)
    median = distclip.Percentile(50, multiplier=1.0, history=20, warmup=5, initial=args.max_norm)
    clipping = install(accelerator, median if args.strategy == "percentile" else None)  # <- the one line
    data, model = text(args.steps * args.accumulate * BATCH * accelerator.num_processes), ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if args.checkpoint and args.checkpoint.exists():
        accelerator.load_state(str(args.checkpoint))
        accelerator.print(f"resumed from: {args.checkpoint}")

    step, clipped, losses = 0, torch.zeros((), device=accelerator.device), []
    for (batch,) in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_norm)
                clipped += clipping.report.clipped
                step += 1
                if step % 10 == 0:  # only these steps wait for the device
                    mean = accelerator.reduce(torch.stack(losses[-10 * args.accumulate :]).mean(), "mean")
                    accelerator.print(f"step {step}: loss {mean.item():.3f}, {clipping.report}")
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"clip rate: {clipped.item() / step:.2f}, threshold: {clipping.report.threshold:.3g}")
    if args.checkpoint:
        accelerator.save_state(str(args.checkpoint))
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train with Accelerate, clipped by distclip.")
    parser.add_argument("--strategy", choices=["max-norm", "percentile"], default="max-norm")
    parser.add_argument("--max-norm", type=float, default=0.25)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from, if it is there, and to write")
    main(parser.parse_args())
