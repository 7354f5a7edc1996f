"""All trainable parameters as one vector, and beside it a row of gradients for each task.

    compute [P]     what the model computes with, fp32, bf16 or fp16
    rows    [K, P]  the K task gradients, in the dtype of ``compute``
    own             what this process updates: the same columns, or a rank's part of them, with
                    fp32 masters of the weights

The model's parameters become views of ``compute``, and its layers get views of ``rows``; where
each stands says its :class:`~engine.multitask.layout.Layout`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.layers import Embedding, LayerNorm, Linear
from ..model.multitask import MultitaskModel
from ..rooms import kernels
from .layout import Layout, Piece, Slot


class OwnVectors(NamedTuple):
    """What one process updates, S columns: all P of them, or the part of one rank.

    Attributes:
        master: ``[S]`` fp32.
        compute: ``[S]``, the master itself for fp32, else its low-precision copy.
        rows: ``[K, S]`` task gradients of the whole step.
        decayed: columns before this one decay.
        pieces: where the columns come from, ascending.
    """

    master: Tensor
    compute: Tensor
    rows: Tensor
    decayed: int
    pieces: Sequence[Piece]


class FlatParameters:
    """Moves a model's trainable parameters into flat storage and hands out gradient rows.

    Trainable is what the trained tasks reach: the encoder and their own heads.  Heads of other
    tasks are frozen and have no place in the vector, so that no update and no decay moves them.

    Args:
        model: on any device, fp32.
        tasks: the K tasks that are trained; row k belongs to ``tasks[k]``.
        device: where everything goes.
        compute_dtype: fp32, bf16 or fp16.
        shard: (rank, ranks) among which the update is divided; (0, 1) keeps it whole.

    Attributes:
        layout: where each parameter stands.
        compute: ``[P]``.
        rows: ``[K, P]``, written by backward passes of this process.
        own: what it updates.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Sequence[str],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._tasks = tuple(tasks)
        model.to(device=device)
        trained: list[tuple[str, nn.Parameter]] = []
        frozen: list[tuple[str, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            rows = self._rows_of(name)
            (trained if rows is not None else frozen).append((name, parameter))

        rank, ranks = shard
        self.layout = Layout({name: p.shape for name, p in trained}, ranks)
        master = torch.zeros(self.layout.numel, device=device)
        for name, parameter in trained:
            self.slots[name].view(master).copy_(parameter.detach())
        self.compute = master.to(compute_dtype)  # the same tensor for fp32
        self.rows = torch.zeros(len(tasks), self.numel, dtype=compute_dtype, device=device)
        self.own = (
            OwnVectors(master, self.compute, self.rows, self.decayed, [Piece(0, 0, self.numel)])
            if ranks == 1
            else self._part_of_rank(rank, master)
        )

        for name, parameter in trained:
            parameter.data = self.slots[name].view(self.compute)
        for _, parameter in frozen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(compute_dtype)
        for name, module in model.named_modules():
            if isinstance(module, Linear | Embedding | LayerNorm):
                self._attach(name, module)

    @property
    def slots(self) -> dict[str, Slot]:
        """The place of each parameter, by name."""
        return self.layout.slots

    @property
    def decayed(self) -> int:
        """Columns before this one belong to matrices, which weight decay acts on."""
        return self.layout.decayed

    @property
    def numel(self) -> int:
        """P."""
        return self.layout.numel

    @property
    def master(self) -> Tensor:
        """The fp32 weights that this process updates, ``[S]``."""
        return self.own.master

    def _part_of_rank(self, rank: int, master: Tensor) -> OwnVectors:
        pieces = self.layout.pieces(rank)
        own = torch.cat([master[piece.start : piece.start + piece.size] for piece in pieces])
        return OwnVectors(
            own,
            own.to(self.compute.dtype),
            self.rows.new_zeros(len(self.rows), len(own)),
            sum(piece.size for piece in pieces if piece.start < self.decayed),
            pieces,
        )

    def _rows_of(self, name: str) -> slice | None:
        """Return the rows that a parameter has: all, its own task's, or none."""
        if not name.startswith("heads."):
            return slice(None)
        task = name.split(".")[1]
        if task not in self._tasks:
            return None
        row = self._tasks.index(task)
        return slice(row, row + 1)

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
        """Yield every parameter's name and its part of a whole vector (a row, all masters)."""
        return self.layout.named_views(flat)

    def refresh_compute(self) -> None:
        """Bring ``own.compute`` up to date after the masters were written by loading."""
        if self.own.compute is not self.own.master:
            self.own.compute.copy_(self.own.master)
