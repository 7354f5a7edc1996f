"""PCGrad inside Lightning: manual optimization, PCGrad is the optimizer, batches are packed.

python -m examples.pcgrad_lightning [--steps N] [--devices N]

With several devices Lightning starts a process for each and wraps the model in
DistributedDataParallel; the processes average the gradient of each task before PCGrad.
"""

import argparse

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from examples.two_tasks import TwoTaskBert, batches
from kernels import PackingCollator, PCGrad, accelerate


class Batches(IterableDataset):
    """The batches of both tasks, without padding."""

    def __iter__(self):
        """Return them."""
        return batches(PackingCollator())


class TwoTasks(lightning.LightningModule):
    """Trains on both tasks' losses at once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = TwoTaskBert()
        accelerate(self.model)
        self.totals: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Wrap the optimizer; Lightning's checkpoints hold the state of both."""
        return PCGrad(torch.optim.AdamW(self.parameters(), lr=5e-4))

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        """Train on one batch of each task."""
        losses = self.model(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer.pc_backward(losses)  # instead of self.manual_backward(sum(losses))
        optimizer.step()
        self.totals.append(sum(loss.item() for loss in losses))


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of the losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--devices", type=int, default=1, help="processes; default: 1")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    module = TwoTasks()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    if options.devices > 1:
        quiet["strategy"] = "ddp"
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="cpu", devices=options.devices, **quiet
    )
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    return module.totals


if __name__ == "__main__":
    last = main()[-1]
    rank_zero_only(print)(last)
