"""How loops of transformers take the sentences of a step: padded, sorted by length, packed.

Each class takes the token ids of a step's sentences, of each task and of each of its columns, and
is made once a batch.  Its ``embed`` runs them through an encoder and returns their means in the
same order.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Columns = Sequence[Sequence[Tensor]]
"""Token ids of the sentences of each column of a task."""
Encode = Callable[..., Any]
"""A model, or what stands for it."""
Means = list[Sequence[Tensor]]
"""Sentences of each task and column, ``[n, H]`` each."""


def pad(sentences: Sequence[Tensor], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask ``[n, S]`` of sentences, padded to the longest."""
    ids = nn.utils.rnn.pad_sequence(list(sentences), batch_first=True, padding_value=padding)
    sizes = torch.tensor([len(sentence) for sentence in sentences], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]).long()


def sorted_parts(sentences: Sequence[Sequence[int] | Tensor], parts: int) -> list[list[int]]:
    """Sort sentences by length and cut them into parts of equal numbers; return their indices."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    ends = [len(order) * part // parts for part in range(parts + 1)]
    return [order[start:end] for start, end in itertools.pairwise(ends) if end > start]


def _padded_means(encode: Encode, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = encode(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


class Batching:
    """Base of ways to run a step's sentences through an encoder."""

    register_attention: ClassVar[Callable[[], str] | None] = None
    """Makes an attention known to transformers and returns its name; None for the model's own."""

    def __init__(self, tasks: Sequence[Columns]) -> None:
        self._sizes = [[len(sentences) for sentences in columns] for columns in tasks]

    def embed(self, encode: Encode) -> Means:
        """Return the mean hidden states of all sentences."""
        means = iter(self._means(encode).split(list(itertools.chain(*self._sizes))))
        return [[next(means) for _ in sizes] for sizes in self._sizes]

    def _means(self, encode: Encode) -> Tensor:
        """Return ``[S, H]``, those of a column one after the other."""
        raise NotImplementedError


class PaddedColumns(Batching):
    """A padded batch for each column of each task, as training loops usually have it."""

    def __init__(self, tasks: Sequence[Columns]) -> None:
        self._columns = [[pad(sentences) for sentences in columns] for columns in tasks]

    def embed(self, encode: Encode) -> Means:
        """Return the mean hidden states of all sentences."""
        return [[_padded_means(encode, *column) for column in task] for task in self._columns]


class SortedParts(Batching):
    """The sentences of all tasks, sorted by length, in eight padded batches.

    On two cores eight are faster than 2, 4 and 16 for the 160 sentences of a step.
    """

    parts = 8

    def __init__(self, tasks: Sequence[Columns]) -> None:
        super().__init__(tasks)
        sentences = _flat(tasks)
        parts = sorted_parts(sentences, self.parts)
        self._parts = [pad([sentences[index] for index in part]) for part in parts]
        self._places = torch.tensor(list(itertools.chain(*parts))).argsort()

    def _means(self, encode: Encode) -> Tensor:
        return torch.cat([_padded_means(encode, *part) for part in self._parts])[self._places]


class PackedRow(Batching):
    """The sentences of all tasks as one row of tokens, without padding.

    Transformers' own attention takes that for one sequence; an accelerated model does not.
    """

    def __init__(self, tasks: Sequence[Columns]) -> None:
        super().__init__(tasks)
        self._pack(_flat(tasks))

    def _pack(self, sentences: Sequence[Tensor]) -> None:
        device, lengths = sentences[0].device, [len(sentence) for sentence in sentences]
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        self._arguments = {
            "input_ids": torch.cat(list(sentences))[None],
            "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
            "cu_seq_lens_q": ends,
            "max_length_q": max(lengths),
        }

    def _means(self, encode: Encode) -> Tensor:
        hidden = encode(**self._arguments).last_hidden_state[0].float()
        lengths = self._arguments["cu_seq_lens_q"].diff()
        sentence = torch.repeat_interleave(lengths, output_size=len(hidden))
        sums = hidden.new_zeros(len(lengths), hidden.shape[1])
        return sums.index_add(0, sentence, hidden) / lengths[:, None]


