"""Algorithm 1 of Yu et al. (2020), word by word, on whole gradients in float64."""

from torch import Tensor


def projected_gradients(rows: Tensor, order: Tensor) -> Tensor:
    """``[K, P]``: every task's gradient after its projections; ``order[i]`` is its sequence."""
    rows = rows.double()
    projected = rows.clone()
    for i, gradient in enumerate(projected):
        for j in order[i].tolist():
            if j == i:
                continue
            dot = gradient @ rows[j]
            if dot < 0:
                gradient -= dot / rows[j].square().sum() * rows[j]
    return projected


def reference_pcgrad(rows: Tensor, order: Tensor) -> Tensor:
    """``[P]``: the update, the sum of the projected gradients."""
    return projected_gradients(rows, order).sum(0)
