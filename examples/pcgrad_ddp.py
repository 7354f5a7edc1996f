"""PCGrad in a training loop of several processes, with torch's DistributedDataParallel.

    torchrun --nproc-per-node 2 -m examples.pcgrad_ddp [--steps N] [--timeout SECONDS]

Each process computes the losses of its part of every batch.  The processes average the gradient of
each task before PCGrad combines them, so that all do the step that one process does with the whole
batch.  Without torchrun it trains alone.
"""

import argparse
import os
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.two_tasks import TwoTaskBert, batches
from kernels import PCGrad


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of this process' losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds to wait for another process"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = TwoTaskBert()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4))
    if "WORLD_SIZE" not in os.environ:  # which torchrun sets
        return train(model, optimizer, options.steps)
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    totals = train(DistributedDataParallel(model), optimizer, options.steps)
    dist.destroy_process_group()
    return totals


def train(model: torch.nn.Module, optimizer: PCGrad, steps: int) -> list[float]:
    """Train the model, wrapped or not: the loop is the same."""
    totals = []
    for batch in islice(batches(), steps):
        losses = model(batch)
        optimizer.zero_grad()
        optimizer.pc_backward(losses)  # instead of sum(losses).backward()
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return totals


if __name__ == "__main__":
    last = main()[-1]
    if os.environ.get("RANK", "0") == "0":
        print(last)
