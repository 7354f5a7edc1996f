"""``python -m bench.transformers``: time transformers encoders, accelerated and as people run them.

Forward and backward pass in training mode, on real sentences or on made-up ones of like lengths.
The loops: batches padded to their longest row; batches of examples sorted by length; compiled by
`torch.compile`; on a GPU with flash attention, and one row of tokens through torch's varlen
attention, which is what patches that unpad a whole model do.  Beside them the model after
`kernels.accelerate`, with the same padded batches, and with packed ones of its `PackingCollator`.
A sample is one pass over the same examples for every loop.
"""

import argparse
import copy
import csv
import functools
import importlib.util
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.runtime.cpu import keep_freed_memory
from engine.runtime.precision import multiplies_bf16_fast
from engine.utils.errors import InputError

from . import harness
from .baselines import register_varlen_attention

Batch = dict[str, Any]
Tokens = Sequence[int]

_MODELS = ("bert", "roberta", "mpnet", "modernbert")
_SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
    "vocab_size": 30_522,
}
_FIRST, _LAST, _PADDING = 101, 102, 0
# Of each kind of text: its file, its columns, and examples in a batch.
_TEXTS = {
    "sst": ("ids-sst-train.csv", ("sentence",), 32),
    "quora": ("quora-train.csv", ("sentence1", "sentence2"), 32),
    "sts": ("sts-train.csv", ("sentence1", "sentence2"), 64),
    "cfimdb": ("ids-cfimdb-train.csv", ("sentence",), 8),
}
_CASES = {"sst and quora": ("sst", "quora"), "sts": ("sts",), "cfimdb": ("cfimdb",)}
# Mean and deviation of the lengths in tokens, where there is no data.
_LENGTHS = {"sst": (24, 11), "quora": (30, 11), "sts": (29, 12), "cfimdb": (235, 140)}


# ---- batches ------------------------------------------------------------------------------------


def _examples(options: argparse.Namespace, kind: str, count: int) -> list[Tokens]:
    """Return the tokens of ``count`` examples: of the data, or random ones of like lengths."""
    generator = torch.Generator().manual_seed(0)
    if options.data is None:
        mean, deviation = _LENGTHS[kind]
        sizes = mean + deviation * torch.randn(count, generator=generator)
        return [
            torch.randint(1000, 30_000, (size,), generator=generator).tolist()
            for size in sizes.round().int().clamp(4, 512).tolist()
        ]
    from transformers import AutoTokenizer

    file, columns, _ = _TEXTS[kind]
    tokenizer = AutoTokenizer.from_pretrained(options.init)
    try:
        with (options.data / file).open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t"))
    except OSError as error:
        raise InputError(f"{options.data / file}: {error.strerror}") from error
    chosen = torch.randperm(len(rows), generator=generator)[:count].tolist()
    texts = [[rows[i][column] or "" for column in columns] for i in chosen]
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=512)
    return list(encoded["input_ids"])


def _padded(examples: Sequence[Tokens], device: torch.device) -> Batch:
    rows = [torch.tensor(tokens) for tokens in examples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PADDING)
    sizes = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < sizes[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def _packed(examples: Sequence[Tokens], device: torch.device) -> Batch:
    batch = kernels.PackingCollator()([{"input_ids": list(tokens)} for tokens in examples])
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def _positions(lengths: Tensor) -> Tensor:
    """Return ``[1, T]``, counted from 0 in each sequence."""
    return torch.cat([torch.arange(int(n), device=lengths.device) for n in lengths])[None]


def _batches(options: argparse.Namespace, case: str) -> list[list[Tokens]]:
    """Return the examples of each batch."""
    drawn = {
        kind: _examples(options, kind, _TEXTS[kind][2] * options.batches) for kind in _CASES[case]
    }
    return [
        [tokens for kind, own in drawn.items() for tokens in own[turn :: options.batches]]
        for turn in range(options.batches)
    ]


# ---- loops --------------------------------------------------------------------------------------


def _model(options: argparse.Namespace, kind: str) -> Any:
    """Return an encoder in training mode: the folder's, or of its shape with random weights."""
    from transformers import AutoConfig, AutoModel

    sizes = dict(_SIZES)
    if options.init is not None:
        own = AutoConfig.from_pretrained(options.init)
        if own.model_type == kind:
            return AutoModel.from_pretrained(options.init, add_pooling_layer=False).train()
        sizes = {name: getattr(own, name) for name in sizes}
        sizes["max_position_embeddings"] += 2
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, pad_token_id=1 if kind != "bert" else 0)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    arguments = {} if kind == "modernbert" else {"add_pooling_layer": False}
    return AutoModel.from_config(config, **arguments).train()


