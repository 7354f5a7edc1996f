"""ConFIG."""

import pytest
import torch

from kernels import balancing

from .methods import PREFERENCES, assert_no_conflict, gradients, rows_with_preferences, update


def test_config_agrees_with_torchjd(torchjd) -> None:
    for seed in range(12):
        rows = gradients(1 + seed % 6, seed)
        expected = torchjd.ConFIG()(rows)
        torch.testing.assert_close(update(balancing.config, rows), expected, rtol=1e-9, atol=1e-9)


def test_config_with_preferences_agrees_with_torchjd(torchjd) -> None:
    for rows in rows_with_preferences():
        given = PREFERENCES[: len(rows)]
        result = balancing.config(rows @ rows.T, given) @ rows
        torch.testing.assert_close(result, torchjd.ConFIG(given)(rows), rtol=1e-7, atol=1e-8)


def test_no_conflict_with_any_task() -> None:
    assert_no_conflict("config")


def test_cosines_are_in_proportion_to_preferences() -> None:
    rows, given = gradients(4, 5, 9), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    update = balancing.config(rows @ rows.T, given) @ rows
    cosines = torch.cosine_similarity(rows, update[None])
    torch.testing.assert_close(cosines / given, (cosines / given).mean().expand(4))


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match=r"pref_vector: expected \[3\], got \[1, 3\]"):
        balancing.config(matrix, torch.ones(1, 3))
