"""Low-rank updates of frozen linear layers (LoRA; Hu et al. 2021, arXiv:2106.09685, section 4.1).

    y = W x + b + (alpha / r) B A dropout(x)        x [T, I], A [r, I], B [O, r]

W and b are frozen.  All tasks share A and B, which get task gradients as other shared layers do.  A
is drawn evenly from -1 / sqrt(I) to 1 / sqrt(I), B begins at zero, so that training starts from the
plain encoder.  A layer that computes several projections at once has an update for each, of that
projection's rows of W, and each drops elements of its input by itself.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..utils.errors import InputError
from .config import EncoderConfig
from .context import RowContext
from .encoder import Encoder
from .layers import Linear
from .registry import spec_of

PROJECTIONS = ("query", "key", "value", "attention_output", "intermediate", "output")
"""The linear layers of an encoder that can have updates: of attention, and the two of the
feed-forward layer."""

DEFAULT_PROJECTIONS = ("query", "value")
"""Those of the paper's experiments."""


class LoraSettings(NamedTuple):
    """The low-rank updates of an encoder.

    Attributes:
        rank: r.
        alpha: the updates are multiplied by ``alpha / rank``.
        dropout_p: probability to drop an element of an update's input, in training mode.
        projections: those of :data:`PROJECTIONS` that have updates.
    """

    rank: int
    alpha: float
    dropout_p: float
    projections: tuple[str, ...]


