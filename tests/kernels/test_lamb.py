"""LAMB on flat parameters against Algorithm 2 of You et al. (2020), tensor by tensor."""

import pytest
import torch
from torch import Tensor

from kernels import combine_adamw_, lamb_update_

from .tolerance import assert_within_twice

SIZES = (1, 700, 64, 3, 130)  # one number, many, a vector's worth, few; some are all zero
BETAS, EPS, DECAY, LR = (0.9, 0.999), 1e-6, 0.1, 0.01
DECAYED = 701


def literal(tensors: list[Tensor], gradients: list[list[Tensor]]) -> Tensor:
    """Algorithm 2 with bias correction, in the dtype of the tensors."""
    results = []
    for number, x in enumerate(tensors):
        x = x.clone()
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for step, gradient in enumerate(gradients, start=1):
            g = gradient[number].to(x.dtype)
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            r = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
            u = r + (DECAY if number < 2 else 0.0) * x
            norms = x.norm(), u.norm()
            x = x - LR * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * u
        results.append(x)
    return torch.cat(results)


def flat(tensors: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
    """The same through two task rows that add up to the gradient."""
    master = torch.cat(tensors).to(dtype)
    moments = torch.zeros_like(master), torch.zeros_like(master)
    low = master.bfloat16()
    offsets = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    weights = torch.tensor([0.5, 2.0], dtype=dtype)
    step = torch.zeros((), dtype=dtype)
    for gradient in gradients:
        whole = torch.cat(gradient).to(dtype)
        rows = torch.stack([whole, whole / 4])
        for skip in (torch.tensor(True), torch.tensor(False)):
            step += ~skip
            combine_adamw_(
                *(rows, weights, master, *moments),
                **{"lr": 0.0, "step": step.clamp(min=1), "betas": BETAS, "skip": skip},
            )
            lamb_update_(
                *(master, *moments, offsets, low),
                **{"lr": LR, "step": step, "betas": BETAS, "eps": EPS, "skip": skip},
                weight_decay=DECAY,
                decayed=DECAYED,
            )
    assert torch.equal(low, master.bfloat16())
    return master


def problem() -> tuple[list[Tensor], list[list[Tensor]]]:
    tensors = [torch.randn(size, dtype=torch.float64).float().double() for size in SIZES]
    tensors[3].zero_()  # no norm yet
    gradients = []
    for step in range(4):
        own = [torch.randn(size).double() for size in SIZES]
        if step == 0:
            own[4].zero_()  # no gradient yet, and no decay: u = 0
        gradients.append(own)
    return tensors, gradients


def test_float64_is_the_algorithm() -> None:
    tensors, gradients = problem()
    exact = literal(tensors, gradients)
    torch.testing.assert_close(
        flat(tensors, gradients, torch.float64), exact, rtol=1e-10, atol=1e-12
    )


def test_float32_is_as_exact_as_torch() -> None:
    tensors, gradients = problem()
    torchs = literal([tensor.float() for tensor in tensors], gradients)
    assert_within_twice(
        flat(tensors, gradients, torch.float32), torchs, literal(tensors, gradients)
    )


def test_offsets_that_do_not_cover() -> None:
    x = torch.zeros(5)
    with pytest.raises(ValueError, match="offsets: expected from 0 to 5, got from 0 to 4"):
        lamb_update_(x, x, x, [0, 4], lr=0.1, step=torch.ones(()))
