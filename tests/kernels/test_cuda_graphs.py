"""Every layer captured in a CUDA graph, forward and backward, and replayed on other inputs."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from .layer_cases import LAYERS, Stream

pytestmark = pytest.mark.gpu
Result = TypeVar("Result")


def recorded(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of a call, and what each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the libraries' workspaces
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("layer_name", LAYERS)
def test_a_replay_gives_what_a_call_gives(layer_name: str) -> None:
    layer, stream = LAYERS[layer_name], Stream.of(65, "cuda")
    graph, captured = recorded(lambda: stream.run(layer))
    for seed in (5, 6):
        with torch.no_grad():
            stream.x.normal_()
            stream.ids.random_(50)
            stream.seed.fill_(seed)
        graph.replay()
        for found, expected in zip(captured, stream.run(layer), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_weight_gradients(dtype: torch.dtype) -> None:
    """Of odd widths, whose streams are copied in 16 bits, and of more tasks than a launch has."""
    offsets = tuple(range(0, 110, 10))
    streams = torch.randn(2, 101, 97, device="cuda", dtype=dtype).unbind(0)
    rows = torch.zeros(10, 97, 97, device="cuda", dtype=dtype)
    bias_rows = torch.zeros(10, 97, device="cuda", dtype=dtype)

    def run() -> None:
        torch.ops.superbert.linear_task_gradients_(*streams, rows, bias_rows, offsets, False)

    graph, _ = recorded(run)
    for stream in streams:
        stream.normal_()
    graph.replay()
    replayed = rows.clone(), bias_rows.clone()
    run()
    assert torch.equal(rows, replayed[0])
    assert torch.equal(bias_rows, replayed[1])
