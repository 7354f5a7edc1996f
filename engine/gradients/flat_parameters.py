"""All trainable parameters as one vector, and beside it a row of gradients for each task.

    compute [P]     what the model computes with, fp32, bf16 or fp16
    rows    [K, P]  the K task gradients, in the dtype of ``compute``
    own             what this process updates: the same columns, or a rank's shard of them, with
                    fp32 masters of the weights

The model describes its parameters (engine/models/parameters.py).  They become views of ``compute``,
and shared layers get their columns of ``rows``.  What belongs to one task alone (heads, adapters)
has its part of that task's row as its ``grad``, into which autograd adds.  Where the tasks take
turns, one a step, there is one row for all.  :class:`~engine.gradients.layout.Layout` stores the
parameters' offsets.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels
from ..models.layers import GradientWrite, TaskLayer
from ..models.multitask import MultitaskModel
from ..models.parameters import ParameterSpec
from ..runtime.oom import SMALLER_MODEL, check_memory
from .layout import Layout, Piece, Slot


class OwnVectors(NamedTuple):
    """Columns that one process updates, S of them: all P, or the shard of one rank.

    Attributes:
        master: ``[S]`` fp32.
        compute: ``[S]``, the master itself for fp32, else its low-precision copy.
        rows: ``[K, S]`` task gradients of the whole step.
        decayed: columns before this one decay.
        pieces: of each bucket, where its columns come from.
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
        freeze_encoder: train all but the encoder.
        take_turns: each step trains one of the tasks, whose gradient goes into the only row.
        shard: (rank, ranks) among which the update is divided; (0, 1) keeps it whole.

    Attributes:
        specs: what the model says of each of its parameters, by name.
        layout: where each parameter stands.
        gradients: the buffer of ``rows``.
        compute: ``[P]``.
        rows: ``[K, P]``, written by backward passes of this process.
        own: what it updates.
        frozen: fp32 weights that are not trained, by name; the model computes with a copy.
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
            else self._part_of_rank(rank, master)
        )

        self._to_clear = self._rows_written(trained, GradientWrite.ADDED)
        self._sparse = self._rows_written(trained, GradientWrite.SPARSE)
        self.frozen: dict[str, Tensor] = {}
        self._frozen_compute: list[Tensor] = []
        for spec in specs:
            spec.parameter.requires_grad_(bool(spec.tasks))
            if not spec.tasks:
                self.frozen[spec.name] = spec.parameter.detach()
                # The same tensor for fp32.
                spec.parameter.data = spec.parameter.data.to(compute_dtype)
                self._frozen_compute.append(spec.parameter.detach())
                continue
            slot = self.slots[spec.name]
            spec.parameter.data = slot.view(self.compute)
            if spec.owner is not None:
                row = self.rows[0 if take_turns else tasks.index(spec.owner)]
                spec.parameter.grad = slot.view(row)
        self._attach_rows()

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

    def _rows_written(self, trained: Sequence[ParameterSpec], write: GradientWrite) -> list[Tensor]:
        """Return the gradient rows ``[K, *shape]`` of parameters that are written in some way."""
        return [self.slots[s.name].view(self.rows) for s in trained if s.write is write]

    def _attach_rows(self) -> None:
        """Tell each shared layer where its task gradients go."""
        columns: dict[TaskLayer, dict[str, kernels.Columns]] = {}
        for spec in self.specs.values():
            if spec.layer is not None:
                own = columns.setdefault(spec.layer, {})
                if spec.tasks:
                    own[spec.name_in_layer] = self.slots[spec.name].columns
        for layer, own in columns.items():
            layer.attach_rows(self.rows, own)

    def clear_partial_gradients(self) -> None:
        """Zero the gradient rows that a step's backward pass adds to or may not reach at all."""
        if self._to_clear:
            torch._foreach_zero_(self._to_clear)

    def zero_sparse_rows(self) -> None:
        """Zero all gradient rows of tables, whoever has written into them."""
        if self._sparse:
            torch._foreach_zero_(self._sparse)

    def tasks_using(self, name: str) -> tuple[str, ...]:
        """Return the trained tasks whose losses reach a parameter."""
        return self.specs[name].tasks

    def columns_used_by(self, task: str) -> list[slice]:
        """Return the columns that a task's gradient may have other values than zero in."""
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
        """Yield every parameter's name and its part of a whole vector (a row, all masters)."""
        return self.layout.named_views(flat)

    def refresh_compute(self) -> None:
        """Bring what the model computes with up to date after fp32 weights were loaded."""
        if self.own.compute is not self.own.master:
            self.own.compute.copy_(self.own.master)
        for compute, weight in zip(self._frozen_compute, self.frozen.values(), strict=True):
            compute.copy_(weight)