class LowRankUpdate(nn.Module):
    """The update of one projection of a layer.

    Args:
        width: I, of the layer's input.
        rows: of the layer's weight, that the projection is computed by.
        settings: of all updates.
        dropout_id: of its dropout.

    Attributes:
        down: A ``[r, I]``.
        up: B ``[O, r]``.
        rows: as given.
    """

    def __init__(self, width: int, rows: slice, settings: LoraSettings, dropout_id: int) -> None:
        super().__init__()
        self.rows, self.dropout_id = rows, dropout_id
        self.dropout_p, self.scale = settings.dropout_p, settings.alpha / settings.rank
        self.down = Linear(width, settings.rank, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        self.up = Linear(settings.rank, rows.stop - rows.start, bias=False, init_std=0.0)

    def forward(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Map the layer's input ``[T, I]`` to the update of the projection ``[T, O]``."""
        if self.training and self.dropout_p:
            seed = None if context is None else context.seed
            x = kernels.dropout(x, self.dropout_p, seed=seed, rng_offset=self.dropout_id)
        # The factor on r numbers a token instead of O.
        out: Tensor = self.up(self.scale * self.down(x, context), context)
        return out

    def product(self) -> Tensor:
        """Return ``(alpha / r) B A [O, I]``."""
        return self.scale * (self.up.weight @ self.down.weight)


class LowRankUpdates(nn.ModuleDict):
    """The updates of a layer's projections, by their names; at least one.

    Args:
        updates: of different rows of the layer's weight.
        height: rows of the layer's weight.
    """

    def __init__(self, updates: Mapping[str, LowRankUpdate], height: int) -> None:
        by_rows = sorted(updates, key=lambda name: updates[name].rows.start)
        super().__init__({name: updates[name] for name in by_rows})
        self.height = height

    @property
    def in_order(self) -> list[LowRankUpdate]:
        """The updates in the order of their rows."""
        return cast(list[LowRankUpdate], [*self.values()])

    def forward(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Map the layer's input ``[T, I]`` to the update of its output ``[T, O]``."""
        blocks: list[Tensor] = []
        end = 0
        for update in self.in_order:
            if update.rows.start > end:
                blocks.append(x.new_zeros(1, 1).expand(len(x), update.rows.start - end))
            blocks.append(update(x, context))
            end = update.rows.stop
        if end < self.height:
            blocks.append(x.new_zeros(1, 1).expand(len(x), self.height - end))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def add_low_rank_updates(encoder: Encoder, settings: LoraSettings, first_dropout_id: int) -> None:
    """Give the projections of every layer of an encoder their updates.

    Args:
        encoder: without updates.
        settings: of the updates.
        first_dropout_id: of their dropouts, one for each update.

    Raises:
        InputError: the encoder does not name one of the projections, or none has a higher rank.
    """
    for name in settings.projections:
        if name not in encoder.projections:
            known = ", ".join(encoder.projections) or "none that low-rank updates could be of"
            encoders = type(encoder).__name__
            raise InputError(f"lora_targets: {name} is no projection of {encoders}; it has {known}")
    dropout_id = first_dropout_id
    for stage in encoder.stages():
        linears = {
            name: layer for name, layer in stage.module.named_children() if type(layer) is Linear
        }
        updates: dict[str, dict[str, LowRankUpdate]] = {}
        for name in settings.projections:
            layer, part, parts = encoder.projections[name]
            if layer not in linears:  # as in the embeddings
                continue
            height, width = linears[layer].weight.shape
            size = height // parts
            if settings.rank >= min(size, width):
                raise InputError(
                    f"lora_rank = {settings.rank}: no lower than the rank of {name}, "
                    f"{min(size, width)}; give a lower one"
                )
            rows = slice(part * size, (part + 1) * size)
            update = LowRankUpdate(width, rows, settings, dropout_id)
            updates.setdefault(layer, {})[name] = update
            dropout_id += 1
        for layer, own in updates.items():
            linears[layer].lora = LowRankUpdates(own, len(linears[layer].weight))


def updated_layers(encoder: Encoder) -> Iterator[tuple[Linear, LowRankUpdates]]:
    """Yield the layers that have updates, and these."""
    for layer in encoder.modules():
        if isinstance(layer, Linear) and isinstance(layer.lora, LowRankUpdates):
            yield layer, layer.lora


def layers_of_updates(encoder: Encoder) -> frozenset[nn.Module]:
    """Return the linear layers A and B of all updates."""
    return frozenset(
        matrix
        for _, updates in updated_layers(encoder)
        for update in updates.in_order
        for matrix in (update.down, update.up)
    )


def weights_of_updates(encoder: Encoder) -> dict[str, Tensor]:
    """Return A and B of all updates by their names in the encoder's state dict."""
    names = {layer: name for name, layer in encoder.named_modules()}
    return {
        f"{names[layer]}.{name}": weight
        for layer in layers_of_updates(encoder)
        for name, weight in layer.state_dict().items()
    }


@torch.no_grad()
def merge_updates(encoder: Encoder) -> None:
    """Add all updates to the weights that they are of, and remove them.

    The encoder computes the same within rounding, as fast as one that never had updates.
    """
    for layer, updates in [*updated_layers(encoder)]:
        for update in updates.in_order:
            layer.weight[update.rows] += update.product()
        layer.lora = None


class StoredUpdate(NamedTuple):
    """The update of one matrix of the Hugging Face layout.

    Attributes:
        name: of the matrix, without ``.weight``.
        down: A ``[n r, I]``, of the n updates of its rows one above the other.
        up: B ``[O, n r]``; a column is zero but for the rows of its own update.
        updates: n.
    """

    name: str
    down: Tensor
    up: Tensor
    updates: int


def stored_updates(encoder: Encoder, config: EncoderConfig) -> Iterator[StoredUpdate]:
    """Yield the updates of an encoder by the matrices of the Hugging Face layout.

    A layout may divide a layer of the encoder into several matrices, such as query, key and value,
    or have one matrix for several projections, whose updates are then joined.
    """
    layers = dict(encoder.named_modules())
    for name, stored_names, shape in spec_of(config).weights(config):
        layer = layers[name.rpartition(".")[0]]
        updates = layer.lora if isinstance(layer, Linear) and name.endswith(".weight") else None
        if not isinstance(updates, LowRankUpdates):
            continue
        height = shape[0]
        for number, stored_name in enumerate(stored_names):
            first = number * height
            own = [u for u in updates.in_order if first <= u.rows.start < first + height]
            if not own:
                continue
            up = torch.zeros(height, sum(update.up.weight.shape[1] for update in own))
            end = 0
            for update in own:
                rank = update.up.weight.shape[1]
                rows = slice(update.rows.start - first, update.rows.stop - first)
                up[rows, end : end + rank] = update.up.weight.detach()
                end += rank
            down = torch.cat([update.down.weight.detach() for update in own])
            yield StoredUpdate(stored_name.removesuffix(".weight"), down, up, len(own))
