"""Measure how the step grows with the number of tasks, the shape and the examples a task.

Tasks beyond the three real ones are copies of them under other names: real sentences, heads of
their own.  Each case runs PCGrad and the plain sum in turn.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engine.config import recipe as recipes
from engine.data.collate import PackedBatch, pack
from engine.data.split import TokenizedSplit
from engine.data.task_schema import FORMATS
from engine.gradients.balancing import Balancer, BalanceSettings, TrainedTasks, build_method
from engine.gradients.flat_parameters import FlatParameters
from engine.gradients.groups import ParamGroups
from engine.models.bert import BertConfig
from engine.models.multitask import MultitaskModel
from engine.optim.adamw import AdamW
from engine.runs.run import begin
from engine.runtime.execution import Execution
from engine.runtime.precision import pick_dtype
from engine.training.step import MultitaskStep

from . import harness

# Layers, width, heads.
SHAPES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "MiniLM": (6, 384, 12),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
_KINDS = (("sst", "single"), ("quora", "difference"), ("sts", "cosine"))
_BATCHES = 3


class Case(NamedTuple):
    """One point of the growth: a shape by name, K tasks, examples a task."""

    shape: str
    num_tasks: int
    examples: int


CASES = {
    "tasks": [Case("MiniLM", tasks, 32) for tasks in (2, 3, 4, 8, 16)],
    "shape": [Case(shape, 3, 32) for shape in SHAPES],
    "examples": [Case("MiniLM", 3, examples) for examples in (8, 16, 32, 64, 128, 256, 512)],
}


def measure(options: argparse.Namespace, device: torch.device, console: Console) -> None:
    """Run all cases, print a table of each kind, and keep the record."""
    splits, vocab_size = _splits(options)
    results: dict[str, list[dict[str, object]]] = {}
    for kind, cases in CASES.items():
        table = Table(title=f"growth with {kind}, {pick_dtype('auto', device)}")
        for column in ("shape", "tasks", "examples", "tokens", "PCGrad s", "sum s", "PCGrad/sum"):
            table.add_column(column, justify="right")
        table.add_column("us a token", justify="right")
        records = results.setdefault(kind, [])
        for case in cases:
            batches = [_batch(case, splits, turn) for turn in range(_BATCHES)]
            samples = _samples(case, batches, vocab_size, device, options.rounds)
            tokens = sum(batch.num_tokens for batch in batches) / len(batches)
            records.append(case._asdict() | {"tokens": tokens, "seconds": samples})
            pcgrad, plain = (harness.median(samples[name]) for name in ("pcgrad", "sum"))
            figures = (pcgrad, plain, pcgrad / plain)
            table.add_row(
                *(case.shape, str(case.num_tasks), str(case.examples), f"{tokens:,.0f}"),
                *(f"{figure:.3f}" for figure in figures),
                f"{1e6 * pcgrad / tokens:.1f}",
            )
        console.print(table)
    if options.json:
        harness.write_record(options.json, "step growth", device, results, replace=options.force)
        console.print(f"wrote {options.json}")


def _splits(options: argparse.Namespace) -> tuple[list[TokenizedSplit], int]:
    """Tokenize the three real tasks; return them and the size of the vocabulary."""
    settings = [
        recipes.override(key, str(value.absolute()))
        for key, value in (("data", options.data), ("init", options.init))
        if value is not None
    ]
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return [run.split(task, "train") for task, _ in _KINDS], run.config.vocab_size


def _task(number: int) -> str:
    return f"task{number}"


def _batch(case: Case, splits: Sequence[TokenizedSplit], turn: int) -> PackedBatch:
    chosen = [
        replace(splits[number % len(splits)], task=_task(number))
        for number in range(case.num_tasks)
    ]
    rng = np.random.default_rng(turn)
    return pack(chosen, [rng.integers(0, len(split), case.examples) for split in chosen])


def _samples(
    case: Case, batches: Sequence[PackedBatch], vocab_size: int, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    torch.manual_seed(0)
    numbers = itertools.count()
    steps = _steps(case, vocab_size, device)
    if device.type == "cuda":  # as batches of a training run are prepared
        batches = [steps["sum"].model.with_lookup_plan(batch) for batch in batches]
    batches = [batch.to(device) for batch in batches]
    current = [batches[0]]
    return harness.interleave(
        {
            name: (lambda step=step: step(current[0], next(numbers), 1e-5))
            for name, step in steps.items()
        },
        device,
        rounds=rounds,
        warmup=2 * len(batches) if steps["sum"].execution.kind == "graphs" else 1,
        setup=lambda turn: current.__setitem__(0, batches[turn % len(batches)]),
    )


def _steps(case: Case, vocab_size: int, device: torch.device) -> dict[str, MultitaskStep]:
    """PCGrad and the sum on one model: two of the largest would not fit into small memories."""
    layers, width, heads = SHAPES[case.shape]
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    tasks = tuple(_task(number) for number in range(case.num_tasks))
    kinds = [_KINDS[number % len(_KINDS)] for number in range(case.num_tasks)]
    model = MultitaskModel(
        config,
        [replace(FORMATS[real], task=task) for task, (real, _) in zip(tasks, kinds, strict=True)],
        {task: features for task, (_, features) in zip(tasks, kinds, strict=True)},
        pooling="mean",
        dropout_p=0.1,
    ).train()
    flat = FlatParameters(model, tasks, device=device, compute_dtype=pick_dtype("auto", device))
    groups = ParamGroups(flat, tasks, "model")
    trained = TrainedTasks(tasks, (case.examples,) * case.num_tasks)
    optimizer = AdamW(flat, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    return {
        name: MultitaskStep(
            model,
            tasks,
            flat,
            optimizer,
            groups,
            Balancer(build_method(name, trained, BalanceSettings()), groups.sole_tasks, device),
            loss_weights=[1.0] * case.num_tasks,
            clip_norm=1.0,
            seed=0,
            execution=Execution("auto", device),
        )
        for name in ("pcgrad", "sum")
    }
