"""The interface of an encoder.  Each encoder has a file of its own, such as engine/models/bert.py.

An encoder is a sequence of stages.  The first one embeds the tokens, the others map hidden states
to hidden states.  Layer-wise balancing, the exchange of gradients, activation checkpointing and
reports work stage by stage.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import EncoderConfig
from .context import Context
from .layers import Embedding, GradientWrite, TaskLayer


class Stage(NamedTuple):
    """A module whose gradients a backward pass completes together.

    Attributes:
        name: the module's name in the model, in checkpoints and in reports.
        module: in an encoder, called ``module(x, context)``.
        task: the one task that it belongs to; None for a stage that tasks share.
        bucket: the name of the bucket that its gradients are sent in; empty for its own.
    """

    name: str
    module: nn.Module
    task: str | None = None
    bucket: str = ""


class Encoder(nn.Module):
    """Token ids to hidden states ``[T, H]``.

    Args:
        config: shape and constants; the dropout rates act in training mode only.

    Attributes:
        checkpoint_layers: in training, keep only the input of each stage and compute its
            activations again in the backward pass.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = False

    def stages(self) -> Sequence[Stage]:
        """Return the stages in the order of the forward pass; every parameter is in one of them."""
        raise NotImplementedError

    @property
    def word_table(self) -> Embedding:
        """The table of words, to which the decoder of masked LM is tied."""
        raise NotImplementedError

    @property
    def num_dropouts(self) -> int:
        """Number of dropouts; the ids of the heads' dropouts follow theirs."""
        raise NotImplementedError

    def lookups(self, input_ids: Tensor, context: Context) -> Iterable[tuple[Embedding, Tensor]]:
        """Return every table, and the entries ``[T]`` int64 that a forward pass looks up in it."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        """Encode a token stream.

        Args:
            input_ids: ``[T]`` int64.
            context: of these tokens.

        Returns:
            Hidden states ``[T, H]`` in the dtype of the weights.
        """
        first, *others = self.stages()
        hidden: Tensor = first.module(input_ids, context)
        for stage in others:
            if self.checkpoint_layers and self.training:
                # Dropout depends on the seed alone: there is no generator's state to keep.
                hidden = checkpoint(
                    stage.module, hidden, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = stage.module(hidden, context)
        return hidden

    def check_lookups(self) -> None:
        """Check that :meth:`lookups` returns every table.

        Raises:
            TypeError: one is left out.
        """
        device = self.word_table.weight.device
        token = torch.zeros(1, dtype=torch.int64, device=device)
        context = Context(
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
            max_seqlen=1,
            position_ids=token,
            token_type_ids=token,
        )
        returned = {table for table, _ in self.lookups(token, context)}
        for name, layer in self.named_modules():
            is_table = isinstance(layer, TaskLayer) and layer.gradient_write is GradientWrite.SPARSE
            if is_table and layer not in returned:
                raise TypeError(
                    f"{type(self).__name__}.lookups leaves out {name}, whose gradient rows would "
                    "never be zeroed; yield it with the entries that a forward pass looks up"
                )

    def zero_sparse_rows(
        self, input_ids: Tensor, context: Context, offsets: tuple[int, ...]
    ) -> None:
        """Zero the task gradients of tables that this batch's backward pass wrote.

        Args:
            input_ids: ``[T]`` int64.
            context: of these tokens.
            offsets: ``K + 1`` token numbers, where tasks begin.
        """
        for table, index in self.lookups(input_ids, context):
            table.zero_rows(index, offsets)
