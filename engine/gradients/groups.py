"""Parameter groups that are balanced separately: the model, its layers, or its tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._kernels import kernels
from ..models.parameters import ParameterSpec
from .flat_parameters import FlatParameters
from .layout import Piece

GRANULARITIES = ("model", "layer", "tensor")

Segment = kernels.gradient_buffer.Segment


class ParamGroups:
    """The G parameter groups that are balanced separately.

    Args:
        parameters: the flat vector.
        tasks: the K trained tasks.
        granularity: ``"model"``: one group; ``"layer"``: each stage of the encoder, each head and
            adapter, and the layer that heads share; ``"tensor"``: each parameter.

    Attributes:
        names: of the G groups.
        sole_tasks: for each group the number of the only task that uses it; None where several do.
        segments: the groups' columns in the vector that this process updates, ascending, no gaps.
        shares: ``[G]`` fp32, of all parameters.
    """

    def __init__(self, parameters: FlatParameters, tasks: Sequence[str], granularity: str) -> None:
        numbers: dict[str, int] = {}
        reached: list[set[str]] = []  # by which tasks, of each group
        starts: list[tuple[int, int]] = []  # group and first column of each segment
        for name, slot in parameters.slots.items():
            spec = parameters.specs[name]
            group = numbers.setdefault(_group_of(spec, granularity), len(numbers))
            if group == len(reached):
                reached.append(set())
            reached[group].update(spec.tasks)
            if not starts or starts[-1][0] != group:
                starts.append((group, slot.offset))
        ends = [*(offset for _, offset in starts[1:]), parameters.numel]
        self._pieces = parameters.own.pieces
        self._whole = [
            Segment(group, slice(begin, end))
            for (group, begin), end in zip(starts, ends, strict=True)
        ]
        self.names = tuple(numbers)
        self.sole_tasks = tuple(
            tasks.index(next(iter(names))) if len(names) == 1 < len(tasks) else None
            for names in reached
        )
        self.segments = own_segments(self._whole, self._pieces)
        self._offsets = [0, *(segment.columns.stop for segment in self.segments)]
        device = parameters.rows.device
        members = [segment.group for segment in self.segments]
        self._in_order = members == list(range(len(numbers)))
        # The segments of each group, filled up with the number of a segment of zeros.
        own = [[n for n, g in enumerate(members) if g == group] for group in numbers.values()]
        longest = max(map(len, own), default=0)
        padded = [each + [len(members)] * (longest - len(each)) for each in own]
        self._members = torch.tensor(padded, dtype=torch.int64, device=device)
        sizes = torch.zeros(len(numbers))
        for segment in self._whole:
            sizes[segment.group] += segment.columns.stop - segment.columns.start
        self.shares = (sizes / parameters.numel).to(device)

    def segments_of(self, columns: Sequence[slice]) -> tuple[Segment, ...]:
        """Return the segments of some columns of the whole vector, which are ascending."""
        cut = [
            Segment(segment.group, slice(start, stop))
            for segment in self._whole
            for wanted in columns
            if (start := max(wanted.start, segment.columns.start))
            < (stop := min(wanted.stop, segment.columns.stop))
        ]
        return own_segments(cut, self._pieces)

    def grams(self, rows: Tensor) -> Tensor:
        """Return the Gram matrix of each group, ``[G, K, K]``, in one pass over ``own.rows``."""
        of_segments = kernels.gram(rows, self._offsets)
        if self._in_order:
            return of_segments
        # A sum in the same order each time, which index_add_ has not on a GPU.
        zeros = of_segments.new_zeros(1, *of_segments.shape[1:])
        return torch.cat([of_segments, zeros])[self._members].sum(1)


def own_segments(whole: Sequence[Segment], pieces: Sequence[Piece]) -> tuple[Segment, ...]:
    """Return segments of the whole vector in a rank's own; neighbours of one group are joined."""
    own: list[Segment] = []
    for piece in pieces:
        for group, columns in whole:
            first = max(columns.start, piece.start) - piece.start
            last = min(columns.stop, piece.start + piece.size) - piece.start
            if first >= last:
                continue
            begin, end = piece.own + first, piece.own + last
            if own and own[-1].group == group and own[-1].columns.stop == begin:
                begin = own.pop().columns.start
            own.append(Segment(group, slice(begin, end)))
    return tuple(own)


def _group_of(spec: ParameterSpec, granularity: str) -> str:
    """Return the name of the group that a parameter belongs to."""
    return {"model": "model", "layer": spec.stage.name, "tensor": spec.name}[granularity]
