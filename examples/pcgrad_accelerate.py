"""PCGrad with Hugging Face's library accelerate: accumulation, clipping, mixed precision.

    python -m examples.pcgrad_accelerate [--steps N] [--precision no|bf16]
    accelerate launch --config_file examples/accelerate_two_processes.yaml \
        -m examples.pcgrad_accelerate

The second trains on two processes, which average the gradient of each task before PCGrad.
Two things have one name: `accelerate`, the library, which has the Accelerator, and
`kernels.accelerate`, the function that makes a transformers model run packed.
"""

import argparse
from itertools import islice

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device

import kernels
from examples.two_tasks import TwoTaskBert, batches

ACCUMULATE = 2  # batches of each task in a step


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of the losses of every batch of this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100, help="default: 100")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="default: no")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, mixed_precision=options.precision
    )
    model = TwoTaskBert()
    kernels.accelerate(model)  # before `prepare`, which may wrap the model's forward pass
    optimizer = kernels.PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4))
    model, optimizer = accelerator.prepare(model, optimizer)
    pcgrad = optimizer.optimizer  # the library's wrapper has no `pc_backward`

    totals = []
    for batch in islice(batches(kernels.PackingCollator()), options.steps * ACCUMULATE):
        with accelerator.accumulate(model):
            losses = model(send_to_device(batch, accelerator.device))
            # Instead of accelerator.backward(sum(losses)), which would divide the loss by itself.
            pcgrad.pc_backward([loss / ACCUMULATE for loss in losses])
            if accelerator.sync_gradients:  # behind the last batch of a step
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        totals.append(sum(loss.item() for loss in losses))
    return totals


if __name__ == "__main__":
    last = main()[-1]
    PartialState().print(last)  # on the first process alone
