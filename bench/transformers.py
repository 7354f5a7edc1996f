"""``python -m bench.transformers``: time transformers encoders, accelerated and as people run them.

Forward and backward pass in training mode, and forward pass in inference mode, on real sentences or
on random tokens of like lengths, and on batches without padding (bench/transformers_cases.py).  The
loops: batches padded to their longest row; batches of examples sorted by length; compiled by
`torch.compile`; on a GPU, in bf16, one row of tokens through torch's varlen attention, which is
what patches that unpad a whole model do, and flash attention on padded and on packed batches.
Beside them the model after `kernels.accelerate`, with the same padded batches, and with packed ones
of its `PackingCollator`.  A sample is one pass over the same examples for every loop.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.runtime.precision import multiplies_bf16_fast
from engine.utils.errors import InputError

from . import harness
from .batching import register_varlen_attention, sorted_parts
from .transformers_cases import (
    CASES,
    Batch,
    Case,
    Tokens,
    examples,
    packed,
    padded,
    with_positions,
)

_MODELS = ("bert", "roberta", "mpnet", "modernbert")
_SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
    "vocab_size": 30_522,
}
_PADDED = "transformers, padded"
# Their positions are counted from the one behind the padding's.
_COUNT_FROM_PADDING = ("roberta", "mpnet")
# No other attention can be set; transformers warns, and goes on with the model's own, which takes
# one row of tokens for one sequence.
_ONE_ATTENTION = ("mpnet",)


_DURATION = """All of it takes an estimated 35 minutes in fp32 on two cores without AVX-512, with
--batches 1 --rounds 3 --no-compile; hours with --batches 2 --rounds 5, and many more where each
case is compiled.  --only, --compile and --minutes bound it."""


# ---- loops --------------------------------------------------------------------------------------


def _model(init: Path | None, kind: str) -> Any:
    """Return an encoder: the folder's, or one of its shape with random weights."""
    from transformers import AutoConfig, AutoModel

    sizes = dict(_SIZES)
    if init is not None:
        own = AutoConfig.from_pretrained(init)
        if own.model_type == kind:
            return AutoModel.from_pretrained(init, add_pooling_layer=False)
        sizes = {name: getattr(own, name) for name in sizes}
        sizes["max_position_embeddings"] += 2
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, pad_token_id=1 if kind != "bert" else 0)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    arguments = {} if kind == "modernbert" else {"add_pooling_layer": False}
    return AutoModel.from_config(config, **arguments)


