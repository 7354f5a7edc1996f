"""Every layer captured in a CUDA graph, forward and backward, and replayed on other inputs."""

import pytest
import torch

from .layer_cases import LAYERS, Stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layer_name", LAYERS)
def test_a_replay_gives_what_a_call_gives(layer_name: str) -> None:
    layer, stream = LAYERS[layer_name], Stream.of(65, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the libraries' workspaces
        for _ in range(3):
            stream.run(layer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stream.run(layer)
    for seed in (5, 6):
        with torch.no_grad():
            stream.x.normal_()
            stream.ids.random_(50)
            stream.seed.fill_(seed)
        graph.replay()
        for found, expected in zip(captured, stream.run(layer), strict=True):
            torch.testing.assert_close(found, expected)
