"""Under autocast: linear layers compute in bfloat16, all others in the dtype they are given."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels

from .layer_cases import LAYERS, WIDTH, Stream
from .tolerance import assert_within_twice


@pytest.mark.parametrize("layer_name", LAYERS)
def test_dtypes_in_and_out(layer_name: str) -> None:
    stream = Stream.of(21)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients_and_rows = stream.run(LAYERS[layer_name])
    assert out.dtype == (
        torch.bfloat16 if layer_name.startswith(("linear", "feed_forward")) else torch.float32
    )
    assert all(tensor.dtype == torch.float32 for tensor in gradients_and_rows)
    assert all(tensor.isfinite().all() for tensor in gradients_and_rows)
    assert any(tensor.count_nonzero() for tensor in gradients_and_rows)


def test_a_chain_of_layers_is_as_accurate_as_torchs() -> None:
    """Linear layers and attention in bfloat16, the norm of bfloat16 and a float32 residual."""
    leaves = [torch.randn(40, WIDTH), *(torch.randn(WIDTH, WIDTH) / 8 for _ in range(2))]
    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)

    def ours(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        q = kernels.linear(x, first).view(-1, 2, 32)
        attended = kernels.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 40, 40)
        mixed = kernels.linear(attended.flatten(1), second)
        return kernels.dropout_add_layer_norm(mixed, x, ones, zeros)

    def torchs(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        q = F.linear(x, first).view(1, -1, 2, 32).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)[0]
        return F.layer_norm(x + F.linear(attended, second), (WIDTH,), eps=1e-12)

    def run(function: object, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(1))
        return [out.detach(), *grads]

    exact = run(torchs, torch.float64, False)
    for tensors in zip(
        run(ours, torch.float32, True), run(torchs, torch.float32, True), exact, strict=True
    ):
        assert_within_twice(*tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_linear_casts_bfloat16_too(bias: bool, grad: bool) -> None:
    """To autocast's other dtype, whichever product serves bfloat16."""
    x, weight = torch.randn(5, 6).bfloat16(), torch.randn(8, 6).bfloat16()
    added = weight[:, 0] if bias else None
    with torch.autocast("cpu", torch.float16), torch.set_grad_enabled(grad):
        assert kernels.linear(x, weight, added).dtype == torch.float16
