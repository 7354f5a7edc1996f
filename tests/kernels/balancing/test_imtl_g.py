"""IMTL-G."""

import torch

from kernels import balancing

from .methods import assert_agrees_with_torchjd, assert_no_conflict, gradients, update


def test_agrees_with_torchjd(torchjd) -> None:
    assert_agrees_with_torchjd("imtl_g", torchjd.IMTLGWeighting(), 1e-9)


def test_imtl_projects_equally() -> None:
    rows = gradients(5, 1)
    ours = update(balancing.imtl_g, rows)
    products = rows @ ours / rows.norm(dim=1)
    torch.testing.assert_close(products, products.mean().expand(5), rtol=1e-9, atol=0)


def test_no_conflict_with_any_task() -> None:
    assert_no_conflict("imtl_g")
