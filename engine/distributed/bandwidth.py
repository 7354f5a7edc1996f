"""Measure the exchange of gradients and weights, and the memory of each rank."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..gradients.flat_parameters import FlatParameters
from ..optim.build import Optimizer
from .gradient_sync import NoSync


class Traffic(NamedTuple):
    """Bytes, seconds and memory of one rank.

    Attributes:
        sent: bytes that it sends in a step.
        seconds: of one step's exchange without any computation meanwhile, best of three.
        held: bytes of weights, gradient rows and moments.
    """

    sent: int
    seconds: float
    held: int

    def __str__(self) -> str:
        """Return all on one line."""
        return (
            f"each rank sends {self.sent / 2**20:.1f} MiB a step at "
            f"{self.sent / self.seconds / 1e9:.2f} GB/s ({1e3 * self.seconds:.1f} ms with nothing "
            f"to hide behind) and holds {self.held / 2**20:.0f} MiB"
        )


def measure_traffic(sync: NoSync, parameters: FlatParameters, optimizer: Optimizer) -> Traffic:
    """Time the exchange of gradient rows, zero before the first step, and weights, on all ranks."""
    best = min(_once(sync, parameters.rows) for _ in range(3))
    own = parameters.own
    tensors = [parameters.rows, parameters.compute, *own[:3]]
    tensors += optimizer.vectors.values()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return Traffic(sync.bytes_a_step, best, sum(held.values()))


def _once(sync: NoSync, buffer: Tensor) -> float:
    _synchronize(buffer)
    begun = time.perf_counter()
    sync.start()
    sync.wait()
    sync.gather_params()
    _synchronize(buffer)
    return time.perf_counter() - begun


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
