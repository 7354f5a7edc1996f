"""PCGrad for torch as it is commonly written, over named orders, for comparison.

It clones every task's gradient, walks through all of them in a shuffled order, the gradient itself
included, and adds the results up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def published_update(rows: Sequence[Tensor], order: Tensor) -> Tensor:
    """``[P]`` sum of the projected gradients; ``order[i]`` is the shuffled list for task i."""
    projected = [row.clone() for row in rows]
    for mine, others in zip(projected, order.tolist(), strict=True):
        for other in others:
            dot = torch.dot(mine, rows[other])
            if dot < 0:
                mine -= dot * rows[other] / rows[other].norm() ** 2
    return torch.stack(projected).sum(0)
