"""The same global batches on 1, 2 and 4 ranks: the same losses, and the same bits when repeated.

Without dropout, ranks differ from one process in the order of their sums alone.  How far two such
runs may lie apart follows from two things:

1.  A loss is the mean of n numbers that are not negative.  Added up in whatever order and scaled,
    each is off by at most (n + 2) u of itself, u = 2^-24: two are at most 2 (n + 2) u apart.
2.  What the order of sums does to gradients, and so to the weights of later steps, has no bound
    that is worth having, but one process shows it: the same batches taken in 2, 4 and 8
    micro-batches are the same numbers added up in other orders.  Up to each step twice the largest
    difference that these have come to is allowed, by the same rule as for kernels.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from ..engine.launch import launch
from .outcome import outcome
from .progress import say

BATCH_SIZE = 16
PARTS, RANKS, MODES = (2, 4, 8), (2, 4), ("sharded", "replicated")
_EXACTLY = [
    *("precision=fp32", "schedule=constant", "lr=3e-4", "warmup=0", "dropout=0"),
    *("encoder.hidden_dropout_prob=0", "encoder.attention_probs_dropout_prob=0"),
    *("encoder.hidden_size=64", "encoder.num_hidden_layers=2", "encoder.num_attention_heads=4"),
    *("encoder.intermediate_size=128", "encoder.vocab_size=512", "log_every=1"),
    f"batch_size={BATCH_SIZE}",
]


def compare_ranks(folder: Path, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps on 1, 2 and 4 ranks, sharded and replicated, each of them twice.

    Returns:
        By run and step, the largest relative difference of a loss from that of one process, and
        the ``allowed`` one; ``largest``, each run's in all steps, and ``of_allowed``, the largest
        share of what is allowed; and which runs were ``not_repeated`` to the bit.
    """

    def arguments(name: str, *settings: str) -> list[str]:
        options = ["--out", str(folder / name), "--device", "cpu", "--max-steps", str(steps)]
        return ["demo", *options, "--set", *_EXACTLY, *settings]

    say("ranks: one process, whole batches and micro-batches")
    parted = [arguments(f"parts-{parts}", f"micro_batches={parts}") for parts in PARTS]
    launch(1, [arguments("whole"), arguments("whole-again"), *parted], folder / "log")
    for ranks in RANKS:
        say(f"ranks: {ranks} processes, {' and '.join(MODES)}, twice")
        runs = [
            arguments(f"{mode}-{ranks}{again}", f"distribute={mode}")
            for mode in MODES
            for again in ("", "-again")
        ]
        launch(ranks, runs, folder / "log")
    names = [f"{mode}-{ranks}" for mode in MODES for ranks in RANKS]
    allowed = tolerance([differences(folder, f"parts-{parts}") for parts in PARTS])
    found = {name: differences(folder, name) for name in names}
    return {
        "steps": steps,
        "allowed": allowed,
        "differences": found,
        "largest": {name: max(values) for name, values in found.items()},
        "of_allowed": {
            name: max(value / most for value, most in zip(values, allowed, strict=True))
            for name, values in found.items()
        },
        "not_repeated": [
            name
            for name in ["whole", *names]
            if outcome(folder / name) != outcome(folder / f"{name}-again")
        ],
    }


def tolerance(reordered: list[list[float]]) -> list[float]:
    """Return what is allowed in each step, by what reordering did in one process."""
    own = 2 * (BATCH_SIZE + 2) * 2**-24
    of_steps = [max(values) for values in zip(*reordered, strict=True)]
    return [own + 2 * so_far for so_far in itertools.accumulate(of_steps, max)]


def differences(folder: Path, name: str) -> list[float]:
    """Return for each step the largest relative difference of a task's loss from one process'."""
    runs = zip(losses(folder / "whole"), losses(folder / name), strict=True)
    return [
        max(abs(a - b) / abs(a) for a, b in zip(whole, other, strict=True)) for whole, other in runs
    ]


def losses(folder: Path) -> list[list[float]]:
    """Return the tasks' losses of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [list(json.loads(line)["losses"].values()) for line in lines]
