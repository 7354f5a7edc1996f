"""Projected attention layers (Stickland and Murray, "BERT and PALs", 2019, section 3).

Each task has a narrow attention layer in parallel with every layer of the encoder:

    h' = LN(h_mid + dropout(FFN(h_mid)) + D attention_l(E h))

``h`` is the layer's input, ``h_mid`` the output of its attention.  E ``[w, H]`` and D ``[H, w]``
belong to the task and are shared by all layers; query, key and value of the narrow attention belong
to task and layer.  D begins at zero, so that training starts from the plain encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..data.collate import PackedBatch
from ..utils.errors import InputError
from .config import EncoderConfig
from .context import Context
from .layers import Linear


class ProjectedAttention(nn.Module):
    """The adapter of one task, for all layers of the encoder.

    Args:
        config: of the encoder; the heads and the dropout rate of its attention are taken over.
        width: w, of the narrow attention; divisible by the number of heads.
        first_dropout_id: of its dropout in the first layer; it has one for each layer.
    """

    def __init__(self, config: EncoderConfig, width: int, *, first_dropout_id: int) -> None:
        super().__init__()
        if width % config.num_attention_heads:
            raise InputError(
                f"adapter_width = {width}: not divisible by the {config.num_attention_heads} "
                "attention heads; take a multiple"
            )
        std = config.initializer_range
        self.heads, self.first_dropout_id = config.num_attention_heads, first_dropout_id
        self.dropout_p = config.attention_probs_dropout_prob
        self.down = Linear(config.hidden_size, width, init_std=std)
        self.qkv = nn.ModuleList(
            Linear(width, 3 * width, init_std=std) for _ in range(config.num_hidden_layers)
        )
        self.up = Linear(width, config.hidden_size, init_std=0.0)

    def forward(self, hidden: Tensor, context: Context, layer: int) -> Tensor:
        """Return the adapter's term in the output of layer ``layer``.

        Args:
            hidden: ``[T, H]``, the layer's input, of this task's tokens.
            context: of these tokens.
            layer: the layer's number.

        Returns:
            ``[T, H]``.
        """
        narrow = self.down(hidden)
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            self.qkv[layer](narrow).unflatten(1, (3, self.heads, -1)),
            context.cu_seqlens,
            context.max_seqlen,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=context.seed,
            rng_offset=self.first_dropout_id + layer,
            plan=context.attention_plan,
        )
        assert isinstance(attended, Tensor)
        return self.up(attended.flatten(1))


@dataclass(frozen=True, slots=True, eq=False)  # torch 2.11 hashes it before its fields are set
class AdaptersOfBatch:
    """The adapters of a batch's tasks, as the layers of the encoder call them.

    Attributes:
        adapters: of the K tasks, in the order of the stream; None for one that has none.
        contexts: of each task's own tokens.
        token_offsets: ``K + 1`` token numbers, where tasks begin.
    """

    adapters: Sequence[ProjectedAttention | None]
    contexts: Sequence[Context]
    token_offsets: tuple[int, ...]

    @classmethod
    def of(
        cls,
        adapters: Sequence[ProjectedAttention | None],
        batch: PackedBatch,
        seed: Tensor | None = None,
    ) -> "AdaptersOfBatch":
        """Return the adapters of a batch; ``seed`` is that of dropout, needed in training mode."""
        contexts = [
            Context(
                cu_seqlens=cu_seqlens,
                max_seqlen=batch.max_own_seqlen,
                position_ids=batch.position_ids[start:end],
                token_type_ids=batch.token_type_ids[start:end],
                attention_plan=kernels.attention_plan(cu_seqlens, end - start)
                if cu_seqlens.is_cuda
                else None,
                seed=seed,
            )
            for (start, end), cu_seqlens in zip(
                pairwise(batch.token_offsets), batch.task_cu_seqlens(), strict=True
            )
        ]
        return cls(adapters, contexts, batch.token_offsets)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Map a layer's input to the adapters' term in its output, both ``[T, H]``."""
        added = [
            torch.zeros_like(hidden[start:end])
            if adapter is None
            else adapter(hidden[start:end], context, layer)
            for adapter, context, (start, end) in zip(
                self.adapters, self.contexts, pairwise(self.token_offsets), strict=True
            )
        ]
        behind = hidden.new_zeros(len(hidden) - self.token_offsets[-1], hidden.shape[1])
        return torch.cat([*added, behind])
