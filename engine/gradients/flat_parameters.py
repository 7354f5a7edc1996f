"""Keep all trainable parameters in one vector, and their task gradients in one buffer.

    compute [P]     the weights that the model computes with, fp32, bf16 or fp16
    rows    [K, P]  the gradient buffer: K task gradients, in the dtype of ``compute``
    own             the columns that this process updates, all or a rank's shard, with fp32 masters
                    of the weights

The model describes its parameters (engine/models/parameters.py).  They become views of ``compute``,
and shared layers get their columns of ``rows``.  Parameters of one task alone (heads, adapters)
have their columns of that task's row as ``grad``, into which autograd adds.  If each step trains
one task, the buffer has one row.  :class:`~engine.gradients.layout.Layout` stores the parameters'
offsets.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels
from ..models.layers import GradientWrite, TaskLayer
from ..models.multitask import MultitaskModel
from ..runtime.oom import SMALLER_MODEL, check_memory
from .layout import Layout, Piece, Slot


class OwnVectors(NamedTuple):
    """Columns that one process updates, S of them: all P, or the shard of one rank.

    Attributes:
        master: ``[S]`` fp32.
        compute: ``[S]``, the master itself for fp32, else its low-precision copy.
        rows: ``[K, S]`` task gradients of the whole step.
        decayed: columns before this one decay.
        pieces: for each bucket, its columns in the whole vector and in this one.
    """

    master: Tensor
    compute: Tensor
    rows: Tensor
    decayed: int
    pieces: Sequence[Piece]


class FlatParameters:
    """A model's trainable parameters in flat storage, with their gradient buffer.

    The trained tasks' encoder and heads are trainable.  Heads of other tasks are frozen and not in
    the vector, so that no update and no weight decay changes them.

    Args:
        model: on any device, fp32.
        tasks: the K tasks that are trained; row k belongs to ``tasks[k]``.
        device: of weights and gradients.
        compute_dtype: fp32, bf16 or fp16.
        freeze_encoder: train all but the encoder.
        take_turns: each step trains one of the tasks, whose gradient goes into the only row.
        shard: (rank, ranks) that the update is divided among; (0, 1) for an undivided one.

    Attributes:
        specs: the model's description of each parameter, by name.
        layout: the offset of each parameter.
        gradients: the buffer of ``rows``.
        compute: ``[P]``.
        rows: ``[K, P]``, written by backward passes of this process.
        own: the columns that this process updates.
        frozen: fp32 weights that are not trained, by name; the model computes with a copy.
        frozen_compute: these copies, the same tensors for fp32.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Sequence[str],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        freeze_encoder: bool = False,
        take_turns: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        model.to(device=device)
        specs = model.parameter_specs(tasks, freeze_encoder=freeze_encoder)
        self.specs = {spec.name: spec for spec in specs}
        trained = [spec for spec in specs if spec.tasks]
        rank, ranks = shard
        self.layout = Layout(
            {spec.name: spec.parameter.shape for spec in trained},
            {spec.name: spec.bucket for spec in trained},
            ranks,
        )
        num_rows = 1 if take_turns else len(tasks)
        if device.type == "cpu":
            moments = 2 * torch.float32.itemsize // ranks
            column = torch.float32.itemsize + num_rows * compute_dtype.itemsize + moments
            check_memory(self.numel * column, SMALLER_MODEL)
        master = torch.zeros(self.layout.numel, device=device)
        for spec in trained:
            self.slots[spec.name].view(master).copy_(spec.parameter.detach())
        self.compute = master.to(compute_dtype)  # the same tensor for fp32
        self.gradients = kernels.gradient_buffer.GradientBuffer(
            tuple(self.slots.values()),
            torch.zeros(num_rows, self.numel, dtype=compute_dtype, device=device),
        )
        self.rows = self.gradients.rows
        self.own = (
            OwnVectors(master, self.compute, self.rows, self.decayed, self.layout.pieces(rank))
            if ranks == 1
            else self._shard_of(rank, master)
        )

        self._to_clear = self._rows_written(GradientWrite.ADDED)
        self._sparse = self._rows_written(GradientWrite.SPARSE)
        self.frozen: dict[str, Tensor] = {}
        self.frozen_compute: list[Tensor] = []
        for spec in specs:
            spec.parameter.requires_grad_(bool(spec.tasks))
            if not spec.tasks:
                self.frozen[spec.name] = spec.parameter.detach()
                # The same tensor for fp32.
                spec.parameter.data = spec.parameter.data.to(compute_dtype)
                self.frozen_compute.append(spec.parameter.detach())
                continue
            slot = self.slots[spec.name]
            spec.parameter.data = slot.view(self.compute)
            if spec.owner is not None:
                row = self.rows[0 if take_turns else tasks.index(spec.owner)]
                spec.parameter.grad = slot.view(row)
        self._attach_rows()
        model.encoder.choose_planned()

    @property
    def slots(self) -> dict[str, Slot]:
        """The columns of each parameter, by name."""
        return self.layout.slots

    @property
    def decayed(self) -> int:
        """The number of columns at the start that weight decay acts on: those of matrices."""
        return self.layout.decayed

    @property
    def numel(self) -> int:
        """The number of columns, P."""
        return self.layout.numel

    @property
    def master(self) -> Tensor:
        """The fp32 weights that this process updates, ``[S]``."""
        return self.own.master

    def _shard_of(self, rank: int, master: Tensor) -> OwnVectors:
        pieces = self.layout.pieces(rank)
        own = torch.cat([master[piece.start : piece.start + piece.size] for piece in pieces])
        return OwnVectors(
            own,
            own.to(self.compute.dtype),
            self.rows.new_zeros(len(self.rows), len(own)),
            sum(piece.size for piece in pieces if piece.start < self.decayed),
            pieces,
        )

    def _rows_written(self, write: GradientWrite) -> list[Tensor]:
        """Return the columns ``[K, n]`` of all parameters that are written this way.

        Neighbours are joined, with the gaps between them, which hold zeros: a launch for all.
        """
        joined: list[slice] = []
        ends = [*(slot.offset for slot in self.slots.values()), self.numel][1:]
        for (name, slot), end in zip(self.slots.items(), ends, strict=True):
            if self.specs[name].write is not write:
                continue
            start = joined.pop().start if joined and joined[-1].stop == slot.offset else slot.offset
            joined.append(slice(start, end))
        return [self.rows[:, columns] for columns in joined]

    def _attach_rows(self) -> None:
        """Give each shared layer its columns of the gradient buffer."""
        columns: dict[TaskLayer, dict[str, kernels.Columns]] = {}
        for spec in self.specs.values():
            if spec.layer is not None:
                own = columns.setdefault(spec.layer, {})
                if spec.tasks:
                    own[spec.name_in_layer] = self.slots[spec.name].columns
        for layer, own in columns.items():
            layer.attach_rows(self.rows, own)

    def clear_partial_gradients(self) -> None:
        """Zero the task gradients that a step's backward passes add to, or may not reach."""
        if self._to_clear:
            torch._foreach_zero_(self._to_clear)

    def zero_sparse_rows(self) -> None:
        """Zero all task gradients of tables, also what other ranks added."""
        if self._sparse:
            torch._foreach_zero_(self._sparse)

    def tasks_using(self, name: str) -> tuple[str, ...]:
        """Return the trained tasks whose losses reach a parameter."""
        return self.specs[name].tasks

    def columns_used_by(self, task: str) -> list[slice]:
        """Return the columns in which a task's gradient can differ from zero."""
        columns: list[slice] = []
        ends = [*(slot.offset for slot in self.slots.values()), self.numel][1:]
        for (name, slot), end in zip(self.slots.items(), ends, strict=True):
            if task not in self.specs[name].tasks:
                continue
            if columns and columns[-1].stop == slot.offset:
                columns[-1] = slice(columns[-1].start, end)
            else:
                columns.append(slice(slot.offset, end))
        return columns

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and its view of a vector ``[P]`` (a row, all masters)."""
        return self.layout.named_views(flat)

    def refresh_compute(self) -> None:
        """Copy the fp32 weights to those that the model computes with, after loading them."""
        if self.own.compute is not self.own.master:
            self.own.compute.copy_(self.own.master)
        for compute, weight in zip(self.frozen_compute, self.frozen.values(), strict=True):
            compute.copy_(weight)
