"""The Triton kernels on a GPU, in all dtypes, beside the CPU kernels under the same names."""

import pytest
import torch
from torch import Tensor

from kernels import dropout_add_layer_norm, flash_attn_varlen_qkvpacked_func

from .rounding import assert_within_twice
from .triton_cases import test_attention, test_dropout, test_layer_norm  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def device() -> str:
    return "cuda"


LENGTHS = [18, 1, 0, 23, 17, 300, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_attention_agrees_with_the_cpu(width: int, causal: bool, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(LENGTHS) + 5, 3, 2, width).to(dtype)
    seed = torch.tensor(5)

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(device, dtype).requires_grad_()
        out = flash_attn_varlen_qkvpacked_func(
            leaf, cu_seqlens.to(device), 300, 0.1, causal=causal, seed=seed.to(device)
        )
        (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
        return out.detach().cpu(), grad.cpu()

    exact = run("cpu", torch.float64)
    for tensors in zip(run("cuda", dtype), run("cpu", dtype), exact, strict=True):
        assert_within_twice(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 500, 768).to(dtype)
    weight, bias = torch.randn(2, 768)

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        parameter = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, residual)]
        leaves += [t.to(device, parameter).requires_grad_() for t in (weight, bias)]
        seed = torch.tensor(5, device=device)
        out = dropout_add_layer_norm(*leaves, dropout_p=0.1, seed=seed)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return tuple(t.detach().cpu() for t in (out, *grads))

    exact = run("cpu", torch.float64)
    for tensors in zip(run("cuda", dtype), run("cpu", dtype), exact, strict=True):
        assert_within_twice(*tensors)


def test_no_call_waits_for_the_device() -> None:
    cu_seqlens = torch.tensor([0, 18, 40], dtype=torch.int32, device="cuda")
    qkv = torch.randn(48, 3, 2, 32, device="cuda", requires_grad=True)
    weight = torch.ones(64, device="cuda", requires_grad=True)

    def step() -> None:
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 22, 0.1).flatten(1)
        dropout_add_layer_norm(out, out, weight, weight, dropout_p=0.1).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
