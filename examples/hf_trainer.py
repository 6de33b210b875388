"""Hugging Face's Trainer with a strategy in the place of ``max_grad_norm``: a small GPT-2 on Python's source.

    python examples/hf_trainer.py                                                      # one process
    torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py --strategy zclip   # DDP
    accelerate launch --cpu --num-processes 2 examples/hf_trainer.py
    python examples/hf_trainer.py --output run --resume                                # from its checkpoint

The model is made from a configuration and the text is on every machine, so nothing is downloaded. The logs
show ``grad_norm``, ``clip_threshold`` and ``clip_rate``; checkpoints have the strategy's history.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import distclip
from distclip.integrations.transformers import install

LENGTH = 64
STRATEGIES = {
    "max-norm": None,
    "percentile": lambda: distclip.Percentile(90, multiplier=1.0, warmup=10),
    "zclip": distclip.ZClip,
    "per-parameter": lambda: distclip.PerParameter(0.1),
}


class Bytes(Dataset):
    """Real text that every machine has, the sources of Python's standard library, in pieces of LENGTH."""

    def __init__(self, limit: int = 500_000) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = bytearray(b"".join(map(Path.read_bytes, files))[: limit // LENGTH * LENGTH])
        self.pieces = torch.frombuffer(data, dtype=torch.uint8).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        piece = self.pieces[i].long()
        return {"input_ids": piece, "labels": piece}


def main(args: argparse.Namespace, output: str) -> None:
    set_seed(0)
    size = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 256, "n_positions": LENGTH}
    size["loss_type"] = "ForCausalLM"
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output,
        max_steps=args.steps,
        max_grad_norm=args.max_norm,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        logging_steps=args.log_every,
        save_steps=args.save_every or args.steps,
        report_to=[],
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=Bytes())
    clipping = install(trainer, STRATEGIES[args.strategy])  # <- the one line
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "clip_rate" in entry]
        print(f"first loss: {history[0]['loss']:.3f}")
        print(f"final loss: {history[-1]['loss']:.3f} (uniform: {math.log(256):.3f})")
        print(f"clip rate: {sum(entry['clip_rate'] for entry in history) / len(history):.2f}")
        print(f"last step: {clipping.report}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train with Hugging Face's Trainer, clipped by distclip.")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="max-norm")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, help="steps; at the end alone by default")
    parser.add_argument("--output", help="folder for checkpoints; none are kept without it")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        main(options, options.output or nowhere)
