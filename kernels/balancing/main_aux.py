"""PCGrad between a main task and the weighted sum of its auxiliaries."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import LARGEST, check_gram, in_dtype, nan_unless_finite
from .pcgrad import pcgrad_weights


@nan_unless_finite
def main_aux(gram: Tensor, main: int = 0, auxiliary_weight: float = 0.3) -> Tensor:
    """PCGrad between one main task and the weighted sum of all others.

    The others enter as one gradient ``g_aux = auxiliary_weight * sum of the auxiliaries``; main and
    auxiliary gradient are then projected by each other where they conflict.

    Args:
        gram: ``[K, K]``, floating point.
        main: the number of the main task, from 0.
        auxiliary_weight: factor on the sum of the others, from 0 to the largest float32.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram)
    check_number("auxiliary_weight", auxiliary_weight, LARGEST)
    if main not in range(len(gram)):
        raise ValueError(f"main: expected 0 to {len(gram) - 1}, got {main}")
    matrix = gram.double()
    members = matrix.new_full((2, len(gram)), auxiliary_weight)
    members[0] = 1.0
    is_main = torch.arange(len(gram), device=gram.device) == main
    members = torch.where(torch.stack([is_main, ~is_main]), members, 0.0)
    order = torch.tensor([0, 1], device=gram.device).expand(2, 2).contiguous()
    weights = pcgrad_weights(members @ matrix @ members.T, order) @ members
    return in_dtype(weights, gram.dtype)
