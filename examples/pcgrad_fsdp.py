"""PCGrad with FSDP2: each process holds a shard of the parameters and of the optimizer's state.

    torchrun --nproc-per-node 2 -m examples.pcgrad_fsdp [--steps N]

The optimizer is made of the sharded parameters, and balances the task gradients shard by shard.
The loop is that of `examples/pcgrad_ddp.py`.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.pcgrad_ddp import train
from examples.two_tasks import TwoTaskBert
from kernels import PCGrad


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of this process' losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    steps = parser.parse_args(arguments).steps

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # every process makes the same model and keeps its shards
    model = TwoTaskBert()
    for layer in model.encoder.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4))
    totals = train(model, optimizer, steps)
    dist.destroy_process_group()
    return totals


if __name__ == "__main__":
    last = main()[-1]
    if os.environ["RANK"] == "0":
        print(last)
