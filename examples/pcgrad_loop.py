"""PCGrad in a plain training loop: wrap the optimizer, give it the losses one by one.

python -m examples.pcgrad_loop [--steps N]
"""

import argparse
from itertools import islice

import torch

from examples.two_tasks import TwoTaskBert, batches
from kernels import PCGrad


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of the losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = TwoTaskBert()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4))
    totals = []
    for batch in islice(batches(), options.steps):
        losses = model(batch)
        optimizer.zero_grad()
        optimizer.pc_backward(losses)  # instead of sum(losses).backward()
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return totals


if __name__ == "__main__":
    print(main()[-1])
