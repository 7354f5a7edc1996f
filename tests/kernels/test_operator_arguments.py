"""No argument of any operator ends the process, is read beyond its end, or gives a wrong result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .test_balancing import SOLVERS
from .test_operators import attention, norms, others
from .test_surgery_weights import operator_samples

ROOT = Path(__file__).parents[2]


def operator_calls() -> dict[str, tuple]:
    """A valid call of every operator; some have two."""
    torch.manual_seed(0)
    rows = torch.randn(4, 5, dtype=torch.float64)
    calls = {**attention(0.2), **norms(by_task=True), **others(), **operator_samples()}
    calls |= {f"{name} alone": arguments for name, arguments in norms(by_task=False).items()}
    calls |= {name: (rows @ rows.T, *given) for name, given in SOLVERS.items()}
    calls["limit_vector_unit"] = (64,)
    calls["onednn_linear"] = tuple(x.bfloat16() for x in calls["onednn_linear"])
    return calls


if __name__ == "__main__":
    print(operator_calls().keys())
