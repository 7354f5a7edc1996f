"""How the parameters are parted for surgery: the model as a whole, layer by layer, or by tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels
from ..models.parameters import ParameterSpec
from .flat_parameters import FlatParameters
from .layout import Piece

GRANULARITIES = ("model", "layer", "tensor")


class Segment(NamedTuple):
    """Neighbouring columns of the flat vector that belong to one part."""

    part: int
    columns: slice


class ParamGroups:
    """The G parts of the parameters that get weights of their own.

    Args:
        parameters: the flat vector.
        tasks: the K trained tasks.
        extent: ``"model"``: one part; ``"layer"``: each stage of the encoder, each head and
            adapter, and the layer that heads share; ``"tensor"``: each parameter.

    Attributes:
        names: of the G parts.
        owners: for each part the number of the one task that reaches it, or None.
        regions: the parts' columns among those that this process updates, ascending, no gaps.
    """

    def __init__(self, parameters: FlatParameters, tasks: Sequence[str], extent: str) -> None:
        numbers: dict[str, int] = {}
        reached: list[set[str]] = []  # by which tasks, of each part
        starts: list[tuple[int, int]] = []  # part and first column of each region
        for name, slot in parameters.slots.items():
            spec = parameters.specs[name]
            part = numbers.setdefault(_part_of(spec, extent), len(numbers))
            if part == len(reached):
                reached.append(set())
            reached[part].update(spec.tasks)
            if not starts or starts[-1][0] != part:
                starts.append((part, slot.offset))
        ends = [*(offset for _, offset in starts[1:]), parameters.numel]
        self._pieces = parameters.own.pieces
        self._whole = [
            Segment(part, slice(begin, end))
            for (part, begin), end in zip(starts, ends, strict=True)
        ]
        self.names = tuple(numbers)
        self.owners = tuple(
            tasks.index(next(iter(names))) if len(names) == 1 < len(tasks) else None
            for names in reached
        )
        self.regions = _own_regions(self._whole, self._pieces)
        self._offsets = [0, *(region.columns.stop for region in self.regions)]
        device = parameters.rows.device
        members = [region.part for region in self.regions]
        self._in_order = members == list(range(len(numbers)))
        self._members = torch.tensor(members, device=device)
        sizes = torch.zeros(len(numbers))
        for region in self._whole:
            sizes[region.part] += region.columns.stop - region.columns.start
        self._shares = (sizes / parameters.numel).to(device)

    def regions_of(self, columns: Sequence[slice]) -> tuple[Segment, ...]:
        """Return the regions of some columns of the whole vector, which are ascending."""
        cut = [
            Segment(region.part, slice(start, stop))
            for region in self._whole
            for wanted in columns
            if (start := max(wanted.start, region.columns.start))
            < (stop := min(wanted.stop, region.columns.stop))
        ]
        return _own_regions(cut, self._pieces)

    def grams(self, rows: Tensor) -> Tensor:
        """Return the Gram matrix of each part, ``[G, K, K]``, in one pass over ``own.rows``."""
        of_regions = kernels.gram(rows, self._offsets)
        if self._in_order:
            return of_regions
        of_parts = of_regions.new_zeros(len(self.names), *of_regions.shape[1:])
        return of_parts.index_add_(0, self._members, of_regions)

    def average(self, weights: Tensor) -> Tensor:
        """Return the mean ``[K]`` of weights ``[G, K]``, each part counted by its parameters."""
        return self._shares @ weights


def _own_regions(whole: Sequence[Segment], pieces: Sequence[Piece]) -> tuple[Segment, ...]:
    """Return the regions as they lie in the vector that the pieces make up, neighbours joined."""
    own: list[Segment] = []
    for piece in pieces:
        for part, columns in whole:
            first = max(columns.start, piece.start) - piece.start
            last = min(columns.stop, piece.start + piece.size) - piece.start
            if first >= last:
                continue
            begin, end = piece.own + first, piece.own + last
            if own and own[-1].part == part and own[-1].columns.stop == begin:
                begin = own.pop().columns.start
            own.append(Segment(part, slice(begin, end)))
    return tuple(own)


def _part_of(spec: ParameterSpec, extent: str) -> str:
    """Return the name of the part that a parameter belongs to."""
    return {"model": "model", "layer": spec.stage.name, "tensor": spec.name}[extent]
