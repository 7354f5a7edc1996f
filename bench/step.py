"""``python -m bench.step``: time one multitask training step against its baselines.

The same real batches (32 examples each of SST, Quora and STS) go through this engine, packed, and
through a plain ``transformers`` loop, padded; on a GPU as its eager code, which mostly waits for
Python, and recorded as a CUDA graph of each batch; on a CPU also sorted by length, and packed, with
SDPA for the sentences of each length (bench/batching.py).  The fastest of them without this
project, by the way they combine losses, end the table.  This engine's recorded step runs with a
side stream for weight gradients and without (``one stream``).  The floor is the time of the step's
matrix products, on a GPU replayed, on a CPU in turns with the contestants, plus the bytes of
surgery and update at the copy bandwidth, measured in the same run.  ``--growth`` measures how this
engine's step grows with tasks, shapes and examples; ``--masked-lm`` its step of masked language
modelling beside that of transformers' ``run_mlm.py`` (bench/step_masked_lm.py).
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.runs.run import begin
from engine.runtime.execution import COMPILED, RECORDED
from engine.runtime.precision import multiplies_bf16_fast
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.errors import InputError

from . import harness, random_encoder, step_growth, step_masked_lm
from .baselines import TASKS, HuggingFaceLoop, PaddedBatch
from .batching import (
    Batching,
    NestedRow,
    PaddedColumns,
    SortedParts,
    SortedRow,
    SortedRowOfEachTask,
    VarlenRow,
)
from .step_breakdown import PRODUCTS, encoder_products, floor_seconds, joules_a_run, phase_seconds

_LR = 1e-5
_EXECUTIONS = {
    "cpu": ("eager", ("compile",)),
    "cuda": ("graphs", ("eager", "compiled_graphs", "compile")),
}
"""The usual one of a device, and others to set beside it."""
_BALANCES = {
    "sum": "sum",
    "pcgrad": "published PCGrad",
    "torchjd": "TorchJD PCGrad",
    "task gradients": "TaskGradients, PCGrad",
}
"""Names of transformers loops' ways to combine losses."""
_BATCHINGS: dict[str, dict[str, type[Batching]]] = {
    "cpu": {
        "sorted by length": SortedParts,
        "packed": SortedRow,
        "packed by task": SortedRowOfEachTask,
        "nested": NestedRow,
    },
    "cuda": {"packed": VarlenRow},
}
"""Names of their ways to take sentences, other than padded, on a device."""


class Batches:
    """The batch of the current round, packed and padded."""

    def __init__(self, trainer: Trainer, device: torch.device, count: int) -> None:
        self.packed = first_batches(trainer, device, count)
        self._padded = [PaddedBatch(batch, device) for batch in self.packed]
        self.select(0)

    def select(self, turn: int) -> None:
        """Make batch ``turn`` the current one."""
        self.turn = turn % len(self.packed)
        self.padded = self._padded[self.turn]


def first_batches(trainer: Trainer, device: torch.device, count: int) -> list[PackedBatch]:
    """The first batches of a run, padded to a few shapes where its steps are recorded."""
    with trainer.loader(0) as loader:
        return [batch.to(device) for batch in itertools.islice(loader, count)]


def engine_trainer(
    options: argparse.Namespace,
    balance: str,
    precision: str,
    execution: str,
    *,
    side_stream: bool = True,
) -> Trainer:
    """Put this engine together as ``engine.train cgs`` does."""
    settings = [f"balance={balance}", f"precision={precision}", f"execution={execution}"]
    settings.append(f"batch_size={options.batch_size}")
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return build_trainer(run, torch.device(options.device), side_stream=side_stream)


class RecordedLoop:
    """A transformers loop whose whole steps, forward to optimizer, are CUDA graphs: one a batch."""

    def __init__(self, loop: HuggingFaceLoop, batches: Batches, device: torch.device) -> None:
        self._loop, self._batches, self._device = loop, batches, device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, harness.Contestant] = {}

    def __call__(self) -> object:
        """Train once; a batch's first step records it."""
        turn = self._batches.turn
        if turn not in self._graphs:
            step = functools.partial(self._loop.step, self._batches.padded)
            self._graphs[turn] = harness.graph_replay(step, self._device, self._pool)
        return self._graphs[turn]()


class Engine:
    """This engine's step on the current batch."""

    def __init__(self, trainer: Trainer, batches: Batches, device: torch.device) -> None:
        self.trainer = trainer
        self._batches, self._numbers = batches, itertools.count()
        self._own = first_batches(trainer, device, len(batches.packed))

    def __call__(self) -> object:
        """Train once."""
        return self.trainer.step(self._own[self._batches.turn], next(self._numbers), _LR)


