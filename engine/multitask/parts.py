"""How the parameters are parted for surgery: the model as a whole, layer by layer, or by tensor."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..rooms import kernels
from .flat_parameters import FlatParameters

EXTENTS = ("model", "layer", "tensor")


class Region(NamedTuple):
    """Neighbouring columns of the flat vector that belong to one part."""

    part: int
    columns: slice


class Parts:
    """The G parts of the parameters that get weights of their own.

    Args:
        parameters: the flat vector.
        tasks: the K trained tasks.
        extent: ``"model"``: one part; ``"layer"``: embeddings, each layer of the encoder and each
            head; ``"tensor"``: each parameter.

    Attributes:
        names: of the G parts.
        owners: for each part the number of the one task that reaches it, or None.
        regions: the columns of all parts, ascending and without gaps.
    """

    def __init__(self, parameters: FlatParameters, tasks: Sequence[str], extent: str) -> None:
        numbers: dict[str, int] = {}
        starts: list[tuple[int, int]] = []  # part and first column of each region
        for name, slot in parameters.slots.items():
            part = numbers.setdefault(_part_of(name, extent), len(numbers))
            if not starts or starts[-1][0] != part:
                starts.append((part, slot.offset))
        ends = [*(offset for _, offset in starts[1:]), parameters.numel]
        self.names = tuple(numbers)
        self.owners = tuple(_owner(name, tasks) for name in numbers)
        self.regions = tuple(
            Region(part, slice(begin, end)) for (part, begin), end in zip(starts, ends, strict=True)
        )
        self._offsets = [0, *ends]
        assert all(begin <= end for begin, end in pairwise(self._offsets))
        device = parameters.rows.device
        self._members = torch.tensor([region.part for region in self.regions], device=device)
        sizes = torch.zeros(len(numbers), device=device)
        columns = torch.tensor(self._offsets, device=device).diff().float()
        self._shares = sizes.index_add_(0, self._members, columns) / parameters.numel

    def grams(self, rows: Tensor) -> Tensor:
        """Return the Gram matrix of each part, ``[G, K, K]``, in one pass over the rows."""
        of_regions = kernels.gram(rows, self._offsets)
        if len(self.names) == len(self.regions):
            return of_regions
        of_parts = of_regions.new_zeros(len(self.names), *of_regions.shape[1:])
        return of_parts.index_add_(0, self._members, of_regions)

    def average(self, weights: Tensor) -> Tensor:
        """Return the mean ``[K]`` of weights ``[G, K]``, each part counted by its parameters."""
        return self._shares @ weights


def _part_of(name: str, extent: str) -> str:
    """Return the name of the part that a parameter belongs to."""
    if extent == "model":
        return "model"
    if extent == "tensor":
        return name
    path = name.split(".")
    if path[0] == "heads":
        return ".".join(path[:2])
    return ".".join(path[: 3 if path[1] == "layers" else 2])


def _owner(part: str, tasks: Sequence[str]) -> int | None:
    path = part.split(".")
    return tasks.index(path[1]) if path[0] == "heads" else None
