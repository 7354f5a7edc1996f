"""The K gradients of one backward pass against K backward passes through the same model."""

import copy

import pytest
import torch
from torch import Tensor

from engine.gradients.flat_parameters import FlatParameters
from kernels.linear import linear

from ..small_models import TASKS


def one_pass_rows(model, batch, *, seed: Tensor | None = None, accumulate_twice: bool = False):
    """Named task gradients ``{name: [K, *shape]}`` from one backward pass."""
    model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    flat = FlatParameters(model, TASKS, device=torch.device("cpu"), compute_dtype=dtype)
    flat.clear_partial_gradients()
    for accumulate in (False, True)[: 1 + accumulate_twice]:
        scores = model(batch, TASKS, seed=seed, task_rows=True, accumulate=accumulate)
        total_loss(model, scores, batch).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    return dict(flat.named_views(flat.rows)), flat, model


def total_loss(model, scores, batch) -> Tensor:
    return torch.stack(
        [
            model.head(task).loss(s, labels.to(s.dtype))
            for task, s, labels in zip(TASKS, scores, batch.labels, strict=True)
        ]
    )


def pass_by_pass(model, batch, *, seed: Tensor | None = None):
    """The same from K ordinary backward passes, without task rows."""
    rows = {}
    losses = total_loss(model, model(batch, TASKS, seed=seed), batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for k, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            rows.setdefault(name, torch.zeros(len(TASKS), *parameter.shape, dtype=parameter.dtype))
            if gradient is not None:
                rows[name][k] = gradient
    return rows


def within_twice(actual: Tensor, same_dtype: Tensor, reference: Tensor, scale: Tensor) -> bool:
    """STYLE's rule: at most twice the error that torch itself makes in this dtype."""
    ours = (actual.double() - reference).norm()
    torchs = (same_dtype.double() - reference).norm()
    return bool(ours <= 2 * torchs + 2 * torch.finfo(actual.dtype).eps * scale)


@pytest.mark.parametrize(
    "settings",
    [
        {"features": {"quora": "mean"}, "pooling": "cls"},
        {"features": {"quora": "mean", "sts": "distance"}},
        {"features": {"quora": "concat", "sts": "cosine_shifted"}, "pooling": "cls"},
        {"features": {"quora": "difference", "sts": "pearson"}},
        {"features": {"quora": "cosine", "sts": "mean"}, "losses": {"sts": "cross_entropy"}},
        {"features": {"quora": "shared", "sts": "shared"}, "pooling": "cls"},
        {"features": {"sst": "bilstm", "quora": "shared"}, "pooling": "cls"},
        {"adapter_width": 12},
    ],
    ids=str,
)
def test_rows_equal_k_backward_passes(make_model, make_batch, settings):
    model, batch = make_model(**settings), make_batch()
    rows, flat, _ = one_pass_rows(model, batch)
    same_dtype = pass_by_pass(model, batch)
    reference = pass_by_pass(copy.deepcopy(model).double(), batch)
    scale = max(row.norm() for row in reference.values())
    assert rows.keys() == {name for name in reference if flat.specs[name].owner != "cfimdb"}
    for name, row in rows.items():
        assert within_twice(row, same_dtype[name], reference[name], scale), name


@pytest.mark.parametrize("multiplies_bf16", [False, True])
def test_rows_in_bfloat16(make_model, make_batch, monkeypatch, multiplies_bf16):
    """Of products and GELU by the project's own kernels, where the processor runs them, and not."""
    if multiplies_bf16 and not linear.MULTIPLIES_BF16:
        pytest.skip("this processor has no AVX512_BF16")
    monkeypatch.setattr(linear, "MULTIPLIES_BF16", multiplies_bf16)
    model, batch = make_model().bfloat16(), make_batch()
    rows, _, _ = one_pass_rows(model, batch)
    same_dtype = pass_by_pass(model, batch)
    reference = pass_by_pass(copy.deepcopy(model).double(), batch)
    for name, row in rows.items():
        assert row.dtype == torch.bfloat16
        assert within_twice(row, same_dtype[name], reference[name], reference[name].norm()), name


def test_rows_with_dropout_equal_k_backward_passes(make_model, make_batch):
    """The seed decides the masks, so both ways drop the same elements."""
    model, batch = make_model(dropout=0.3), make_batch()
    seed = torch.tensor(7)
    rows, _, _ = one_pass_rows(model, batch, seed=seed)
    expected = pass_by_pass(model, batch, seed=seed)
    for name, row in rows.items():
        torch.testing.assert_close(row, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batches_add_up(make_model, make_batch):
    model, batch = make_model(), make_batch()
    once, _, _ = one_pass_rows(model, batch)
    twice, _, _ = one_pass_rows(model, batch, accumulate_twice=True)
    for name, row in once.items():
        torch.testing.assert_close(twice[name], 2 * row, rtol=1e-5, atol=1e-6, msg=name)


def test_embedding_rows_are_zero_after_zeroing(make_model, make_batch):
    batch = make_batch()
    rows, _, model = one_pass_rows(make_model(), batch)
    assert rows["encoder.embeddings.word.weight"].any()
    model.zero_sparse_rows(batch)
    for table in ("word", "position", "token_type"):
        assert not rows[f"encoder.embeddings.{table}.weight"].any()


def test_heads_write_only_into_their_own_row(make_model, make_batch):
    rows, _, _ = one_pass_rows(make_model(), make_batch())
    assert rows["heads.sst.output.weight"][0].any()
    assert not rows["heads.sst.output.weight"][1:].any()
    assert not rows["heads.quora.output.weight"][[0, 2]].any()


def test_flat_storage_is_what_the_model_computes_with(make_model, make_batch):
    _, flat, model = one_pass_rows(make_model(), make_batch())
    for name, parameter in model.named_parameters():
        if name in flat.slots:
            view = flat.slots[name].view(flat.compute)
            assert view.data_ptr() == parameter.data_ptr()
            assert flat.slots[name].offset % 64 == 0
        else:
            assert name.startswith("heads.cfimdb")
            assert not parameter.requires_grad
    matrices = [slot for slot in flat.slots.values() if len(slot.shape) > 1]
    assert all(slot.offset < flat.decayed for slot in matrices)
    assert all(s.offset >= flat.decayed for s in flat.slots.values() if len(s.shape) == 1)