def _train(run: Callable[..., Any], model: nn.Module, batches: list[Batch], autocast: bool) -> None:
    """Do a forward and a backward pass on each batch; no gradients are left."""
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            hidden = run(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        squares = hidden.float().square()
        (squares if mask is None else squares * mask[..., None]).mean().backward()
        model.zero_grad(set_to_none=True)


@torch.inference_mode()
def _infer(run: Callable[..., Any], batches: list[Batch], autocast: bool) -> None:
    """Do a forward pass on each batch."""
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            run(**batch)


class Loop:
    """A model with the batches that it is given; called, it does one pass over them.

    Args:
        model: taken as it is.
        batches: its arguments.
        case: says what is done with them.
        autocast: compute in bf16 under torch's autocast.
        compiled: run the model through ``torch.compile``, for any size where the case's differ.
    """

    def __init__(
        self, model: Any, batches: list[Batch], case: Case, *, autocast: bool, compiled: bool
    ) -> None:
        self.model, self.batches, self.compiled = model.train(case.trains), batches, compiled
        dynamic = True if case.texts else None
        run = torch.compile(model, dynamic=dynamic) if compiled else model
        self._pass = (
            functools.partial(_train, run, model, batches, autocast)
            if case.trains
            else functools.partial(_infer, run, batches, autocast)
        )

    def __call__(self) -> None:
        """Run the model on every batch."""
        self._pass()


def loops(
    model: Any,
    case: Case,
    batches: list[list[Tokens]],
    device: torch.device,
    *,
    autocast: bool,
    compiled: bool,
) -> dict[str, Callable[[], Loop]]:
    """Return what makes the loops, by name.

    Args:
        model: a plain encoder of transformers, of which each loop gets a copy.
        case: what the loops do.
        batches: the examples of each batch.
        device: where they run.
        autocast: compute in bf16.
        compiled: whether there are compiled ones.
    """
    kind, padding = model.config.model_type, model.config.pad_token_id

    def maker(
        batches: list[Batch],
        *,
        accelerated: bool = False,
        compiled: bool = False,
        attention: str = "",
    ) -> Callable[[], Loop]:
        def make() -> Loop:
            own = copy.deepcopy(model).to(device)
            if attention:
                own.set_attn_implementation(attention)
            if accelerated:
                kernels.accelerate(own)
            return Loop(own, batches, case, autocast=autocast, compiled=compiled)

        return make

    def pad(batches: list[list[Tokens]]) -> list[Batch]:
        return [padded(own, padding, device, with_mask=case.with_mask) for own in batches]

    rows, stream = pad(batches), [packed(own, device) for own in batches]
    makers = {_PADDED: maker(rows), "accelerated, padded": maker(rows, accelerated=True)}
    if case.texts:
        makers["accelerated, packed"] = maker(stream, accelerated=True)
    if case.texts and len(batches) > 1:
        every = list(itertools.chain(*batches))
        parts = [[every[index] for index in part] for part in sorted_parts(every, len(batches))]
        makers["transformers, sorted"] = maker(pad(parts))
    if compiled:
        makers["transformers, compiled"] = maker(rows, compiled=True)
        makers["accelerated, compiled"] = maker(stream, accelerated=True, compiled=True)
    if device.type == "cuda" and autocast and kind not in _ONE_ATTENTION:
        first = padding + 1 if kind in _COUNT_FROM_PADDING else 0
        one_row = [with_positions(batch, first) for batch in stream]
        makers["transformers, unpadded"] = maker(one_row, attention=register_varlen_attention())
        if importlib.util.find_spec("flash_attn"):
            flash = "flash_attention_2"
            makers["transformers, flash"] = maker(rows, attention=flash)
            makers["transformers, flash, packed"] = maker(one_row, attention=flash)
    return makers


# ---- the benchmark ------------------------------------------------------------------------------


def _warmed_up(make: Callable[[], Loop], device: torch.device) -> tuple[Loop, int]:
    """Make a loop and run it until nothing is compiled or set up any more.

    Returns:
        The loop, and the most bytes that it held at one time, beyond its weights and batches.
    """
    loop = make()
    if loop.compiled or device.type == "cuda":
        loop()
    return loop, harness.peak_memory(loop, device)


def measure(
    options: argparse.Namespace, kind: str, case: Case, precision: str, failures: dict[str, str]
) -> dict[str, Any]:
    """Time the loops of one model on one case; those that fail are named in ``failures``."""
    torch._dynamo.reset()  # compilations of one case don't count against another's limit
    device, name = torch.device(options.device), title(kind, case, precision)
    batches = examples(case, options.batches, options.data, options.init)
    makers = loops(
        *(_model(options.init, kind), case, batches, device),
        autocast=precision == "bf16",
        compiled=re.search(options.compile, name) is not None,
    )
    runs: dict[str, Loop] = {}
    peaks: dict[str, int] = {}
    for loop, make in makers.items():
        try:
            with harness.at_most(options.warmup_seconds):
                runs[loop], peaks[loop] = _warmed_up(make, device)
        except Exception as error:  # a peer may fail in any way; the others go on
            failures[f"{name}, {loop}"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
    if not runs:
        raise RuntimeError("no loop is left")
    return {
        "model": kind,
        "case": case.name,
        "mode": case.mode,
        "precision": precision,
        "tokens": [sum(map(len, own)) for own in batches],
        "places": [len(own) * max(map(len, own)) for own in batches],
        "peak_bytes": peaks,
        "seconds": harness.interleave(runs, device, rounds=options.rounds, warmup=0),
    }


def title(kind: str, case: Case, precision: str) -> str:
    """Return what ``--only`` looks at."""
    return f"{kind}, {case.name}, {case.mode}, {precision}"


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Case, str]]:
    """Return the models, cases and precisions that the options leave."""
    fast = multiplies_bf16_fast(torch.device(options.device))
    precisions = options.precisions or (["fp32", "bf16"] if fast else ["fp32"])
    for case, kind, precision in itertools.product(CASES, options.models, precisions):
        if case.name in options.cases and re.search(options.only, title(kind, case, precision)):
            yield kind, case, precision


