"""Every layer in one graph under torch.compile, one compilation for all token counts."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

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