def engines(
    options: argparse.Namespace, batches: Batches, precisions: list[str]
) -> dict[str, Callable[[], Engine]]:
    """What makes this engine's steps, by name: as a run here executes them, and in other ways."""
    device = torch.device(options.device)
    usual, others = _EXECUTIONS[device.type]
    if not options.compile:
        others = tuple(kind for kind in others if kind not in COMPILED)
    variants = [(p, balance, usual) for p in precisions for balance in ("pcgrad", "sum")]
    variants += [(precisions[0], "pcgrad", kind) for kind in others]

    def maker(
        precision: str, balance: str, kind: str, *, side_stream: bool = True
    ) -> Callable[[], Engine]:
        def make() -> Engine:
            trainer = engine_trainer(options, balance, precision, kind, side_stream=side_stream)
            return Engine(trainer, batches, device)

        return make

    makers = {
        f"this engine, {precision}, {balance}" + ("" if kind == usual else f", {kind}"): maker(
            precision, balance, kind
        )
        for precision, balance, kind in variants
    }
    if usual in RECORDED:
        makers[f"this engine, {precisions[0]}, pcgrad, one stream"] = maker(
            precisions[0], "pcgrad", usual, side_stream=False
        )
    return makers


def warmed_up(
    make: Callable[[], Callable[[], object]], batches: Batches, device: torch.device
) -> tuple[Callable[[], object], int]:
    """Make a contestant and run it on every batch, until nothing is compiled any more.

    Returns:
        The contestant, and the most bytes that it held at one time while it worked, recordings
        included.
    """
    torch._dynamo.reset()  # compilations of one contestant don't count against another's limit
    run = make()

    def all_batches() -> None:
        for turn in range(2 * len(batches.packed)):
            batches.select(turn)
            run()

    if device.type == "cuda":
        return run, harness.peak_memory(all_batches, device)
    run()
    return run, harness.peak_memory(run, device)


