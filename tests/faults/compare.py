"""The same global batches on 1, 2 and 4 ranks: the same losses, and the same bits when repeated.

Ranks differ from one process in the order of their sums alone.  How much that may change the losses
is measured, not guessed: one process that adds the same numbers up in 2 and in 4 micro-batches
differs from one that takes the batch whole for the same reason.  Twice the larger of these two
differences is allowed.
"""

import json
from pathlib import Path
from typing import Any

from engine.train import main

from ..runtime.launch import launch

_EXACTLY = [
    *("precision=fp32", "schedule=constant", "lr=3e-4", "warmup=0", "dropout=0"),
    *("encoder.hidden_dropout_prob=0", "encoder.attention_probs_dropout_prob=0"),
    *("encoder.hidden_size=64", "encoder.num_hidden_layers=2", "encoder.num_attention_heads=4"),
    *("encoder.intermediate_size=128", "encoder.vocab_size=512", "batch_size=16", "log_every=1"),
]


def compare_ranks(folder: Path, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps on 1, 2 and 4 ranks, sharded and replicated.

    Returns:
        The largest relative differences of a loss from one process, the ``allowed`` one, and which
        runs were not ``repeated`` to the bit.
    """

    def arguments(name: str, *settings: str) -> list[str]:
        options = ["--out", str(folder / name), "--device", "cpu", "--max-steps", str(steps)]
        return ["demo", *options, "--set", *_EXACTLY, *settings]

    assert main(arguments("whole")) == 0
    for parts in (2, 4):
        assert main(arguments(f"parts-{parts}", f"micro_batches={parts}")) == 0
    for ranks in (2, 4):
        runs = [
            arguments(f"{mode}-{ranks}{again}", f"distribute={mode}")
            for mode in ("sharded", "replicated")
            for again in ("", "-again")
        ]
        launch(ranks, runs, folder / "log")
    whole = losses(folder / "whole")
    names = [f"{mode}-{ranks}" for mode in ("sharded", "replicated") for ranks in (2, 4)]
    allowed = 2 * max(difference(whole, losses(folder / f"parts-{n}")) for n in (2, 4))
    return {
        "steps": steps,
        "allowed": allowed,
        "differences": {name: difference(whole, losses(folder / name)) for name in names},
        "not_repeated": [
            name for name in names if losses(folder / name) != losses(folder / f"{name}-again")
        ],
    }


def losses(folder: Path) -> list[float]:
    """Return every task's loss of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"].values()]


def difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
