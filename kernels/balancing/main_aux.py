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
    count = gram.shape[-1]
    if main not in range(count):
        raise ValueError(f"main: expected 0 to {count - 1}, got {main}")
    matrix = gram.double()
    is_main = torch.arange(count, device=gram.device) == main
    members = torch.stack([is_main.double(), auxiliary_weight * (~is_main).double()])
    # Not a tensor of a list, whose copy from the host a CUDA graph could not replay.
    order = torch.arange(2, device=gram.device).repeat(2, 1)
    of_two = (members @ matrix @ members.T).contiguous()
    weights = pcgrad_weights(of_two, order) @ members
    return in_dtype(weights, gram.dtype)
