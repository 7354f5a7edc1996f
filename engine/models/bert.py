"""BERT's encoder on packed tokens (Devlin et al. 2019): no padding, one stream for all tasks.

A batch is a stream of T tokens in which sequences lie end to end; ``cu_seqlens [S + 1]`` marks
where each begins.  Everything but attention works token by token and never sees a boundary.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._kernels import kernels
from .config import EncoderConfig
from .layers import Embedding, LayerNorm, Linear

# Dropout sites are numbered, so that one seed a step gives every site its own random numbers.
_EMBEDDING_SITE = 0
_SITES_PER_LAYER = 3


class TokenStream(Protocol):
    """What the encoder reads of a packed batch."""

    @property
    def input_ids(self) -> Tensor:
        """``[T]`` int64."""

    @property
    def position_ids(self) -> Tensor:
        """``[T]`` int64, from 0 in every sequence."""

    @property
    def token_type_ids(self) -> Tensor:
        """``[T]`` int64."""

    @property
    def cu_seqlens(self) -> Tensor:
        """``[S + 1]`` int32."""

    @property
    def max_seqlen(self) -> int:
        """Tokens in the longest sequence, or more."""


class Encoder(nn.Module):
    """Token ids to hidden states ``[T, H]``.

    Args:
        config: shape and constants; the dropout rates act in training mode only.

    Attributes:
        checkpoint_layers: in training, keep the input of each layer alone and compute the rest of
            what its backward pass needs again.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(config, first_site=_EMBEDDING_SITE + 1 + _SITES_PER_LAYER * index)
            for index in range(config.num_hidden_layers)
        )

    @property
    def num_sites(self) -> int:
        """How many dropout sites there are; later ones (heads) count on from here."""
        return _EMBEDDING_SITE + 1 + _SITES_PER_LAYER * len(self.layers)

    def forward(
        self,
        batch: TokenStream,
        segments: kernels.TaskSegments | None = None,
        seed: Tensor | None = None,
        adapters: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Encode a packed batch.

        Args:
            batch: the token stream.
            segments: tokens by task; with them the backward pass writes task gradients.
            seed: 0-dim int64, the dropout seed of this step; needed in training mode.
            adapters: from a layer's number and its input ``[T, H]`` to what is added beside it.

        Returns:
            Hidden states ``[T, H]`` in the dtype of the weights.
        """
        hidden = self.embeddings(batch, segments, seed)
        for number, layer in enumerate(self.layers):
            beside = None if adapters is None else partial(adapters, number)
            if self.checkpoint_layers and self.training:
                # Dropout follows from the seed: no generator's state to keep.
                hidden = checkpoint(
                    *(layer, hidden, batch, segments, seed, beside),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = layer(hidden, batch, segments, seed, beside)
        return hidden


class Embeddings(nn.Module):
    """Word + position + token type, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, width, init_std=std)
        self.position = Embedding(config.max_position_embeddings, width, init_std=std)
        self.token_type = Embedding(config.type_vocab_size, width, init_std=std)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(
        self,
        batch: TokenStream,
        segments: kernels.TaskSegments | None,
        seed: Tensor | None,
    ) -> Tensor:
        """Embed the stream's tokens, ``[T, H]``."""
        return kernels.embedding_layer_norm(
            batch.input_ids,
            batch.position_ids,
            batch.token_type_ids,
            self.word.weight,
            self.position.weight,
            self.token_type.weight,
            self.norm.weight,
            self.norm.bias,
            dropout_p=self.dropout_p,
            eps=self.norm.eps,
            training=self.training,
            seed=seed,
            stream=_EMBEDDING_SITE,
            rows=None if segments is None else self._rows(),
            segments=segments,
        )

    def _rows(self) -> kernels.EmbeddingRows | None:
        """Where the task gradients go; None in a model that has no gradient rows."""
        word, position, token_type = self.word.rows, self.position.rows, self.token_type.rows
        if word is None or position is None or token_type is None or self.norm.rows is None:
            return None
        return kernels.EmbeddingRows(word, position, token_type, self.norm.rows)

    def wipe_rows(self, batch: TokenStream, offsets: tuple[int, ...]) -> None:
        """Zero the gradient rows that this batch's backward pass has touched."""
        self.word.wipe_rows(batch.input_ids, offsets)
        self.position.wipe_rows(batch.position_ids, offsets)
        self.token_type.wipe_rows(batch.token_type_ids, offsets)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, config: EncoderConfig, *, first_site: int) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.first_site = first_site
        self.qkv = Linear(width, 3 * width, init_std=std)
        self.attention_output = Linear(width, width, init_std=std)
        self.attention_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = Linear(width, config.intermediate_size, init_std=std)
        self.output = Linear(config.intermediate_size, width, init_std=std)
        self.output_norm = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        batch: TokenStream,
        segments: kernels.TaskSegments | None,
        seed: Tensor | None,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Map hidden states ``[T, H]`` to ``[T, H]``; ``beside`` adds to the feed-forward part."""
        added = None if beside is None else beside(hidden)
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            self.qkv(hidden, segments).view(-1, 3, self.heads, self.head_dim),
            batch.cu_seqlens,
            batch.max_seqlen,
            dropout_p=self.attention_dropout_p if self.training else 0.0,
            seed=seed,
            stream=self.first_site,
        )
        assert isinstance(
            attended, Tensor
        )  # not the tuple with statistics, which was not asked for
        hidden = self.attention_norm.add(
            self.attention_output(attended.flatten(1), segments),
            hidden,
            dropout_p=self.hidden_dropout_p,
            seed=seed,
            stream=self.first_site + 1,
            segments=segments,
        )
        widened = F.gelu(self.intermediate(hidden, segments))
        return self.output_norm.add(
            self.output(widened, segments),
            hidden if added is None else hidden + added,
            dropout_p=self.hidden_dropout_p,
            seed=seed,
            stream=self.first_site + 2,
            segments=segments,
        )
