"""Scripts of Accelerate, the Hugging Face Trainer and Lightning; ``sys.argv[1]`` says which."""

import sys

import torch
from torch import nn

KIND = sys.argv[1]
torch.manual_seed(0)
DATA = torch.utils.data.TensorDataset(torch.randn(64, 6) * 3, torch.randn(64, 4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x, labels=None):
        out = self.body(x)
        return {"loss": (out - labels).square().mean() * 50, "out": out}


def accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Net()
    loader = torch.utils.data.DataLoader(DATA, batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(model(x, y)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def trainer():
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=sys.argv[2],
        max_steps=6,
        per_device_train_batch_size=8,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=100,
        remove_unused_columns=False,
    )

    def collate(rows):
        return {"x": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}

    Trainer(model=Net(), args=arguments, train_dataset=DATA, data_collator=collate).train()


def lightning():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    fit = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit.fit(Module(), torch.utils.data.DataLoader(DATA, batch_size=8, num_workers=0))


{"accelerate": accelerate, "trainer": trainer, "lightning": lightning}[KIND]()
print("done")
