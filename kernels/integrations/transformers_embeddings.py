"""Embeddings of transformers' BERTs for packed ids ``[1, T]``: look-ups, norm and dropout at once.

As in transformers_layers.py, modules that are not plain are called.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..embedding_layer_norm.embedding_layer_norm import embedding_layer_norm
from ..registration.function_modes import active_layer_modes
from .class_exchange import Exchanged
from .transformers_layers import Dropout, LayerNorm, are_few, is_plain


class Embeddings(Exchanged):
    """BERT's embeddings of a stream: the sum of looked up rows, its norm and dropout in one pass.

    Attributes:
        tables: names of the embeddings that are summed; words come first.
        indices: names of the arguments that they look up.
    """

    tables: tuple[str, ...] = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    indices: tuple[str, ...] = ("input_ids", "position_ids", "token_type_ids")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map ids ``[1, T]`` to ``[1, T, H]``; all else is done as transformers does it."""
        given = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
        # While torch.compile traces, task gradients see torch's calls alone.
        is_traced = torch.compiler.is_compiling() and len(active_layer_modes()) > 0
        if given.get("inputs_embeds") is None and not is_traced:
            ids = self._ids(given)
            if ids is not None and self._is_plain() and not self._is_small(ids[0]):
                return self._embed(ids)
        out: Tensor = super().forward(*args, **kwargs)
        return out

    def _ids(self, given: dict[str, Any]) -> list[Tensor] | None:
        """Return what each table looks up, an index for each word; None where there are others."""
        found = {name: given.get(name) for name in self.indices}
        words = found["input_ids"]
        if words is None:
            return None
        if "token_type_ids" in found and found["token_type_ids"] is None:
            found["token_type_ids"] = self._own_types(words, found.get("position_ids"))
        ids = [index for index in found.values() if index is not None]
        is_whole = len(ids) == len(found) and all(index.shape == words.shape for index in ids)
        return ids if is_whole else None

    def _own_types(self, words: Tensor, places: Tensor | None) -> Tensor:
        """Return the token types of words that come without: a buffer's, or zeros."""
        own = getattr(self, "token_type_ids", None)
        if own is None or places is None or places.shape != words.shape:
            return torch.zeros_like(words)
        types: Tensor = own[0][places]
        return types

    def _is_plain(self) -> bool:
        module: Any = self
        tables = [getattr(self, name) for name in self.tables]
        if not (is_plain(module.LayerNorm, LayerNorm) and is_plain(module.dropout, Dropout)):
            return False
        return module.dropout.p < 1 and all(
            is_plain(table, nn.Embedding)
            and type(table.weight) in (nn.Parameter, Tensor)
            and table.weight.dtype == tables[0].weight.dtype
            and table.weight.device == tables[0].weight.device
            and table.max_norm is None
            and not (table.scale_grad_by_freq or table.sparse)
            for table in tables
        )

    def _is_small(self, words: Tensor) -> bool:
        weight = getattr(self, self.tables[0]).weight
        return are_few(words.numel() * weight.shape[-1], weight)

    def _embed(self, ids: list[Tensor]) -> Tensor:
        module: Any = self
        tables = [getattr(self, name) for name in self.tables]
        weights = [table.weight for table in tables]
        padding = [table.padding_idx for table in tables]
        if len(tables) == 2:  # zeros, to which all places lead, for the third
            ids, padding = [*ids, torch.zeros_like(ids[0])], [*padding, None]
            weights = [*weights, weights[0].new_zeros(1, weights[0].shape[1])]
        norm, drop = module.LayerNorm, module.dropout
        return embedding_layer_norm(
            *(index.long() for index in ids),
            *(*weights, norm.weight, norm.bias),
            dropout_p=drop.p,
            eps=norm.eps,
            training=drop.training,
            padding_idx=(padding[0], padding[1], padding[2]),
        )


class PlaceEmbeddings(Embeddings):
    """Embeddings of words and positions alone."""

    tables = ("word_embeddings", "position_embeddings")
    indices = ("input_ids", "position_ids")


class TypeEmbeddings(Embeddings):
    """Embeddings of words and token types alone."""

    tables = ("word_embeddings", "token_type_embeddings")
    indices = ("input_ids", "token_type_ids")


class ErnieEmbeddings(Embeddings):
    """ERNIE's embeddings, which are BERT's where there are no types of tasks."""

    def _is_plain(self) -> bool:
        module: Any = self
        return not module.use_task_id and super()._is_plain()
