"""Padded batches to streams and back."""

import pytest
import torch

from kernels.integrations.padding import pad_input, unpad_input

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_there_and_back(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 4, 5, requires_grad=True)
    stream, indices, cu_seqlens, longest, seqused = unpad_input(hidden, MASK.to(dtype))
    assert indices.tolist() == [0, 1, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert cu_seqlens.dtype == torch.int32
    assert longest == 3
    assert seqused.tolist() == [2, 0, 3]
    padded = pad_input(stream, indices, 3, 4)
    assert torch.equal(padded, hidden * MASK[:, :, None])
    padded.sum().backward()
    assert torch.equal(hidden.grad, MASK[:, :, None].expand(3, 4, 5).float())


def test_no_gradient_at_padding_reaches_a_token() -> None:
    hidden = torch.randn(3, 4, 5, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    stream, indices, *_ = unpad_input(hidden, MASK)
    grad = torch.ones(3, 4, 5).masked_fill(MASK[..., None] == 0, torch.nan)
    pad_input(stream * weight, indices, 3, 4).backward(grad)
    assert torch.equal(hidden.grad, (weight * MASK[..., None]).detach())
    torch.testing.assert_close(weight.grad, (hidden * MASK[..., None]).sum((0, 1)).detach())


def test_token_ids_and_empty_batches() -> None:
    assert unpad_input(torch.arange(12).view(3, 4), MASK)[0].tolist() == [0, 1, 9, 10, 11]
    empty = unpad_input(torch.empty(0, 4, 2), torch.empty(0, 4, dtype=torch.bool))
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.max_seqlen == 0


def test_with_bounds_given_nothing_is_counted() -> None:
    """The stream is longer than its tokens, and goes back to the same places."""
    hidden = torch.randn(3, 4, 2)
    bound = unpad_input(hidden, MASK, total=8, max_seqlen=4)
    exact = unpad_input(hidden, MASK)
    assert bound.max_seqlen == 4
    assert torch.equal(bound.indices[:5], exact.indices)
    assert torch.equal(bound.cu_seqlens, exact.cu_seqlens)
    bound.hidden_states[5:] = 0  # as attention leaves rows behind the last sequence
    assert torch.equal(
        pad_input(bound.hidden_states, bound.indices, 3, 4), hidden * MASK[..., None]
    )


def test_with_bounds_given_no_value_is_looked_at() -> None:
    """On the device `meta` there are none."""
    hidden, mask = torch.empty(3, 4, 2, device="meta"), MASK.to("meta")
    stream = unpad_input(hidden, mask, total=8, max_seqlen=4)
    assert stream.hidden_states.shape == (8, 2)
    assert pad_input(stream.hidden_states, stream.indices, 3, 4).shape == hidden.shape


def test_what_does_not_fit_is_named() -> None:
    hidden = torch.randn(3, 4, 2)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        unpad_input(hidden, MASK[:2])
    with pytest.raises(ValueError, match="numbers to add"):
        unpad_input(hidden, MASK * -10_000.0)
    with pytest.raises(ValueError, match="total: expected at most 12 rows"):
        unpad_input(hidden, MASK, total=13)
    with pytest.raises(ValueError, match="total: expected at least the batch's 5 tokens"):
        unpad_input(hidden, MASK, total=4)
    with pytest.raises(ValueError, match="max_seqlen: expected at least the longest, 3"):
        unpad_input(hidden, MASK, max_seqlen=2)
    with pytest.raises(NotImplementedError, match="unused_mask"):
        unpad_input(hidden, MASK, MASK)
    with pytest.raises(ValueError, match="indices"):
        pad_input(hidden[0], torch.arange(3), 1, 4)