def _pass(run: Callable[..., Any], model: nn.Module, batches: list[Batch], autocast: bool) -> None:
    """Do a forward and a backward pass on each batch."""
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            hidden = run(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        squares = hidden.float().square()
        (squares if mask is None else squares * mask[..., None]).mean().backward()


def loops(
    options: argparse.Namespace, model: Any, examples: list[list[Tokens]], autocast: bool
) -> dict[str, Callable[[], harness.Contestant]]:
    """Return what makes the contestants, by name."""
    device = torch.device(options.device)
    flat = sorted((tokens for own in examples for tokens in own), key=len)
    size = len(examples[0])
    in_order = [flat[start : start + size] for start in range(0, len(flat), size)]

    def maker(
        batches: list[Batch],
        *,
        accelerated: bool = False,
        compiled: bool = False,
        attention: str = "",
    ) -> Callable[[], harness.Contestant]:
        def make() -> harness.Contestant:
            own = copy.deepcopy(model).to(device)
            if attention:
                own.set_attn_implementation(attention)
            if accelerated:
                kernels.accelerate(own)
            run = torch.compile(own, dynamic=True) if compiled else own
            return functools.partial(_pass, run, own, batches, autocast)

        return make

    padded = [_padded(own, device) for own in examples]
    packed = [_packed(own, device) for own in examples]
    makers = {
        "transformers, padded": maker(padded),
        "accelerated, padded": maker(padded, accelerated=True),
        "accelerated, packed": maker(packed, accelerated=True),
        "transformers, sorted": maker([_padded(own, device) for own in in_order]),
    }
    if options.compile:
        makers["transformers, compiled"] = maker(padded, compiled=True)
        makers["accelerated, compiled"] = maker(packed, accelerated=True, compiled=True)
    if device.type == "cuda" and autocast:
        if importlib.util.find_spec("flash_attn"):
            makers["transformers, flash"] = maker(padded, attention="flash_attention_2")
        one_row = [
            {
                "input_ids": batch["input_ids"],
                "position_ids": _positions(batch["cu_seq_lens_q"].diff()),
                "cu_seqlens": batch["cu_seq_lens_q"],
                "max_seqlen": batch["max_length_q"],
            }
            for batch in packed
        ]
        makers["transformers, unpadded"] = maker(one_row, attention=register_varlen_attention())
    return makers


# ---- the benchmark ------------------------------------------------------------------------------


def measure(
    options: argparse.Namespace, kind: str, case: str, precision: str, failures: dict[str, str]
) -> dict[str, Any]:
    """Time the loops of one model on one kind of batch."""
    torch._dynamo.reset()
    device = torch.device(options.device)
    examples = _batches(options, case)
    tokens = [sum(map(len, own)) for own in examples]
    places = [len(own) * max(map(len, own)) for own in examples]
    makers = loops(options, _model(options, kind), examples, precision == "bf16")
    failed: dict[str, str] = {}
    runs = harness.surviving(makers, failed)
    failures.update({f"{kind}, {case}, {precision}, {name}": text for name, text in failed.items()})
    return {
        "model": kind,
        "case": case,
        "precision": precision,
        "tokens": tokens,
        "places": places,
        "peak_bytes": {name: harness.peak_memory(run, device) for name, run in runs.items()},
        "seconds": harness.interleave(runs, device, rounds=options.rounds, warmup=1),
    }


def main() -> None:
    """Run the benchmark and print a table for each case."""
    options = harness.parse(_parser())
    if options.data is not None and options.init is None:
        raise InputError("--data: needs --init, the model folder whose tokenizer reads it")
    device, console = torch.device(options.device), Console(width=120)
    if device.type == "cpu":
        keep_freed_memory()  # as engine.train does; it serves all loops
    precisions = ["fp32", "bf16"] if multiplies_bf16_fast(device) else ["fp32"]
    results: dict[str, Any] = {"cases": [], "failures": {}}
    save = harness.Record(options, "transformers", device).write
    for kind in options.models:
        for case in options.cases:
            for precision in options.precisions or precisions:
                try:
                    measured = measure(options, kind, case, precision, results["failures"])
                except Exception as error:  # a model may be refused; the others go on
                    name = f"{kind}, {case}, {precision}"
                    results["failures"][name] = f"{type(error).__name__}: {error}"[:2000]
                    traceback.print_exc()
                    continue
                results["cases"].append(measured)
                save(results)
                console.print(_table(measured))
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text[:300]}", soft_wrap=True)
    if results["failures"]:
        raise SystemExit(1)


def _table(measured: dict[str, Any]) -> Table:
    full = sum(measured["tokens"]) / sum(measured["places"])
    table = Table(
        title=f"{measured['model']}, {measured['case']}, {measured['precision']}: "
        f"{len(measured['tokens'])} batches, {full:.0%} full"
    )
    for column in ("", "seconds", "p20 to p80", "times as fast", "MiB", "memory"):
        table.add_column(column, justify="right" if column else "left")
    seconds, peaks = measured["seconds"], measured["peak_bytes"]
    plain = "transformers, padded"
    for name, samples in seconds.items():
        quantiles = harness.summary(samples)
        table.add_row(
            name,
            f"{quantiles['p50']:.3f}",
            f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
            f"{harness.median(seconds[plain]) / quantiles['p50']:.2f}" if plain in seconds else "",
            f"{peaks[name] / 2**20:,.0f}",
            f"{peaks[name] / peaks[plain]:.2f}" if plain in peaks else "",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.transformers", description=__doc__)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="data folder (default: random tokens of like lengths)")
    add("--init", type=Path, help="model folder: weights, tokenizer, shape of the other models")
    add("--models", nargs="+", choices=_MODELS, default=_MODELS, metavar="MODEL")
    add("--cases", nargs="+", choices=list(_CASES), default=list(_CASES), metavar="CASE")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), metavar="PRECISION")
    add("--batches", type=harness.whole(1), default=2, help="batches of a sample")
    add("--rounds", type=harness.whole(2), default=5)
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser


if __name__ == "__main__":
    exit_with(main)
