"""Convert padded batches to packed streams and back, under flash-attn's names.

A padded batch ``[B, S, ...]`` with a mask becomes a stream ``[T, ...]`` of its tokens, sequence
after sequence, and ``cu_seqlens`` says where each one starts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..registration import validation


class Unpadded(NamedTuple):
    """Result of :func:`unpad_input`; unpacks to flash-attn's five values.

    Attributes:
        hidden_states: ``[T, ...]``.
        indices: ``[T]`` int64, the place of each token in the flattened batch ``[B * S]``.
        cu_seqlens: ``[B + 1]`` int32.
        max_seqlen: length of the longest sequence, or the bound that was given.
        seqused: ``[B]`` int32, length of each sequence.
    """

    hidden_states: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    seqused: Tensor


def _check_bounds(seqused: Tensor, total: int | None, max_seqlen: int | None) -> None:
    if total is not None and total < (tokens := int(seqused.sum())):
        raise ValueError(f"total: expected at least the batch's {tokens} tokens, got {total}")
    if max_seqlen is not None and (seqused > max_seqlen).any():
        longest = int(seqused.max())
        raise ValueError(f"max_seqlen: expected at least the longest, {longest}, got {max_seqlen}")


def unpad_input(
    hidden_states: Tensor,
    attention_mask: Tensor,
    unused_mask: Tensor | None = None,
    *,
    total: int | None = None,
    max_seqlen: int | None = None,
) -> Unpadded:
    """Pack the tokens of a padded batch.

    Args:
        hidden_states: ``[B, S, ...]``, any dtype; token ids ``[B, S]`` too.
        attention_mask: ``[B, S]``, bool or integer, not zero where there is a token.
        unused_mask: not supported.
        total: rows of the stream, at least the number of tokens.  Rows behind the last token repeat
            places of padding and belong to no sequence.  None counts the tokens, which waits for
            the device.
        max_seqlen: upper bound of the sequences' lengths; None looks, which waits for the device.

    Returns:
        The stream and where its rows come from.

    Raises:
        ValueError: shapes that disagree, a mask of numbers to be added to scores, or bounds that
            the batch does not hold.  On CUDA tensors, where counting its tokens would wait for the
            device, see `kernels.checked_values`.
        NotImplementedError: ``unused_mask`` was given.
    """
    if unused_mask is not None:
        raise NotImplementedError("unused_mask: not supported")
    if hidden_states.dim() < 2 or attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask: expected {list(hidden_states.shape[:2])} as hidden_states, "
            f"got {list(attention_mask.shape)}"
        )
    validation.check_data(hidden_states=hidden_states, attention_mask=attention_mask)
    if attention_mask.is_floating_point():
        raise ValueError("attention_mask: expected bool or integers, got numbers to add to scores")
    is_token = attention_mask != 0
    seqused = is_token.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(seqused.cumsum(0, dtype=torch.int32), (1, 0))
    flat = is_token.flatten()
    if total is None:
        indices = flat.nonzero().squeeze(1)
    elif 0 <= total <= flat.numel():
        indices = flat.logical_not().int().argsort(stable=True)[:total]
    else:
        raise ValueError(f"total: expected at most {flat.numel()} rows, got {total}")
    if validation.may_look(attention_mask):
        _check_bounds(seqused, total, max_seqlen)
    if max_seqlen is None:
        max_seqlen = int(seqused.max()) if len(seqused) else 0
    stream = hidden_states.flatten(0, 1)[indices]
    return Unpadded(stream, indices, cu_seqlens, max_seqlen, seqused)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put the rows of a stream back to their places in a padded batch; zeros elsewhere.

    Args:
        hidden_states: ``[T, ...]``, any dtype.
        indices: ``[T]`` int64, of :func:`unpad_input`.
        batch: B.
        seqlen: S.

    Returns:
        ``[B, S, ...]`` in the dtype of ``hidden_states``.

    Raises:
        ValueError: not as many indices as rows, or a storage that was freed.
    """
    if indices.shape != hidden_states.shape[:1]:
        raise ValueError(f"indices: expected [{hidden_states.shape[0]}], got {list(indices.shape)}")
    validation.check_data(hidden_states=hidden_states, indices=indices)
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
