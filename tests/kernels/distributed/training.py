"""A model of three conflicting tasks, its batches, and how far a distributed run may be off.

The reference is one process with the examples of all ranks, in float64.  Without dropout, ranks
differ from one process in float32 in the order of their sums alone.  Other orders of one process
are the same examples permuted: what these come to, twice, is allowed (the rule of
tests/kernels/tolerance.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

TASKS, FEATURES, VOCABULARY, STEPS = 3, 6, 11, 3
PERMUTATIONS = 16


class Examples(NamedTuple):
    """Inputs and targets of one task: token numbers ``[N, 4]`` and numbers ``[N]``."""

    tokens: Tensor
    targets: Tensor

    def part(self, begin: int, end: int) -> "Examples":
        """Return some of the examples."""
        return Examples(self.tokens[begin:end], self.targets[begin:end])


Batch = list[Examples]


class Model(nn.Module):
    """An embedding, a norm and layers that all tasks share, a head for each, one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.LayerNorm(FEATURES)
        self.heads = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(TASKS))
        self.unused = nn.Linear(2, 2)

    def hidden(self, tokens: Tensor) -> Tensor:
        """``[N, FEATURES]``."""
        return self.norm(torch.tanh(self.layer(self.embedding(tokens).mean(1))))

    def forward(self, batch: Sequence[Examples | None]) -> list[Tensor | None]:
        """Return the mean loss of each task; None without examples."""
        return [
            None
            if own is None or not len(own.targets)
            else (head(self.hidden(own.tokens))[:, 0] - own.targets).square().mean()
            for own, head in zip(batch, self.heads, strict=True)
        ]


def model(dtype: torch.dtype = torch.float32) -> Model:
    """Return the same model each time."""
    torch.manual_seed(1)
    return Model().to(dtype)


def batches(sizes: Sequence[int]) -> list[Batch]:
    """Return the batches of all ranks together, ``sizes`` examples of each task."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(STEPS):
        batch = []
        for task, size in enumerate(sizes):
            tokens = torch.randint(VOCABULARY, (size, 4), generator=generator)
            # Each task wants another sign of the same thing, so that gradients conflict.
            targets = (tokens.sum(1) / 10 - 2) * (-1) ** task + task
            batch.append(Examples(tokens, targets))
        made.append(batch)
    return made


def own_part(batch: Batch, counts: Sequence[Sequence[int]]) -> list[Examples | None]:
    """Return this rank's examples; ``counts[rank][task]`` of them, None for 0."""
    rank, parts = dist.get_rank(), list[Examples | None]()
    for task, examples in enumerate(batch):
        begin = sum(of_rank[task] for of_rank in counts[:rank])
        count = counts[rank][task]
        parts.append(examples.part(begin, begin + count) if count else None)
    return parts


def even(size: int) -> list[list[int]]:
    """Return ``counts`` of ``size`` examples of each task on each rank."""
    return [[size] * TASKS for _ in range(dist.get_world_size())]


Train = Callable[[Model, Batch], None]
"""Does one step of one process with the examples of all ranks."""


def error(trained: Model, train: Callable[[Model], Train], data: Sequence[Batch]) -> dict[str, Any]:
    """Compare what ranks trained with one process.

    Args:
        trained: a rank's model after ``STEPS`` steps, its parameters whole.
        train: makes the step of one process for a model.
        data: the joined batches, float32.

    Returns:
        A digest of the weights; on the first rank the error and what is ``allowed``, too.
    """
    if dist.get_rank() > 0:  # whose digest says that its weights are those of the first rank
        return {"digest": digest(trained)}
    wanted = _train_alone(train, data, torch.float64, 0)
    alone = [_train_alone(train, data, torch.float32, seed) for seed in range(PERMUTATIONS)]
    return {
        "error": _distance(_weights(trained), wanted),
        "allowed": 2 * max(_distance(one, wanted) for one in alone),
        "digest": digest(trained),
    }


def digest(trained: nn.Module) -> list[float]:
    """Return the sums of the weights' bits."""
    return [
        float(weight.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
        for weight in trained.parameters()
    ]


def _train_alone(
    train: Callable[[Model], Train], data: Sequence[Batch], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    own = model(dtype)
    step = train(own)
    for batch in data:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(one.targets), generator=generator) for one in batch]
        reordered = [
            Examples(one.tokens[o], one.targets[o].to(dtype))
            for one, o in zip(batch, orders, strict=True)
        ]
        step(own, reordered)
    return _weights(own)


def _weights(trained: nn.Module) -> list[Tensor]:
    return [weight.detach().double() for weight in trained.parameters()]


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest error of a weight, as a share of its tensor's largest."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)
    )
