"""The 2x rule: at most twice the error that torch itself makes in the same dtype."""

import torch
from torch import Tensor


def assert_within_twice(result: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Compare largest errors against float64.

    Where torch's own result happens to be exact or nearly so, one rounding of the largest value to
    the result's dtype is allowed instead.
    """
    assert result.shape == torchs.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (result.double() - exact).abs().max()
    allowed = 2 * (torchs.double() - exact).abs().max()
    one_rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max()
    assert error <= max(allowed, one_rounding), f"{error:.3e} against {allowed:.3e}"
