"""The Triton kernels on a GPU, in all dtypes, beside the CPU kernels under the same names."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import (
    attention_plan,
    checked_values,
    dropout_add_layer_norm,
    flash_attn_varlen_qkvpacked_func,
)
from kernels.attention.attention import attention_reference
from kernels.attention.attention_options import AttentionOptions

from ..device_waits import no_wait_for_the_device
from . import triton_cases
from .layer_cases import LAYERS, Stream
from .test_task_layers import task_gradients
from .tolerance import assert_within_twice

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
for _file in triton_cases.NAMES:
    _module = importlib.import_module(f"{triton_cases.__name__}.{_file}")
    _cases = {name: case for name, case in vars(_module).items() if name.startswith("test_")}
    assert not _cases.keys() & globals().keys()
    globals().update(_cases)


@pytest.fixture
def device() -> str:
    return "cuda"


LENGTHS = [18, 1, 0, 23, 17, 300, 3]
SHORT_LENGTHS = [18, 1, 0, 23, 17, 61, 3, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT_LENGTHS])
def test_attention_through_its_function(
    lengths: list[int], width: int, causal: bool, dtype: torch.dtype
) -> None:
    total, longest = sum(lengths) + 5, max(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    seed = torch.tensor(5, device="cuda")
    options = AttentionOptions(width**-0.5, causal, 0.1, seed=seed)

    def ours(qkv: Tensor) -> Tensor:
        out = flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, longest, 0.1, causal=causal, seed=seed
        )
        assert isinstance(out, Tensor)
        return out

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return attention_reference(q, k, v, cu_seqlens, cu_seqlens, options)[0]

    def run(attention: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        results = []
        for qkv in draws:
            leaf = qkv.to(dtype).requires_grad_()
            out = attention(leaf)
            (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
            results.append((out.detach(), grad))
        outs, grads = zip(*results, strict=True)
        return torch.stack(outs), torch.stack(grads)

    # The largest errors of several draws: those of one are a matter of luck.
    draws = [torch.randn(total, 3, 2, width, device="cuda").to(dtype) for _ in range(4)]
    torchs, exact = run(plain, dtype), run(plain, torch.float64)
    for tensors in zip(run(ours, dtype), torchs, exact, strict=True):
        assert_within_twice(*tensors)


def test_a_recorded_attention_serves_every_batch_of_its_shape() -> None:
    """With a plan that was made before and copied, and with one that the recording makes."""
    batches = [[18, 1, 40, 5], [1, 2, 3, 58], [61, 1, 1, 1]]
    qkv = torch.randn(64, 3, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad_out = torch.randn(64, 2, 64, device="cuda", dtype=torch.bfloat16)
    boundaries = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in batches]
    cu_seqlens = boundaries[0].cuda()
    plan = attention_plan(cu_seqlens, 64)

    def run() -> list[Tensor]:
        results = []
        for given in (plan, None):
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 61, plan=given)
            assert isinstance(out, Tensor)
            results += [out.detach(), *torch.autograd.grad(out, qkv, grad_out)]
        return results

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for own in boundaries:
        cu_seqlens.copy_(own)
        for target, tensor in zip(plan, attention_plan(own, 64), strict=True):
            target.copy_(tensor)
        graph.replay()
        for found, expected in zip(recorded, run(), strict=True):
            assert torch.equal(found, expected)
        assert all(map(torch.equal, recorded[:2], recorded[2:]))


def test_a_sequence_longer_than_said_is_refused_on_demand() -> None:
    qkv = torch.randn(70, 3, 2, 32, device="cuda")
    boundaries = torch.tensor([0, 70], dtype=torch.int32, device="cuda")
    with checked_values(), pytest.raises(ValueError, match="max_seqlen: expected at least"):
        flash_attn_varlen_qkvpacked_func(qkv, boundaries, 60)


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


# BERT's layers, a regression head, a vocabulary (an odd one: its rows are copied), widths that no
# tile divides; several programs of every kind, tasks of several blocks of tokens.
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(768, 768), (3072, 768), (768, 3072), (1, 768), (5, 100), (1001, 384), (97, 131)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear_task_gradients_through_its_function(
    outputs: int, inputs: int, dtype: torch.dtype, accumulate: bool
) -> None:
    offsets = (0, 700, 700, 701, 1000, 1000, 1013, 1100, 1101, 1102, 1500)
    x = torch.randn(1510, inputs, device="cuda").to(dtype)
    dy = torch.randn(1510, outputs, device="cuda").to(dtype)
    x[1500:] = dy[1500:] = torch.nan
    weight = torch.zeros(outputs, inputs, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.zeros(outputs, device="cuda", dtype=dtype, requires_grad=True)

    def run() -> list[Tensor]:
        fill = 4 if accumulate else torch.nan
        rows = kernels.new_task_rows(len(offsets) - 1, weight, bias, fill=fill)
        segments = kernels.TaskSegments(offsets, accumulate)
        kernels.linear(x, weight, bias, rows=rows, segments=segments).backward(dy)
        return [rows.weight, rows.bias]

    found = run()
    start = 4 if accumulate else 0
    torchs = [(start + grad).to(dtype) for grad in task_gradients(x, dy, offsets)]
    exact = [start + grad for grad in task_gradients(x.double(), dy.double(), offsets)]
    for tensors in zip(found, torchs, exact, strict=True):
        assert_within_twice(*tensors)
    for one, other in zip(found, run(), strict=True):
        assert torch.equal(one, other)


def test_linear_task_gradients_under_autocast() -> None:
    x = torch.randn(300, 96, device="cuda")
    weight = torch.randn(80, 96, device="cuda", requires_grad=True)
    bias, offsets = torch.zeros(80, device="cuda", requires_grad=True), (0, 100, 300)
    rows, segments = kernels.new_task_rows(2, weight, bias), kernels.TaskSegments(offsets)
    dy = torch.randn(300, 80, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        kernels.linear(x, weight, bias, rows=rows, segments=segments).backward(dy)
    exact = task_gradients(x.bfloat16().double(), dy.double(), offsets)
    torchs = task_gradients(x.bfloat16(), dy, offsets)
    assert rows.weight.dtype == torch.float32
    for tensors in zip((rows.weight, rows.bias), torchs, exact, strict=True):
        assert_within_twice(*tensors)


@pytest.mark.parametrize("layer_name", LAYERS)
def test_layers_agree_with_the_cpu(layer_name: str) -> None:
    cpu = Stream.of(65)
    gpu = cpu.to("cuda")
    for found, expected in zip(
        gpu.run(LAYERS[layer_name]), cpu.run(LAYERS[layer_name]), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layer_name", LAYERS)
def test_layers_run_on_the_device_of_their_tensors(layer_name: str) -> None:
    cpu = Stream.of(65)
    for found, expected in zip(
        cpu.to("cuda:1").run(LAYERS[layer_name]), cpu.run(LAYERS[layer_name]), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


# The others are torch's own functions; linear layers by task are, but for biases, in float32.
@pytest.mark.parametrize(
    "layer_name",
    [
        layer_name
        for layer_name in LAYERS
        if layer_name not in ("embedding", "linear", "feed_forward")
    ],
)
def test_repeats_to_the_bit(layer_name: str) -> None:
    stream = Stream.of(65, "cuda")
    for one, other in zip(
        stream.run(LAYERS[layer_name]), stream.run(LAYERS[layer_name]), strict=True
    ):
        assert torch.equal(one, other)


def test_values_are_checked_on_demand() -> None:
    qkv = torch.randn(8, 3, 2, 32, device="cuda")
    boundaries = torch.tensor([0, 9], dtype=torch.int32, device="cuda")
    with checked_values(), pytest.raises(ValueError, match="within the 8 rows"):
        flash_attn_varlen_qkvpacked_func(qkv, boundaries, 8)
    stream = Stream.of(9, "cuda")
    stream.ids[3] = 50
    with checked_values(), pytest.raises(ValueError, match="word_ids: expected 0 <= index < 50"):
        LAYERS["embedding_layer_norm"](stream)


@pytest.mark.parametrize("layer_name", LAYERS)
def test_no_call_waits_for_the_device(layer_name: str) -> None:
    stream = Stream.of(65, "cuda")

    def step() -> None:
        stream.run(LAYERS[layer_name])

    step()  # compiles
    with no_wait_for_the_device():
        step()
