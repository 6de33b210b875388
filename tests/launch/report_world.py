"""What tests/launch/test_accelerate.py starts: says what Accelerate makes of its launch, from rank 0."""

import json

import torch
from accelerate import Accelerator

import distclip

accelerator = Accelerator()
model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
torch.nn.init.ones_(model[0].weight)
model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
# Ranks average inputs of 1 and 2: the gradient is 1.5 everywhere, if they know of each other.
model(torch.full((1, 3), 1.0 + accelerator.process_index, device=accelerator.device)).sum().backward()
norm = distclip.clip_grad_norm_(model, 1.0)
if accelerator.is_main_process:
    said = {
        "type": accelerator.distributed_type.name,
        "world": accelerator.num_processes,
        "mixed": accelerator.mixed_precision,
        "norm": norm.item(),
    }
    print(json.dumps(said))
accelerator.end_training()