def main() -> None:
    """Run the benchmark and print a table for each case."""
    options = harness.parse(_parser())
    if options.data is not None and options.init is None:
        raise InputError("--data: needs --init, the model folder whose tokenizer reads it")
    device, console = torch.device(options.device), Console(width=120)
    runs = list(chosen(options))
    if not runs:
        raise InputError("--only: nothing is so named; --list shows all names")
    if options.list:
        console.print("\n".join(title(*run) for run in runs), highlight=False)
        return
    if device.type == "cpu":
        kernels.keep_freed_memory()  # as engine.train does; it serves all loops
    results: dict[str, Any] = {"cases": [], "failures": {}, "left_out": []}
    start = time.monotonic()
    save = harness.Record(options, "transformers", device).write
    for run in runs:
        if time.monotonic() - start > 60 * options.minutes:
            results["left_out"].append(title(*run))
            continue
        try:
            measured = measure(options, *run, results["failures"])
        except Exception as error:  # a model may be refused; the others go on
            results["failures"][title(*run)] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            continue
        results["cases"].append(measured)
        save(results)
        console.print(_table(measured, title(*run)))
    save(results)
    for name in results["left_out"]:
        console.print(f"{name}: left out after {options.minutes} minutes", soft_wrap=True)
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text[:300]}", soft_wrap=True)
    if results["failures"]:
        raise SystemExit(1)


def _table(measured: dict[str, Any], name: str) -> Table:
    full = sum(measured["tokens"]) / sum(measured["places"])
    table = Table(title=f"{name}: {len(measured['tokens'])} batches, {full:.0%} full")
    for column in ("", "seconds", "p20 to p80", "times as fast", "MiB", "memory"):
        table.add_column(column, justify="right" if column else "left")
    seconds, peaks = measured["seconds"], measured["peak_bytes"]
    for name, samples in seconds.items():
        quantiles = harness.summary(samples)
        is_measured = _PADDED in seconds
        table.add_row(
            name,
            f"{quantiles['p50']:.3f}",
            f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
            f"{harness.median(seconds[_PADDED]) / quantiles['p50']:.2f}" if is_measured else "",
            f"{peaks[name] / 2**20:,.0f}",
            f"{peaks[name] / peaks[_PADDED]:.2f}" if is_measured else "",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.transformers", description=__doc__, epilog=_DURATION)
    add = parser.add_argument
    names = list(dict.fromkeys(case.name for case in CASES))
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="data folder (default: random tokens of like lengths)")
    add("--init", type=Path, help="model folder: weights, tokenizer, shape of the other models")
    add("--models", nargs="+", choices=_MODELS, default=_MODELS, metavar="MODEL")
    add("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), metavar="PRECISION")
    add(
        "--only",
        type=harness.pattern,
        default=".",
        metavar="PATTERN",
        help="only what is so named: model, case, training or inference, precision",
    )
    add("--list", action="store_true", help="show these names and measure nothing")
    add(
        "--batches",
        type=harness.whole(1),
        default=2,
        help="of a sample, 2 unless given; of 50 with 32 SST sentences and 32 Quora pairs each, 40 "
        "are 37 to 49 %% full; with one, no loop sorts",
    )
    add("--rounds", type=harness.whole(2), default=5)
    add(
        "--minutes",
        type=harness.whole(1, 1440),
        default=1440,
        help="nothing else is begun later; what was begun takes a minute or two more",
    )
    add(
        "--warmup-seconds",
        type=harness.whole(1, 3600),
        default=600,
        help="most that a loop may take until it is warm",
    )
    add(
        "--compile",
        type=harness.pattern,
        default=".",
        metavar="PATTERN",
        help="compiled loops only in what is so named",
    )
    add(
        "--no-compile",
        dest="compile",
        action="store_const",
        const="(?!)",
        help="no compiled loops",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
