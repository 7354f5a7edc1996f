"""Find the tokens of a batch, and put them into one stream and back.

A model of transformers is called with a padded batch ``[B, S]`` and gives padded outputs.  In
between, all that an accelerated one computes (transformers_models.py) is on one stream ``[1, T]``
of the batch's tokens.  The :class:`Packing` says which places they come from.  It goes down to the
layers as the argument ``packing``, which transformers' models hand on, as they do with those of
flash attention.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.attention_plan import AttentionPlan, attention_plan
from ..registration import validation
from ..task_gradients.task_layers import announce_stream
from .padding import pad_input


class Packing(NamedTuple):
    """The tokens of a batch in one stream of T rows, sequence after sequence.

    Attributes:
        cu_seqlens: int32 ``[B + 1]``; sequence s is rows ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: rows of the longest sequence, or more.
        batch_size: B.
        length: S, of the padded outputs.
        indices: int64 ``[T]``, the places of the rows in ``[B * S]``; None where all are taken.
        keys: int64, the rows that are tokens; None where all are.
        cu_seqlens_k: int32 ``[B + 1]``, boundaries of the sequences among the keys.
        plan: of attention, on a GPU.
        from_packed_inputs: whether the inputs came packed.
        hidden_padding: bool ``[T]``, padding that is computed since other rows depend on it, and is
            zeros in outputs; None where there is none.
        has_gaps: whether padding lies between rows of a sequence, whose distances are then others
            in the stream.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    length: int
    indices: Tensor | None
    keys: Tensor | None
    cu_seqlens_k: Tensor
    plan: AttentionPlan | None
    from_packed_inputs: bool
    hidden_padding: Tensor | None = None
    has_gaps: bool = False

    def pack(self, padded: Tensor) -> Tensor:
        """Take the rows of the stream out of ``[B, S, ...]``, or of what all sequences share.

        Returns:
            ``[1, T, ...]``, zeros behind the last sequence.
        """
        shape = (self.batch_size, self.length)
        flat = padded.expand(*shape, *padded.shape[2:]).flatten(0, 1)
        if self.indices is None:
            return flat[None]
        if self.from_packed_inputs:
            flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat.index_select(0, self.indices)[None]

    def pad(self, stream: Tensor) -> Tensor:
        """Put ``[1, T, ...]`` into ``[B, S, ...]``, zeros elsewhere."""
        shape = (self.batch_size, self.length)
        if self.indices is None:
            return stream.squeeze(0).unflatten(0, shape)
        if not self.from_packed_inputs:
            return pad_input(stream.squeeze(0), self.indices, *shape)
        # Rows behind the last sequence, whose place is one behind the batch, come to nothing.
        places = self.batch_size * self.length
        padded = pad_input(stream.squeeze(0), self.indices, 1, places + 1)
        return padded.squeeze(0)[:places].unflatten(0, shape)

    def cleared(self, stream: Tensor) -> Tensor:
        """Return hidden states ``[1, T, H]`` with zeros in the rows of hidden padding."""
        return (
            stream
            if self.hidden_padding is None
            else stream.masked_fill(self.hidden_padding[:, None], 0)
        )

    def tokens(self, stream: Tensor) -> Tensor:
        """Take the rows of ``[1, T, ...]`` that are tokens."""
        return stream if self.keys is None else stream[:, self.keys]

    def is_token(self) -> Tensor:
        """Return which places of the batch, bool ``[B, S]``, are tokens."""
        device = self.cu_seqlens.device
        if self.indices is None:
            return torch.ones(self.batch_size, self.length, dtype=torch.bool, device=device)
        rows = torch.ones(1, len(self.indices), dtype=torch.bool, device=device)
        if self.keys is not None:
            rows = torch.zeros_like(rows).index_fill(1, self.keys, True)
        return self.pad(rows)


class Boundaries(NamedTuple):
    """The sequences of packed inputs, by the names of flash attention's arguments.

    It stands in for an attention mask where a model's code hands on nothing else to its encoder.

    Attributes:
        cu_seq_lens_q: int32 ``[S + 1]``.
        max_length_q: rows of the longest, or more; None where it is to be found.
    """

    cu_seq_lens_q: Tensor
    max_length_q: int | None


