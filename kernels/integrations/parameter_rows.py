"""The parameters that an optimizer trains, and the rows that hold their task gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed.sharded_tensors import Sharding, local, sharding_of
from ..gradient_buffer import GradientBuffer, Slot, lay_out
from ..task_gradients.task_gradients import TaskGradients
from .kept_vector import KeptVector

Granularity = Literal["model", "group", "tensor"]
ParameterGroups = list[dict[str, Any]]


class Trained(NamedTuple):
    """A parameter that requires a gradient.

    Attributes:
        position: among those of the optimizer.
        group: number of its group, whose parameters share their weights.
        parameter: itself.
    """

    position: int
    group: int
    parameter: Tensor


class ParameterRows(NamedTuple):
    """The task gradients of parameters of one dtype and device, a slot for each.

    Of sharded parameters (DTensor), all in one way, they are those of this rank's shards.

    Attributes:
        trained: the parameters.
        gradients: the rows, with a slot for each.
        combined: memory for their weighted sum.
        sharding: of the parameters; None for whole ones.
    """

    trained: Sequence[Trained]
    gradients: GradientBuffer
    combined: KeptVector
    sharding: Sharding | None

    @classmethod
    def of(cls, trained: Sequence[Trained]) -> "ParameterRows":
        """Give each parameter its columns; there are no rows yet."""
        shapes = {str(entry.position): local(entry.parameter).shape for entry in trained}
        slots, end = lay_out(shapes, alignment=1)
        first = trained[0].parameter
        rows = local(first).new_empty(0, end)
        gradients = GradientBuffer(slots, rows, [entry.group for entry in trained])
        return cls(trained, gradients, KeptVector(), sharding_of(first))

    @classmethod
    def collected(cls, trained: Sequence[Trained], collector: TaskGradients) -> "ParameterRows":
        """Take the rows in which one backward pass collects the gradients of all tasks."""
        entries = {id(entry.parameter): entry for entry in trained}
        ordered = [entries[id(parameter)] for parameter in collector.parameters]
        groups = [entry.group for entry in ordered]
        gradients = GradientBuffer(collector.buffer.slots, collector.rows, groups)
        return cls(ordered, gradients, KeptVector(), None)

    def parameters(self) -> Iterator[tuple[Trained, Slot]]:
        """Yield every parameter and its columns."""
        return zip(self.trained, self.gradients.slots, strict=True)

    def combine(self, weights: Tensor) -> Tensor:
        """``[P]``: the rows combined by weights ``[G, K]``."""
        rows = self.gradients.rows
        return self.gradients.combine(weights, self.combined.take(rows, rows.shape[1]))

    def grams(self) -> Tensor:
        """``[S, K, K]``: the Gram matrix of each segment, of all shards."""
        grams = self.gradients.grams()
        return grams if self.sharding is None else self.sharding.add_shards_(grams)

    def gradient(self, entry: Trained, slot: Slot, combined: Tensor) -> Tensor:
        """Return a parameter's combined gradient, laid out as the parameter.

        Args:
            entry: the parameter.
            slot: its columns.
            combined: ``[P]``, of all columns.
        """
        # `data`: later writes are counted for each gradient by itself.
        gradient = _strided_like(local(entry.parameter), slot.view(combined)).data
        return gradient if self.sharding is None else self.sharding.wrap(gradient, entry.parameter)


def _strided_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the parameter's strides, as autograd does; fused optimizers rely on them."""
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)


def trained_parameters(groups: ParameterGroups, granularity: Granularity) -> Iterator[Trained]:
    """Yield an optimizer's parameters that require a gradient, with the groups they belong to.

    Args:
        groups: the optimizer's.
        granularity: what is balanced together.
    """
    position = 0
    for group_number, group in enumerate(groups):
        for parameter in group["params"]:
            balanced_with = {"model": 0, "group": group_number, "tensor": position}
            if parameter.requires_grad:
                yield Trained(position, balanced_with[granularity], parameter)
                position += 1


def rows_by_kind(trained: Sequence[Trained]) -> Iterator[ParameterRows]:
    """Yield rows for each dtype, device and sharding of parameters."""
    kinds: dict[tuple[object, ...], list[Trained]] = {}
    for entry in trained:
        own = entry.parameter
        kinds.setdefault((own.dtype, own.device, sharding_of(own)), []).append(entry)
    yield from map(ParameterRows.of, kinds.values())


def sum_of_grams(buffers: Sequence[ParameterRows]) -> Tensor:
    """``[G, K, K]``: the Gram matrix of each group."""
    members = [segment.group for own in buffers for segment in own.gradients.segments]
    grams_of_buffers = [buffer.grams() for buffer in buffers]
    first = max(grams_of_buffers, key=lambda matrix: torch.finfo(matrix.dtype).bits)
    grams = torch.cat([matrix.to(first) for matrix in grams_of_buffers])
    if members == [0]:
        return grams
    sets = first.new_zeros(max(members) + 1, *grams.shape[1:])
    index = torch.tensor(members).to(first.device, non_blocking=True)
    return sets.index_add_(0, index, grams)


def layout_of(trained: Sequence[Trained]) -> list[tuple[object, ...]]:
    """Return what the rows depend on; buffers keep parameters, and so their `id`, alive."""
    return [(*numbers, id(p), p.shape, p.dtype, p.device) for *numbers, p in trained]
