"""Batches that are too large or too small: which field of the recipe says so."""

import numpy as np
import pytest
import torch

from engine.config import recipe as recipes
from engine.config.recipe import Recipe
from engine.data.sampler import Sampler, TaskSampler, TokenSampler
from engine.runtime import oom
from engine.training.batch_sizes import check_batches_fit, check_division, smaller_batches
from engine.utils.errors import InputError

LM = ("train=['sst','sts','lm']", "objectives.lm.kind=masked_lm")
# What decides the largest batch and the smallest one, and their sizes.
CASES = {
    "all": ((), "batch_size", 32, "batch_size = 32"),
    "a task": (("tasks.sts.batch_size=40",), "tasks.sts.batch_size", 40, "batch_size = 32"),
    "a small task": (("tasks.sts.batch_size=7",), "batch_size", 32, "tasks.sts.batch_size = 7"),
    "an objective": (
        (*LM, "objectives.lm.batch_size=50"),
        *("objectives.lm.batch_size", 50, "batch_size = 32"),
    ),
    "tokens": (
        (*LM, "objectives.lm.tokens_per_batch=120"),
        *("objectives.lm.tokens_per_batch", 120),
        "objectives.lm.tokens_per_batch = 120, 12 of the longest sequences",
    ),
}


def loaded(*settings: str) -> tuple[Recipe, list[Sampler]]:
    """A recipe, and the samplers of 1,000 examples each, of 10 tokens."""
    recipe = recipes.load("demo", ["train=['sst','sts']", *settings])
    samplers: list[Sampler] = []
    for name, size in zip(
        recipe.train, recipe.batch_sizes([1000] * len(recipe.train)), strict=True
    ):
        objective = recipe.objectives.get(name)
        if objective is not None and objective.tokens_per_batch:
            samplers.append(TokenSampler(name, np.full(1000, 10), objective.tokens_per_batch, 0))
        else:
            samplers.append(TaskSampler(name, 1000, size, 0))
    return recipe, samplers


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_field_that_decides_is_named(case) -> None:
    settings, field, size, smallest = case
    recipe, samplers = loaded(*settings)
    assert smaller_batches(recipe, samplers).startswith(f"lower {field} (now {size}), raise")
    split = recipe.model_copy(update={"micro_batches": 5})
    with pytest.raises(InputError, match=f"^{smallest}: too small for 16 ranks with 5 "):
        check_division(split, samplers, len(samplers), 16)


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "tasks_a_step", "fits"),
    [(1, 1, 2, False), (2, 1, 2, True), (1, 2, 2, True), (1, 1, 1, True)],
)
def test_ranks_and_micro_batches_share_a_batch(
    monkeypatch, ranks: int, micro_batches: int, tasks_a_step: int, fits: bool
) -> None:
    recipe, samplers = loaded(f"micro_batches={micro_batches}")
    # Three tokens for each of 64 examples: fp32 states of 100 values, and an index each.
    states, indices = 3 * 64 * 4 * 100, 3 * 64 * 8
    monkeypatch.setattr(oom, "machine_memory", lambda: states // 2 + indices)

    def check() -> None:
        check_batches_fit(
            recipe, samplers, tasks_a_step, width=100, device=torch.device("cpu"), ranks=ranks
        )

    if fits:
        check()
    else:
        with pytest.raises(InputError, match=r"out of memory: .*; lower batch_size \(now 32\)"):
            check()
