"""Check how large the batches of a step are, and name the field of the recipe that decides it."""

from collections.abc import Sequence

import torch

from ..config.recipe import Recipe
from ..data.sampler import Sampler, TokenSampler
from ..runtime.oom import check_memory
from ..utils.errors import InputError


def check_batches_fit(
    recipe: Recipe,
    samplers: Sequence[Sampler],
    tasks_a_step: int,
    *,
    width: int,
    device: torch.device,
    ranks: int,
) -> None:
    """Refuse batches whose tokens alone do not fit into memory, at three tokens a sentence.

    Args:
        recipe: of the phase.
        samplers: of its tasks and objectives.
        tasks_a_step: how many of these a step trains.
        width: of the hidden states.
        device: of the model.
        ranks: that share a batch.

    Raises:
        OutOfMemoryError: they do not fit; the message says what to lower.
    """
    sizes = [_tokens(sampler) for sampler in samplers]
    tokens = sum(sizes) if tasks_a_step > 1 else max(sizes)
    states = torch.float32.itemsize * width * tokens // (recipe.micro_batches * ranks)
    wanted = torch.int64.itemsize * tokens + (states if device.type == "cpu" else 0)
    check_memory(wanted, smaller_batches(recipe, samplers))


def check_division(
    recipe: Recipe, samplers: Sequence[Sampler], tasks_a_step: int, ranks: int
) -> None:
    """Refuse batches with fewer examples than ranks and micro-batches need.

    Raises:
        InputError: the batches are too small; the message says what to raise.
    """
    smallest = min(samplers, key=lambda sampler: sampler.batch_size)
    examples = smallest.batch_size
    if tasks_a_step > 1:
        examples = sum(sampler.batch_size for sampler in samplers)
    shares = ranks * recipe.micro_batches
    if examples < ranks or (recipe.micro_batches > 1 and smallest.batch_size < shares):
        field, size = _field(recipe, smallest)
        longest = ""
        if isinstance(smallest, TokenSampler):
            longest = f", {smallest.batch_size} of the longest sequences"
        raise InputError(
            f"{field} = {size}{longest}: too small for {ranks} ranks with {recipe.micro_batches} "
            "micro_batches; raise it"
        )


def smaller_batches(recipe: Recipe, samplers: Sequence[Sampler]) -> str:
    """Return what to do where a step's activations do not fit into memory."""
    field, size = _field(recipe, max(samplers, key=_tokens))
    return (
        f"lower {field} (now {size}), raise micro_batches (now {recipe.micro_batches}), or set "
        "checkpoint_layers=true"
    )


def _tokens(sampler: Sampler) -> int:
    """Return the tokens of a batch, at three tokens a sentence where they are not known."""
    return sampler.tokens if isinstance(sampler, TokenSampler) else 3 * sampler.batch_size


def _field(recipe: Recipe, sampler: Sampler) -> tuple[str, int]:
    """Return the field that decides the size of a task's or objective's batches, and the size."""
    name = sampler.task
    if isinstance(sampler, TokenSampler):
        return f"objectives.{name}.tokens_per_batch", sampler.tokens
    for table, settings in (("tasks", recipe.tasks), ("objectives", recipe.objectives)):
        if name in settings and settings[name].batch_size:
            return f"{table}.{name}.batch_size", sampler.batch_size
    return "batch_size", sampler.batch_size
