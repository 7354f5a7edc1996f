"""Every layer in one graph under torch.compile, one compilation for all token counts."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kernels import TaskSegments, feed_forward, linear, new_task_rows

from .layer_cases import LAYERS, Stream


@pytest.mark.parametrize("layer_name", LAYERS)
def test_one_compilation_serves_all_token_counts(layer_name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    layer = LAYERS[layer_name]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in range(21, 121, 10):
        stream = Stream.of(tokens)
        for found, expected in zip(stream.run(compiled), stream.run(layer), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_compilation_serves_all_row_counts_of_bfloat16() -> None:
    """Products of bfloat16 may have operators of their own, and those shapes for the compiler."""
    torch._dynamo.reset()
    counters.clear()
    up, bias, down = (torch.randn(s).bfloat16().requires_grad_() for s in ((5, 4), (5,), (4, 5)))
    up_rows, down_rows = new_task_rows(2, up, bias), new_task_rows(2, down)

    def layers(x: Tensor, offsets: tuple[int, ...] | None = None) -> Tensor:
        if offsets is None:
            return feed_forward(linear(x, down.t()[:4, :4], bias[:4]), up, bias, down)
        segments = TaskSegments(offsets)
        return feed_forward(
            x, up, bias, down, up_rows=up_rows, down_rows=down_rows, segments=segments
        )

    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (21, 32, 57):
        x = torch.randn(tokens, 4).bfloat16()
        with torch.no_grad():
            assert compiled(x).equal(layers(x))
    assert counters["stats"]["unique_graphs"] == 1
    for tokens in (21, 32, 57):
        found = []
        for run in (compiled, layers):
            x = torch.ones(tokens, 4).bfloat16().requires_grad_()
            run(x, (0, tokens // 2, tokens)).sum().backward()
            found.append((x.grad, up_rows.buffer.clone(), down_rows.buffer.clone()))
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 2


# Inductor's own imports warn of what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_compiler_takes_a_model_in_one_graph() -> None:
    def layer(s: Stream) -> Tensor:
        attended = LAYERS["flash_attn_varlen_qkvpacked_func"](s).flatten(1)
        embedded = LAYERS["embedding_layer_norm by task"](s)
        return attended + 2 * LAYERS["linear by task"](s._replace(x=s.x + embedded.repeat(1, 3)))

    torch._dynamo.reset()
    stream = Stream.of(21)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for found, expected in zip(stream.run(compiled), stream.run(layer), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