# ---- how a batch is packed ----------------------------------------------------------------------


def _boundaries(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _packing_of_all(batch_size: int, length: int, device: torch.device) -> Packing:
    """Every place is a token."""
    cu_seqlens = length * torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    # A graph of torch.compile, which knows no tokens by itself, is not compiled for a length of 0.
    is_known = not torch.compiler.is_compiling() and length > 0
    announce_stream(cu_seqlens, range(0, length * batch_size + 1, length) if is_known else None)
    shape = (length, batch_size, length)
    return Packing(
        cu_seqlens, *shape, None, None, cu_seqlens, _plan(cu_seqlens, batch_size * length), False
    )


@torch.compiler.disable(
    reason="how many tokens a mask has is known on the host alone; with packed inputs, which "
    "PackingCollator makes, the model is one graph"
)
def _packing_of_mask(attention_mask: Tensor, whole_rows: bool, first_places: bool) -> Packing:
    """Find the tokens of a mask ``[B, S]``; on a GPU this waits for the device, once.

    Within `checked_values` it waits twice.
    """
    batch_size, length = attention_mask.shape
    if torch._C._get_tracing_state() is not None:
        raise ValueError(
            "attention_mask: torch.jit.trace would keep these tokens' places for all batches; "
            "trace the model before `accelerate`, or with packed inputs"
        )
    # On a CPU this is asked first, since it is quick; on a GPU the fetch below tells it, too.
    is_full = attention_mask.numel() == 0 or (
        validation.may_look(attention_mask) and bool(attention_mask.all())
    )
    if is_full:
        return _packing_of_all(batch_size, length, attention_mask.device)
    is_token = attention_mask != 0
    is_output = is_token.clone()
    if first_places:
        is_output[:, 0].fill_(True)
    is_row = is_token | ~is_token[:, :1] if whole_rows else is_output
    lengths = is_row.sum(1, dtype=torch.int32)
    # Rows without a gap between them are one piece, whose first place follows one that is none.
    pieces = is_row[:, :1].sum() + (is_row[:, 1:] & ~is_row[:, :-1]).sum()
    counts = torch.stack([is_token.sum(), pieces]).int()
    num_tokens, num_pieces, *of_rows = torch.cat([counts, lengths]).tolist()
    if num_tokens == is_token.numel():
        return _packing_of_all(batch_size, length, attention_mask.device)
    starts = list(accumulate(of_rows, initial=0))
    total = starts[-1]
    indices = _places(is_row.flatten(), total)
    cu_seqlens = cu_seqlens_k = _boundaries(lengths)
    announce_stream(cu_seqlens, starts)
    keys = hidden_padding = None
    if total > num_tokens:
        keys = _places(is_token.flatten()[indices], num_tokens)
        cu_seqlens_k = _boundaries(is_token.sum(1, dtype=torch.int32))
        hidden_padding = ~is_output.flatten()[indices] if whole_rows else None
    torch._dynamo.maybe_mark_dynamic(indices, 0)
    plan = _plan(cu_seqlens, total) if keys is None else None
    shape = (length, batch_size, length)
    has_gaps = num_pieces > sum(count > 0 for count in of_rows)
    return Packing(
        cu_seqlens, *shape, indices, keys, cu_seqlens_k, plan, False, hidden_padding, has_gaps
    )


def _places(chosen: Tensor, count: int) -> Tensor:
    """Return where ``[N]`` is true; the count is known, so that nothing waits for a GPU."""
    return torch.nonzero_static(chosen, size=count).squeeze(1)


def _plan(cu_seqlens: Tensor, total: int) -> AttentionPlan | None:
    return attention_plan(cu_seqlens, total) if cu_seqlens.is_cuda else None


def _packing_of_boundaries(cu_seqlens: Tensor, max_seqlen: int, total: int) -> Packing:
    """Packed inputs: where each row would be in a batch that is padded on the right."""
    batch_size = cu_seqlens.shape[0] - 1
    rows = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:], right=True)
    place = sequence * max_seqlen + (rows - cu_seqlens[sequence])
    indices = place.clamp(max=batch_size * max_seqlen)
    shape = (max_seqlen, batch_size, max_seqlen)
    plan = _plan(cu_seqlens, total)
    announce_stream(cu_seqlens)
    return Packing(cu_seqlens, *shape, indices, None, cu_seqlens, plan, True)