def peers(
    options: argparse.Namespace, batches: Batches, config: dict[str, object]
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes the steps of transformers loops, by name."""
    device = torch.device(options.device)
    batchings = _BATCHINGS[device.type]

    def maker(precision: str, balance: str, ways: tuple[str, ...]) -> Callable[..., Any]:
        def make() -> Callable[[], object]:
            loop = HuggingFaceLoop(
                options.init,
                balance=balance,
                autocast=precision == "bf16",
                device=device,
                config=config,
                batching=next((batchings[way] for way in ways if way in batchings), PaddedColumns),
                **{way.replace(" ", "_"): True for way in ways if way not in batchings},
            )
            if "recorded" in ways:
                return RecordedLoop(loop, batches, device)
            return lambda: loop.step(batches.padded)

        return make

    loops: list[tuple[str, str, tuple[str, ...]]] = [("bf16", "sum", ())]
    if device.type == "cuda":
        loops += [("bf16", "sum", ("recorded",))]
        # varlen_attn has no kernel elsewhere
        loops += [("bf16", "sum", ways) for ways in (("packed",), ("packed", "recorded"))]
        if importlib.util.find_spec("flash_attn"):
            loops.append(("bf16", "sum", ("flash",)))
        if options.compile:
            loops.append(("bf16", "sum", ("compiled layers", "recorded")))
    else:
        fast = multiplies_bf16_fast(device)
        for precision in ("bf16", "fp32") if fast else ("fp32",):
            loops += [
                (precision, "sum", ("packed",)),
                (precision, "pcgrad", ("packed by task",)),
                (precision, "sum", ("sorted by length",)),
            ]
        if config["model_type"] == "bert":  # nested tensors know no window
            loops.append(("bf16" if fast else "fp32", "sum", ("nested",)))
    loops += [("fp32", "sum", ())]
    loops += [(precision, "pcgrad", ()) for precision in ("bf16", "fp32")]
    if importlib.util.find_spec("torchjd"):
        loops.append(("fp32", "torchjd", ()))
    loops += [
        (precision, balance, ("accelerated",))
        for precision in ("bf16", "fp32")
        for balance in ("sum", "task gradients")
    ]
    if device.type == "cuda":
        loops.append(("bf16", "pcgrad", ("packed",)))
    if options.compile:
        loops += [(precision, "sum", ("compiled",)) for precision in ("bf16", "fp32")]
        if device.type == "cuda":
            loops.append(("bf16", "sum", ("packed", "compiled")))
    makers = {}
    for precision, balance, ways in loops:
        name = ", ".join(("transformers", precision, *ways, _BALANCES[balance]))
        makers[name] = maker(precision, balance, ways)
    return makers


def best_peers(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return name and relative time of the fastest transformers loops without this project.

    Returns:
        By the way that they combine losses; the time as a multiple of the first contestant's.
    """
    medians = {name: harness.median(samples) for name, samples in seconds.items()}
    first = next(iter(medians.values()))
    best = {}
    for balance in (_BALANCES["sum"], _BALANCES["pcgrad"]):
        pattern = f"transformers, (?!.*accelerated).*, {balance}"
        found = [name for name in medians if re.fullmatch(pattern, name)]
        if found:
            name = min(found, key=medians.__getitem__)
            best[balance] = {"name": name, "relative": medians[name] / first}
    return best


def main() -> None:
    """Run the benchmark and print its tables."""
    options = harness.parse(_parser())
    device, console = torch.device(options.device), Console(width=120)
    if device.type == "cpu":
        kernels.keep_freed_memory()  # as engine.train does; it serves the peers, too
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.encoder is not None:
            if options.init is None:
                raise InputError(
                    "--encoder: needs --init, the model folder whose vocab.txt it takes"
                )
            folder = scratch / options.encoder
            random_encoder.write(folder, options.encoder, options.init / "vocab.txt")
            options.init = folder
        if options.growth:
            step_growth.measure(options, device, console)
        elif options.masked_lm is not None:
            step_masked_lm.measure(options, device, console, scratch / "tokenizer")
        else:
            measure(options, device, console)


def measure(options: argparse.Namespace, device: torch.device, console: Console) -> None:
    """Time the steps of all contestants and print tables.

    Raises:
        InputError: ``--only`` leaves no contestant.
        SystemExit: one failed.
    """
    fast = multiplies_bf16_fast(device)
    precisions = ["bf16", "fp32"] if fast else ["fp32"]
    trainer = engine_trainer(options, "pcgrad", precisions[0], "eager")
    batches = Batches(trainer, device, options.rounds + 2)
    config = trainer.model.encoder.config.to_huggingface()
    results: dict[str, Any] = {
        "tasks": TASKS,
        "batch_size": options.batch_size,
        "encoder": config,
        "tokens": [batch.num_tokens for batch in batches.packed],
        "padded_tokens": [batch.padded_tokens for batch in batches.packed],
        "seconds": {},
    }
    save = harness.Record(options, "step", device).write
    results["floor_seconds"] = floor_seconds(trainer, batches.packed[0], device)

    # The most valuable first: a run may be cut off.
    makers = engines(options, batches, precisions) | peers(options, batches, config)
    usual = [name for name in makers if len(name.split(", ")) == 3]
    makers = {name: makers[name] for name in [*usual, *makers]}
    contestants = {}
    results["peak_bytes"], results["failures"] = {}, {}
    results["warmup_seconds"] = {}
    for name, make in makers.items():
        if not re.search(options.only, name):
            continue
        console.print(f"{name} ...")
        start = time.perf_counter()
        try:
            with harness.at_most(options.warmup_seconds):
                run, peak = warmed_up(make, batches, device)
        except Exception as error:  # a peer may fail in any way; the others go on
            results["failures"][name] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            save(results)
            console.print(f"{name} failed: {results['failures'][name]}", soft_wrap=True)
            continue
        contestants[name], results["peak_bytes"][name] = run, peak
        results["warmup_seconds"][name] = time.perf_counter() - start
        # One at a time first: what is measured so far is kept when the next one takes too long.
        results["seconds"][name] = harness.interleave(
            {name: run}, device, rounds=options.rounds, warmup=0, setup=batches.select
        )[name]
        if device.type == "cuda" and isinstance(run, Engine):
            results.setdefault("kernels", {})[name] = harness.kernel_table(run, device)
        save(results)
    if not contestants:
        raise InputError(f"no contestant is left of {', '.join(makers)}")

    turns = dict(contestants)
    if device.type == "cpu":  # whose caches and memory the contestants share with the floor
        turns[PRODUCTS] = encoder_products(trainer, batches.packed[0], device)
    results["seconds"] = harness.interleave(
        turns, device, rounds=options.rounds, setup=batches.select
    )
    if PRODUCTS in turns:
        results["floor_samples"] = results["seconds"].pop(PRODUCTS)
        results["floor_seconds"][PRODUCTS] = harness.median(results["floor_samples"])
    results["best_peers"] = best_peers(results["seconds"])
    save(results)
    recorded = {
        name: run
        for name, run in contestants.items()
        if isinstance(run, RecordedLoop)
        or (isinstance(run, Engine) and run.trainer.step.execution.kind in RECORDED)
    }
    batches.select(0)
    if recorded:
        results["replayed_seconds"] = harness.device_seconds(recorded, device, rounds=5)
        save(results)
    results["phase_seconds"] = phase_seconds(trainer, batches.packed, device)
    results["joules"] = joules_a_run(contestants, device)
    save(results)
    console.print(_table(results, sum(results["tokens"]) / len(results["tokens"])))
    phases = results["phase_seconds"]
    whole = sum(phases.values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in phases.items())
    for name, seconds in results["warmup_seconds"].items():
        console.print(f"{name}: {seconds:.1f} s until it was warm")
    console.print(f"phases of this engine's {precisions[0]} step: {shares}")
    for name, rows in results.get("kernels", {}).items():
        console.print(_kernel_table(name, rows))
    if options.json:
        console.print(f"wrote {options.json}")
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text[:300]}", soft_wrap=True)
    if results["failures"]:
        raise SystemExit(1)


