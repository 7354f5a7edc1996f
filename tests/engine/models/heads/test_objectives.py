"""Objectives beside tasks: their rows, and batches of few shapes."""

import copy

import numpy as np
import pytest
import torch

from engine.data.batch_shapes import ShapePlan
from engine.gradients.flat_parameters import FlatParameters

from ...gradients.test_one_pass_backward import within_twice
from .cases import OBJECTIVES, SEED, batch_of


def expected_rows(model, batch, names):
    """K ordinary backward passes."""
    parameters = dict(model.named_parameters())
    losses = model.losses(model(batch, names, seed=SEED), batch, names)
    rows = {
        name: torch.zeros(len(names), *p.shape, dtype=p.dtype) for name, p in parameters.items()
    }
    for k, loss in enumerate(losses):
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                rows[name][k] = gradient
    return rows


@pytest.mark.parametrize("names", [("sst", *OBJECTIVES), ("masked_lm_next",)], ids=str)
def test_rows_equal_k_backward_passes_step_after_step(model, tokenizer, names):
    """Twice, since the tied decoder fills the whole of a word table's row each time."""
    model.train()
    exact, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    flat = FlatParameters(model, names, device=torch.device("cpu"), compute_dtype=torch.float32)
    for step in range(2):
        batch = batch_of(tokenizer, names, step)
        flat.clear_partial_gradients()
        scores = model(batch, names, seed=SEED, task_rows=True)
        torch.stack(model.losses(scores, batch, names)).sum().backward()
        references, plain = (expected_rows(m, batch, names) for m in (exact, same))
        scale = max(row.norm() for row in references.values())
        for name, row in flat.named_views(flat.rows):
            assert within_twice(row, plain[name], references[name], scale), (step, name)
        model.zero_sparse_rows(batch)


def test_filled_batches_have_the_same_losses(model, tokenizer):
    """Padding tokens and masks that do not count, as batches of few shapes have them."""
    names = ("sst", *OBJECTIVES)
    model.eval()
    plain = batch_of(tokenizer, names)
    counts = np.diff(plain.token_offsets)[None] + np.array([[3, 40, 1, 9]])
    filled = batch_of(tokenizer, names, plan=ShapePlan({names: counts}, 1, [64]))
    assert filled.num_tokens > plain.num_tokens
    for masked in (1, 2):
        assert len(filled.labels[masked].targets) % 64 == 0
    with torch.no_grad():
        losses = [model.losses(model(b, names), b, names) for b in (plain, filled)]
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
