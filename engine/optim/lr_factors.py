"""Factors on the learning rate: lower layers slower, heads at a rate of their own.

Layers of a pretrained encoder are the more general the lower they are, and need to change less:
Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018; Clark et
al., "ELECTRA", 2020.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment, own_segments
from ..models.multitask import MultitaskModel


def lr_factors(
    model: MultitaskModel, *, lr: float, head_lr: float, layer_lr_decay: float
) -> dict[str, float]:
    """Return the factor on the learning rate of each stage of a model, by the stage's name.

    Args:
        model: encoder and heads.
        lr: peak rate of the encoder's last layer.
        head_lr: peak rate of all outside the encoder; 0: ``lr``.
        layer_lr_decay: factor from each layer to the one below, down to the embeddings.  A last
            norm, without matrices, belongs to the last layer.

    Returns:
        The factors; empty where all are 1.
    """
    factors = {stage.name: head_lr / lr if head_lr else 1.0 for stage in model.stages()}
    depth = 0
    for stage in reversed(model.encoder_stages()):
        factors[stage.name] = layer_lr_decay**depth
        depth += any(parameter.dim() > 1 for parameter in stage.module.parameters())
    return {} if set(factors.values()) <= {1.0} else factors


class LrRanges:
    """Columns of the flat vector with the same factor on the learning rate.

    Args:
        parameters: the flat vector.
        factors: of each stage, by its name.

    Attributes:
        ranges: the columns of this process, ascending; the group is a number of a factor.
        values: the F factors, in the order of their numbers.
    """

    def __init__(self, parameters: FlatParameters, factors: Mapping[str, float]) -> None:
        self.values = tuple(dict.fromkeys(factors.values()))
        slots = list(parameters.slots.items())
        ends = [*(slot.offset for _, slot in slots), parameters.numel][1:]
        whole = [
            Segment(
                self.values.index(factors[parameters.specs[name].stage.name]),
                slice(slot.offset, end),
            )
            for (name, slot), end in zip(slots, ends, strict=True)
        ]
        self.ranges = own_segments(whole, parameters.own.pieces)
        self._on_device = torch.tensor(self.values, device=parameters.master.device)
        self._split: dict[int, tuple[Sequence[Segment], list[list[Segment]]]] = {}

    def rates(self, lr: Tensor) -> Tensor:
        """Return the rates ``[F]`` fp32 at a peak rate ``lr``, 0-dim."""
        return lr * self._on_device

    def split(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Return the parts of ascending segments that have each of the F factors."""
        known = self._split.get(id(segments))
        if known is None or known[0] is not segments:
            parts: list[list[Segment]] = [[] for _ in self.values]
            for number, own in self.ranges:
                for group, columns in segments:
                    start = max(own.start, columns.start)
                    stop = min(own.stop, columns.stop)
                    if start < stop:
                        parts[number].append(Segment(group, slice(start, stop)))
            known = self._split[id(segments)] = segments, parts
        return known[1]