def register_varlen_attention() -> str:
    """Make torch's ``varlen_attn`` known to transformers, and return the name it has there.

    The model is given one row of all tokens, with ``position_ids``, ``cu_seq_lens_q`` and
    ``max_length_q``.  The kernel drops no probabilities.
    """

    def attend(
        _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: None, **given: Any
    ) -> tuple[Tensor, None]:
        from torch.nn.attention.varlen import varlen_attn

        cu, longest, window = given["cu_seq_lens_q"], given["max_length_q"], {}
        if given.get("sliding_window") is not None:  # which counts a query's own place
            window["window_size"] = (given["sliding_window"] - 1,) * 2
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, **window)[None], None

    return _register("torch_varlen", attend)


class VarlenRow(PackedRow):
    """One row of tokens, attention by torch's ``varlen_attn``; on a GPU, in bf16."""

    register_attention = register_varlen_attention


def register_equal_lengths_attention() -> str:
    """Make attention by SDPA known, each call with the neighbouring sentences of one length.

    The model is given one row of all tokens, with ``position_ids`` and ``cu_seq_lens_q``.
    """

    def attend(
        _module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        lengths = [
            (length, length * len(list(equal)))
            for length, equal in itertools.groupby(given["cu_seq_lens_q"].diff().tolist())
        ]
        sizes = [tokens for _, tokens in lengths]
        split = (x[0].transpose(0, 1).split(sizes) for x in (q, k, v))
        window = given.get("sliding_window")  # which counts a query's own place
        out = []
        for (length, _), *own in zip(lengths, *split, strict=True):
            batch = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in own)
            mask = None
            if window is not None and length > window:
                places = torch.arange(length, device=q.device)
                mask = (places[:, None] - places).abs() < window
            mixed = F.scaled_dot_product_attention(
                *batch, attn_mask=mask, dropout_p=dropout, scale=scaling
            )
            out.append(mixed.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)[None], None

    return _register("equal_lengths", attend)


class SortedRow(PackedRow):
    """One row of tokens, sentences sorted by length, attention by SDPA for each length."""

    register_attention = register_equal_lengths_attention

    def _pack(self, sentences: Sequence[Tensor]) -> None:
        (order,) = sorted_parts(sentences, 1)
        self._places = torch.tensor(order).argsort()
        super()._pack([sentences[index] for index in order])

    def _means(self, encode: Encode) -> Tensor:
        return super()._means(encode)[self._places]


class SortedRowOfEachTask(Batching):
    """A row as of `SortedRow` for each task: the backward pass of a loss takes its tokens alone."""

    register_attention = register_equal_lengths_attention

    def __init__(self, tasks: Sequence[Columns]) -> None:
        self._rows = [SortedRow([columns]) for columns in tasks]

    def embed(self, encode: Encode) -> Means:
        """Return the mean hidden states of all sentences."""
        return [sentences for row in self._rows for sentences in row.embed(encode)]


def register_nested_attention() -> str:
    """Make SDPA of nested tensors known; the model is given what ``varlen_attn`` needs."""

    def attend(
        _module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        if given.get("sliding_window") is not None:
            raise NotImplementedError("SDPA of nested tensors takes no window")
        ends, longest = given["cu_seq_lens_q"].long(), given["max_length_q"]
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x[0].transpose(0, 1), ends, min_seqlen=1, max_seqlen=longest
            ).transpose(1, 2)
            for x in (q, k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return mixed.transpose(1, 2).values()[None], None

    return _register("nested", attend)


class NestedRow(PackedRow):
    """One row of tokens, attention by SDPA of nested tensors."""

    register_attention = register_nested_attention


def _register(name: str, attend: Callable[..., tuple[Tensor, None]]) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def _flat(tasks: Sequence[Columns]) -> list[Tensor]:
    return [sentence for columns in tasks for sentences in columns for sentence in sentences]
