"""DeBERTa on packed tokens: what its attention to relative positions needs."""

import pytest
import torch

from kernels import accelerate

from .transformers_cases import (
    LENGTH,
    ROWS,
    SEQUENCES,
    VARIANTS,
    assert_accelerated_runs_are_the_same,
    assert_close,
    base_model,
)

LONG = 23
"""More distances than buckets and than relative positions."""


@pytest.mark.parametrize("length", [LONG, 1])
@pytest.mark.parametrize("variant", ["DeBERTa v3", "DeBERTa v2"])
def test_rows_of_other_lengths(variant: str, length: int) -> None:
    kind, options = VARIANTS[variant]
    assert_accelerated_runs_are_the_same(base_model(kind, **options), length=length)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("DeBERTa")])
def test_packed_inputs(variant: str) -> None:
    """A convolution does not see the neighbours of another sequence."""
    kind, options = VARIANTS[variant]
    model = base_model(kind, **options)
    sequences = [torch.randint(4, 50, (1, length)) for length in SEQUENCES]
    expected = [model(ids).last_hidden_state for ids in sequences]
    accelerate(model)
    boundaries = torch.tensor((0, *SEQUENCES)).cumsum(0).int()
    found = model(torch.cat(sequences, 1), cu_seq_lens_q=boundaries).last_hidden_state
    assert_close(found, torch.cat(expected, 1))


def test_parts_of_an_accelerated_model_are_not_called_alone() -> None:
    model = base_model("deberta-v2")
    accelerate(model)
    hidden, mask = torch.zeros(ROWS, LENGTH, 32), torch.ones(ROWS, LENGTH)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder(hidden, mask)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder.layer[0](hidden, mask)