def restarts(position_ids: Tensor | None) -> tuple[Tensor, int] | None:
    """Find the sequences of packed inputs by positions ``[1, T]`` that begin anew.

    A sequence begins at the smallest position and counts up, as in transformers' flash attention.
    Positions that are all the same are one sequence without an order, as in its other attentions;
    flash attention takes them for sequences of one token, which need ``cu_seq_lens_q`` here.

    Returns:
        ``cu_seqlens`` and the longest length; None without positions ``[B, S]``, where they count
        one sequence, and where they do not count up, as before padding of smaller positions.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    return _restarts_of(position_ids)


@torch.compiler.disable(reason="where position_ids begin anew is known on the host alone")
def _restarts_of(position_ids: Tensor) -> tuple[Tensor, int] | None:
    if position_ids.numel() == 0:
        return None
    positions = position_ids[0]
    is_start = positions == positions.min()
    counts_up = positions.diff() == 1
    if not counts_up.any() or not (counts_up | is_start[1:]).all() or not is_start[0]:
        return None
    starts = is_start.nonzero().squeeze(1)
    if len(starts) < 2:
        return None
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=len(positions)).int()
    return cu_seqlens, int(cu_seqlens.diff().max())


def _check_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected {list(shape)}, of padding alone, got {what}; other masks "
            "are not supported"
        )
    if mask.shape != shape:
        raise ValueError(f"attention_mask: expected {list(shape)}, got {list(mask.shape)}")
    return mask.to(device)


def _check_boundaries(cu_seqlens: Any) -> None:
    is_vector = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 1
    if not is_vector or cu_seqlens.dtype not in (torch.int32, torch.int64):
        what = type(cu_seqlens).__name__
        if isinstance(cu_seqlens, Tensor):
            what = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seq_lens_q: expected int32 [sequences + 1], got {what}")


def packing_of(
    inputs: Mapping[str, Any], given: Tensor, whole_rows: bool, first_places: bool
) -> Packing:
    """Find the tokens of a batch, padded or packed.

    Args:
        inputs: the arguments of a model's call.
        given: its ids ``[B, S]`` or embedded inputs ``[B, S, H]``.
        whole_rows: take rows that begin with padding whole.
        first_places: take the first place of a row where it is padding, too.

    Raises:
        ValueError: a mask other than ``[B, S]``, or boundaries of sequences that are none.
    """
    shape, device = (given.shape[0], given.shape[1]), given.device
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    cu_seqlens, longest = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
    if isinstance(mask, Boundaries):
        (cu_seqlens, longest), mask = mask, None
    if cu_seqlens is None and mask is None and shape[0] == 1:
        cu_seqlens, longest = restarts(positions) or (None, None)
    if cu_seqlens is None:
        for name in ("cu_seq_lens_k", "seq_idx"):
            if inputs.get(name) is not None:
                raise ValueError(f"{name}: expected cu_seq_lens_q beside it, got none")
        if mask is None:
            return _packing_of_all(*shape, device)
        return _packing_of_mask(_check_mask(mask, shape, device), whole_rows, first_places)
    _check_boundaries(cu_seqlens)
    if shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected packed inputs [1, tokens], got {list(shape)}")
    if mask is not None and not (mask.shape == shape and mask.all()):
        raise ValueError("attention_mask: packed inputs have no padding; leave it out")
    if validation.may_look(cu_seqlens):
        validation.check_cu_seqlens("cu_seq_lens_q", cu_seqlens, shape[1])
        needed = int(cu_seqlens.diff().max())
        if longest is not None and int(longest) < needed:
            raise ValueError(
                f"max_length_q: expected at least the longest, {needed}, got {longest}"
            )
        if inputs.get("input_ids") is None and cu_seqlens[-1] != shape[1]:
            raise ValueError(
                f"cu_seq_lens_q: expected to end at the {shape[1]} rows of inputs_embeds, got "
                f"{int(cu_seqlens[-1])}; rows put before them, such as prompts, move the sequences"
            )
    if longest is None:
        longest = int(cu_seqlens.diff().max())
    return _packing_of_boundaries(cu_seqlens.to(torch.int32), int(longest), shape[1])