def _kernel_table(name: str, rows: list[dict[str, Any]], most: int = 30) -> Table:
    calls, whole = (sum(row[key] for row in rows) for key in ("calls", "us"))
    table = Table(title=f"kernels of {name}: {calls:.0f} launches, {whole:,.0f} us")
    for column in ("kernel", "calls", "us", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows[:most]:
        share = f"{row['us'] / whole:.1%}"
        table.add_row(row["name"][:80], f"{row['calls']:.0f}", f"{row['us']:,.0f}", share)
    return table


def _table(results: dict, tokens: float) -> Table:  # type: ignore[type-arg]
    samples, floor = results["seconds"], results["floor_seconds"]
    ours = next(iter(samples))
    reference, least = harness.median(samples[ours]), sum(floor.values())
    table = Table(title=f"one step, {tokens:.0f} tokens (padded: {results['padded_tokens'][0]})")
    headings = ["", "median s", "p20 to p80", "tokens/s", "against ours", "against floor", "MiB"]
    joules, replayed = results["joules"], results.get("replayed_seconds", {})
    headings += [*(["joules"] if joules else []), *(["replayed ms"] if replayed else [])]
    for column in headings:
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in samples.items():
        quantiles = harness.summary(seconds)
        cells = [
            f"{quantiles['p50']:.3f}",
            f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
            f"{tokens / quantiles['p50']:,.0f}",
            f"{quantiles['p50'] / reference:.2f}",
            f"{quantiles['p50'] / least:.2f}",
            f"{results['peak_bytes'][name] / 2**20:,.0f}",
        ]
        if joules:
            cells.append(f"{joules[name]:.2f}")
        if name in replayed:
            cells.append(f"{1e3 * harness.median(replayed[name]):.2f}")
        table.add_row(name, *cells)
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in floor.items())
    table.add_row(f"floor ({parts})", f"{least:.3f}", "", "", f"{least / reference:.2f}", "1.00")
    for balance, peer in results["best_peers"].items():
        seconds, relative = reference * peer["relative"], f"{peer['relative']:.2f}"
        cells = [f"{seconds:.3f}", "", "", relative, f"{seconds / least:.2f}"]
        table.add_row(f"best peer, {balance}: {peer['name']}", *cells)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.step", description=__doc__)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="data folder (default: the demo corpus)")
    add("--init", type=Path, help="model folder (default: a small BERT, random)")
    add(
        "--encoder",
        choices=random_encoder.SHAPES,
        help="random weights of this shape instead of those of --init, whose vocabulary it takes",
    )
    add("--batch-size", type=harness.whole(1), default=32, help="examples a task")
    add("--rounds", type=harness.whole(2), default=5)
    add("--warmup-seconds", type=harness.whole(1, 3600), default=600, help="most of a contestant")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add(
        "--only",
        type=harness.pattern,
        default=".",
        metavar="PATTERN",
        help="only contestants whose names match",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--growth", action="store_true", help="tasks, shapes and examples instead of peers"
    )
    instead.add_argument(
        "--masked-lm",
        type=harness.whole(512),
        metavar="TOKENS",
        help="steps of masked language modelling of so many tokens instead, such as 4096",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
