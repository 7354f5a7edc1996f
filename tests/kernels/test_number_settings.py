"""Numbers that settings of public functions cannot be: refused in one line, on every dtype."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import kernels
from kernels import balancing

from .operator_calls import layers, public_calls

NOT_FINITE = (math.nan, math.inf, -math.inf)
NEGATIVE = (-1.0, -1e-300)
NUMBERS = (*NOT_FINITE, *NEGATIVE)
RATES = (math.nan, math.inf, -0.1, 1.0)

# What each setting cannot be, by the public function, or those of operator_calls.
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "combine_adamw_": {
        **dict.fromkeys(("lr", "eps", "weight_decay"), NUMBERS),
        "betas": tuple((rate, 0.9) for rate in RATES) + tuple((0.9, rate) for rate in RATES),
    },
    "update_guard": {
        "max_norm": (math.nan, -1.0, -math.inf),
        "loss_scale": (0.0, *NUMBERS),
        "weights": (torch.ones(2), torch.ones(4), torch.ones(1, 3), torch.ones(3, 1)),
    },
    "update_summary": {"max_norm": (math.nan, -1.0, -math.inf)},
    "balancing.cagrad": {"c": (*NUMBERS, 1e39)},
    "balancing.nash_mtl": {"max_norm": NUMBERS},
    "balancing.fairgrad": {"alpha": NUMBERS},
    "balancing.main_aux": {
        "main": (-1, 3, 0.5, math.nan, math.inf),
        "auxiliary_weight": (*NUMBERS, 1e39),
    },
    "balancing.krum": {
        "num_byzantine": (-1, 1, 0.5, math.nan),
        "num_selected": (0, 4, 1.5, math.nan),
    },
    "balancing.upgrad": {"pref_vector": (torch.tensor([1.0, math.nan, 1.0]),)},
    "balancing.config": {"pref_vector": (torch.tensor([1.0, math.inf, 1.0]),)},
}
SETTINGS["lamb_update_"] = SETTINGS["combine_adamw_"]
SETTINGS["combine_adamw_segments_"] = SETTINGS["combine_adamw_"] | {
    "ends": ((), (16,), (40,), (16, 41), (41, 40), (-1, 40)),
    "groups": ((), (0,), (0, 2), (-2, 0)),
}
LAYERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "layer_norm": {"eps": NUMBERS},
    "rms_norm": {"eps": NUMBERS},
    "layer_norm_fn": {"eps": NUMBERS, "dropout_p": RATES},
    "dropout_add_layer_norm": {"epsilon": NUMBERS, "dropout_p": RATES},
    "dropout_add_rms_norm": {"epsilon": NUMBERS, "dropout_p": RATES},
    "embedding_layer_norm": {"eps": NUMBERS, "dropout_p": RATES},
    "dropout": {"p": RATES},
    "flash_attn_varlen_func": {
        **{"softmax_scale": NOT_FINITE, "dropout_p": RATES},
        "window_size": (
            *((wrong, 3) for wrong in (-2, -(2**62), 1.0, math.nan, True, "1", None, [1])),
            *((3, wrong) for wrong in (-2, 0.5, False, torch.ones(3, dtype=torch.int64))),
            *((), (3,), (3, 3, 3), 3, -1, None, "34", torch.ones(2, dtype=torch.int64)),
        ),
    },
    "geglu": {"dropout_p": RATES},
    "swiglu": {"dropout_p": RATES},
}
LAYERS["flash_attn_varlen_qkvpacked_func"] = LAYERS["flash_attn_varlen_func"]


def refused(call: Callable[..., Any], setting: str, value: object) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (each has its own message)
        call(**{setting: value})
    message = str(error.value)
    assert "\n" not in message
    named = {"p": "dropout", "dropout_p": "dropout", "epsilon": "eps", "betas": "beta"}
    assert named.get(setting, setting) in message


@pytest.mark.parametrize("name", SETTINGS)
def test_a_number_without_meaning_is_refused(name: str) -> None:
    function, arguments = public_calls()[name]
    for setting, values in SETTINGS[name].items():
        for value in values:
            refused(partial(function, **arguments), setting, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_number_without_meaning_is_refused(name: str, dtype: torch.dtype) -> None:
    function, arguments = layers(dtype)[name]
    for setting, values in LAYERS[name].items():
        for value in values:
            refused(partial(function, **arguments), setting, value)


def test_numbers_at_their_bounds_have_a_meaning() -> None:
    matrix, weights = torch.eye(3), torch.ones(3)
    for bound in (None, math.inf):
        assert kernels.update_guard(matrix, weights, max_norm=bound).scale == 1
    assert kernels.update_guard(matrix, weights, max_norm=0.0).scale == 0
    segments = kernels.update_guard(matrix.repeat(2, 1, 1), weights.repeat(2, 1), max_norm=1)
    assert 0 < segments.scale < 1
    on_device = torch.tensor(-1.0)  # whose value is not looked at
    assert kernels.update_guard(matrix, weights, max_norm=on_device).scale < 0


# ---- gradnorm, proportional ----------------------------------------------------------------------


def test_gradnorm_refuses_numbers_without_meaning() -> None:
    arguments = (torch.eye(2), torch.ones(2), torch.ones(2))
    for bad in NUMBERS:
        with pytest.raises(ValueError, match=r"^alpha: expected a finite number of at least 0"):
            balancing.gradnorm(*arguments, alpha=bad)
    for bad in (*NUMBERS, 1e39):
        with pytest.raises(ValueError, match=r"^lr: expected a finite number of at least 0"):
            balancing.gradnorm(*arguments, lr=bad)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5, 1e3, 1e300])
@pytest.mark.parametrize("lr", [0.0, 0.025, 10.0, 3e38])
def test_gradnorms_weights_add_up(alpha: float, lr: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 7, dtype=torch.float64)
    all_rows = (
        rows,
        0 * rows,
        rows * torch.tensor([[1e-15], [1.0], [1e15]]),
        rows[:1].repeat(3, 1),
    )
    all_ratios = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.5, 1.5, 1.0), (0.0, 1e30, 1e-30))
    for one in all_rows:
        for ratios in all_ratios:
            weights = balancing.gradnorm(
                one @ one.T, torch.ones(3), torch.tensor(ratios), alpha, lr
            )
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum(), torch.tensor(3.0))


@pytest.mark.parametrize("ratio", [-1.0, *NOT_FINITE])
def test_gradnorm_has_no_weights_for_a_ratio_without_meaning(ratio: float) -> None:
    ratios = torch.tensor([1.0, ratio])
    assert balancing.gradnorm(torch.eye(2), torch.ones(2), ratios).isnan().all()


def test_sizes_without_meaning_are_refused() -> None:
    for bad in ([0, 0], [-1, 2], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match=r"^sizes: expected finite numbers of at least 0"):
            balancing.proportional(torch.eye(2), torch.tensor(bad))


def test_sizes_beyond_float16() -> None:
    weights = balancing.proportional(torch.eye(2).half(), torch.tensor([1_000_000, 3_000_000]))
    assert weights.tolist() == [0.25, 0.75]
