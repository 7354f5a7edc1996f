"""All trainable parameters as one vector, and beside it a row of gradients for each task.

    master  [P]     fp32, what the optimizer updates
    compute [P]     what the model computes with: the master itself, or a bf16 or fp16 copy of it
    rows    [K, P]  the K task gradients, in the dtype of ``compute``

The model's parameters become views of ``compute``, and its layers get views of ``rows``.  Each
parameter starts at a multiple of 64 elements; the gaps hold zeros everywhere and stay zero.
Matrices, which weight decay acts on, come first, then biases and norms: ``[0, decayed)`` decays.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.layers import Embedding, LayerNorm, Linear
from ..model.multitask import MultitaskModel
from ..rooms import kernels

_ALIGNMENT = 64  # elements; 256 bytes in fp32, 128 in bf16: whole cache lines and 16-byte accesses


class Slot(NamedTuple):
    """One parameter's place in the vector."""

    name: str
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """Return this parameter's part of ``flat [..., P]`` as ``[..., *shape]``."""
        part = flat[..., self.offset : self.offset + math.prod(self.shape)]
        return part.view(*flat.shape[:-1], *self.shape)


class FlatParameters:
    """Moves a model's trainable parameters into flat storage and hands out gradient rows.

    Trainable is what the trained tasks reach: the encoder and their own heads.  Heads of other
    tasks are frozen and have no place in the vector, so that no update and no decay moves them.

    Args:
        model: on any device, fp32.
        tasks: the K tasks that are trained; row k belongs to ``tasks[k]``.
        device: where everything goes.
        compute_dtype: fp32, bf16 or fp16.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Sequence[str],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self._tasks = tuple(tasks)
        model.to(device=device)
        trained: list[tuple[str, nn.Parameter]] = []
        frozen: list[tuple[str, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            rows = self._rows_of(name)
            (trained if rows is not None else frozen).append((name, parameter))
        decayed = [(name, p) for name, p in trained if p.dim() > 1]
        undecayed = [(name, p) for name, p in trained if p.dim() <= 1]

        self.slots: dict[str, Slot] = {}
        end = self._place(decayed, 0)
        self.decayed = end
        self.numel = self._place(undecayed, end)

        self.master = torch.zeros(self.numel, device=device)
        for name, parameter in trained:
            self.slots[name].view(self.master).copy_(parameter.detach())
        self.compute = self.master.to(compute_dtype)  # the same tensor for fp32
        self.rows = torch.zeros(len(tasks), self.numel, dtype=compute_dtype, device=device)

        for name, parameter in trained:
            parameter.data = self.slots[name].view(self.compute)
        for _, parameter in frozen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(compute_dtype)
        for name, module in model.named_modules():
            if isinstance(module, Linear | Embedding | LayerNorm):
                self._attach(name, module)

    def _rows_of(self, name: str) -> slice | None:
        """Return the rows that a parameter has: all, its own task's, or none."""
        if not name.startswith("heads."):
            return slice(None)
        task = name.split(".")[1]
        if task not in self._tasks:
            return None
        row = self._tasks.index(task)
        return slice(row, row + 1)

    def _place(self, parameters: Sequence[tuple[str, nn.Parameter]], offset: int) -> int:
        for name, parameter in parameters:
            self.slots[name] = Slot(name, offset, parameter.shape)
            offset += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        return offset

    def _attach(self, name: str, module: Linear | Embedding | LayerNorm) -> None:
        rows = self._rows_of(f"{name}.")
        if rows is None:
            return
        own = self.rows[rows]
        bias = self.slots.get(f"{name}.bias")
        module.rows = kernels.TaskRows(
            self.slots[f"{name}.weight"].view(own), None if bias is None else bias.view(own)
        )

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and its part of ``flat`` (master, a moment, a row)."""
        for name, slot in self.slots.items():
            yield name, slot.view(flat)

    def refresh_compute(self) -> None:
        """Bring ``compute`` up to date after ``master`` was written by other means (loading)."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)
