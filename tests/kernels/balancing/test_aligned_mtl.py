"""Aligned-MTL."""

import pytest
import torch

from kernels import balancing

from .methods import (
    PREFERENCES,
    SCALE_MODES,
    assert_agrees_with_torchjd,
    gradients,
    rows_with_preferences,
)


def test_agrees_with_torchjd(torchjd) -> None:
    assert_agrees_with_torchjd("aligned_mtl", torchjd.AlignedMTLWeighting(), 1e-9)


@pytest.mark.parametrize("scale_mode", SCALE_MODES)
@pytest.mark.parametrize("with_preferences", [False, True])
def test_of_any_scale_agrees_with_torchjd(torchjd, scale_mode: str, with_preferences: bool) -> None:
    for rows in rows_with_preferences():
        given = PREFERENCES[: len(rows)] if with_preferences else None
        matrix = rows @ rows.T
        expected = torchjd.AlignedMTLWeighting(given, scale_mode)(matrix)
        result = balancing.aligned_mtl(matrix, given, scale_mode)
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)


def test_aligned_mtl_makes_singular_values_equal() -> None:
    rows = gradients(5, 3, 9)
    matrix = rows @ rows.T
    values = torch.linalg.eigvalsh(matrix)
    expected = {"min": values.min(), "median": values.median(), "rmse": values.mean()}
    for scale_mode in SCALE_MODES:
        transformed = torch.stack(
            [balancing.aligned_mtl(matrix, each, scale_mode) @ rows for each in torch.eye(5)]
        )
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(transformed @ transformed.T, expected[scale_mode] * identity)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match=r"pref_vector: expected \[3\], got \[4\]"):
        balancing.aligned_mtl(matrix, torch.ones(4))
    with pytest.raises(ValueError, match="scale_mode: expected min, median or rmse, got 'max'"):
        balancing.aligned_mtl(matrix, scale_mode="max")
