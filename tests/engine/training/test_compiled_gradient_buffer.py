"""Inductor writes the gradient buffer ``[K, P]`` in place: no code of the step copies it whole."""

import re

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from ..small_models import build_step, make_micro_batches

FEATURES = {"quora": "concat", "sts": "shared"}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buffer_is_written_in_place(make_model, dtype):
    """Every layer, and both ways to write: overwriting, and adding for the second micro-batch."""
    model = make_model(FEATURES, dropout=0.1, adapter_width=12).train()
    step = build_step(model, dtype=dtype, clip=1.0, execution="compile")
    batches = make_micro_batches(0, (6, 4, 4), 2)
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(lambda: step(batches, 0, 1e-3))
    tasks, columns = step.parameters.rows.shape
    code = "\n".join(codes)
    given = re.findall(rf"assert_size_stride\(\w+, \({tasks}, {columns}\)", code)
    assert len(given) >= 2, "the two backward passes are not given the buffer"
    # An allocation of that size, or a loop over all of it, would be a copy; `rand_strided` makes
    # the inputs of Inductor's own benchmark of the code.
    sizes = rf"\({tasks}, {columns}\)|\b{tasks * columns}L?\b"
    lines = [line for line in code.splitlines() if re.search(sizes, line)]
    assert [x for x in lines if not re.search("assert_size_stride|rand_strided", x)] == []
