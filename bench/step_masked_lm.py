"""Time steps of masked language modelling beside those of transformers' ``run_mlm.py``.

A step has a constant number of tokens, without padding, on both sides (``tokens_per_batch`` here).
Three cases:

    sentences      a text is a sequence; the script's ``--line_by_line``, padded to the longest of
                   the batch: the very sequences of this engine's batch
    blocks of 128  short texts are joined to sequences of up to so many tokens (``join``); in the
    blocks of 512  script all texts, with their [CLS] and [SEP], are one stream, cut into blocks

The script's step is that of Trainer: BertForMaskedLM with SDPA, masks of
DataCollatorForLanguageModeling, fused AdamW, gradients clipped to norm 1; under autocast where it
is bf16.  Batches are made and masked before on both sides, and a step's time is without that.
"""

import argparse
import functools
import itertools
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.data.masked_text import MaskedText
from engine.data.tokenizer import Tokenizer
from engine.runs.run import begin
from engine.runtime.precision import multiplies_bf16_fast
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.errors import InputError
from engine.utils.rng import permutation

from . import harness

_LR, _CLIP, _MASK_SHARE = 5e-5, 1.0, 0.15
_TEXT = "text"
_MOST_JOINED = 64
_OURS = "this engine"


class Case(NamedTuple):
    """How texts become sequences: each by itself, or joined to some of up to ``length`` tokens."""

    name: str
    length: int
    joined: bool


CASES = (
    Case("sentences", 512, joined=False),
    Case("blocks of 128", 128, joined=True),
    Case("blocks of 512", 512, joined=True),
)


class Prepared(NamedTuple):
    """A batch that a step takes.

    Attributes:
        inputs: arguments of the step.
        tokens: of it, without padding.
        masked: tokens whose loss is computed.
        places: of it, with padding.
    """

    inputs: Any
    tokens: int
    masked: int
    places: int


class Contestant:
    """A step and its batches.

    Args:
        step: takes the arguments of a batch.
        batches: its batches.
    """

    def __init__(self, step: Callable[[Any], object], batches: Sequence[Prepared]) -> None:
        self._step, self.batches, self.turn = step, batches, 0

    def __call__(self) -> None:
        """Train once, on the batch of the turn."""
        self._step(self.batches[self.turn % len(self.batches)].inputs)


def engine_trainer(options: argparse.Namespace, case: Case, precision: str) -> Trainer:
    """Put this engine together as ``engine.train`` does for a recipe that trains on text alone."""
    objective = f"objectives.{_TEXT}"
    settings = [f"precision={precision}", f"train=['{_TEXT}']", f"max_length={case.length}"]
    settings += [f"{objective}.kind=masked_lm", f"{objective}.divide=true", f"lr={_LR}"]
    settings += [f"{objective}.tokens_per_batch={options.masked_lm}", f"clip_norm={_CLIP}"]
    if case.joined:
        settings += [f"{objective}.join={_MOST_JOINED}", f"{objective}.short={case.length}"]
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return build_trainer(run, torch.device(options.device))


def engine_batches(trainer: Trainer, count: int) -> list[Prepared]:
    """Return the first batches of a run."""
    with trainer.loader(0) as loader:
        batches = [batch.to(trainer.device) for batch in itertools.islice(loader, count)]
    return [
        Prepared(
            batch,
            batch.num_tokens - batch.padding,
            int((batch.labels[0].positions >= 0).sum()),
            batch.num_tokens,
        )
        for batch in batches
    ]


def unmasked(batch: PackedBatch) -> list[list[int]]:
    """Return a batch's sequences without masks, ``[CLS] … [SEP]``, and without padding."""
    ids, (labels,) = batch.input_ids.clone(), batch.labels
    own = labels.positions >= 0
    ids[labels.positions[own]] = labels.targets[own]
    sequences = ids.split(batch.cu_seqlens.diff().tolist())[: batch.examples[0]]
    return [sequence.tolist() for sequence in sequences]


def blocks(examples: MaskedText, length: int) -> list[list[int]]:
    """Return all texts, ``[CLS] … [SEP]`` each, as one stream that is cut into blocks.

    As ``group_texts`` of ``run_mlm.py``, which drops the rest that fills no block.

    Args:
        examples: texts, each one a sequence.
        length: tokens of a block.
    """
    ends = [examples.tokenizer.cls_id], [examples.tokenizer.sep_id]
    texts = (examples.examples[number].first for number in range(len(examples)))
    stream = np.concatenate([part for text in texts for part in (ends[0], text, ends[1])])
    whole = len(stream) // length * length
    return [*map(np.ndarray.tolist, stream[:whole].reshape(-1, length))]


class Collator:
    """The script's collator: masks sequences and pads them to the longest.

    Args:
        tokenizer: the engine's.
        folder: a new one, through which transformers reads it.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        from transformers import AutoTokenizer, DataCollatorForLanguageModeling

        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        self._special = (tokenizer.cls_id, tokenizer.sep_id)
        self._collate = DataCollatorForLanguageModeling(
            AutoTokenizer.from_pretrained(folder), mlm_probability=_MASK_SHARE
        )

    def __call__(self, sequences: Sequence[Sequence[int]], device: torch.device) -> Prepared:
        """Return a batch of sequences."""
        batch = self._collate(
            [
                {
                    "input_ids": [*sequence],
                    "attention_mask": [1] * len(sequence),
                    "special_tokens_mask": [int(token in self._special) for token in sequence],
                }
                for sequence in sequences
            ]
        )
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        return Prepared(
            inputs,
            sum(map(len, sequences)),
            int((inputs["labels"] >= 0).sum()),
            inputs["input_ids"].numel(),
        )


class MaskedLmLoop:
    """The step of ``run_mlm.py``.

    Args:
        init: model folder, or None for random weights of ``config``.
        config: fields of ``config.json`` when there is no folder.
        autocast: compute in bf16 under torch's autocast.
        device: where to run.
        compiled: run the model through ``torch.compile``, as its ``--torch_compile``.
        accelerated: through :func:`kernels.accelerate`.
    """

    def __init__(
        self,
        init: Path | None,
        config: dict[str, Any],
        *,
        autocast: bool,
        device: torch.device,
        compiled: bool = False,
        accelerated: bool = False,
    ) -> None:
        from transformers import AutoConfig, AutoModelForMaskedLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        if init is not None:
            model = AutoModelForMaskedLM.from_pretrained(init)
        else:
            fields = dict(config)
            shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
            model = AutoModelForMaskedLM.from_config(shape)
        self.model: nn.Module = model.to(device).train()
        if accelerated:
            kernels.accelerate(self.model)
        self._run = torch.compile(self.model, dynamic=True) if compiled else self.model
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=_LR, weight_decay=0.0, fused=True
        )
        self._autocast, self._device = autocast, device

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Train once; return the loss."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss: Tensor = self._run(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def peer_batches(
    case: Case,
    ours: Sequence[Prepared],
    texts: MaskedText,
    collate: Collator,
    tokens: int,
    device: torch.device,
) -> list[Prepared]:
    """Return the script's batches: the engine's own sentences, or blocks of all texts.

    Raises:
        InputError: a step has more tokens than the texts, or fewer than a block.
    """
    if not case.joined:
        return [collate(unmasked(prepared.inputs), device) for prepared in ours]
    every, size = blocks(texts, case.length), tokens // case.length
    if not 0 < size <= len(every):
        raise InputError(
            f"--masked-lm {tokens}: a step of {case.name} has {size} of them, and the texts are "
            f"{len(every)}; give {case.length} to {case.length * len(every)} tokens"
        )
    order = permutation(len(every), "masked lm", case.name).tolist()
    endless = itertools.cycle(order)
    return [
        collate([every[place] for place in itertools.islice(endless, size)], device) for _ in ours
    ]


def contestants(
    options: argparse.Namespace, case: Case, texts: MaskedText, folder: Path
) -> dict[str, Callable[[], Contestant]]:
    """Return what makes the steps of a case, by name."""
    device = torch.device(options.device)
    precisions = ["bf16", "fp32"] if multiplies_bf16_fast(device) else ["fp32"]
    trainer = engine_trainer(options, case, precisions[0])
    ours = engine_batches(trainer, options.rounds)
    collate = Collator(trainer.run.tokenizer, folder)
    torch.manual_seed(0)  # of the collator's masks
    theirs = peer_batches(case, ours, texts, collate, options.masked_lm, device)
    config = trainer.model.encoder.config.to_huggingface()

    def engine(precision: str) -> Contestant:
        own = engine_trainer(options, case, precision)
        numbers = itertools.count()
        return Contestant(
            lambda batch: own.step(batch, next(numbers), _LR), engine_batches(own, options.rounds)
        )

    def loop(precision: str, way: str) -> Contestant:
        ways = {way: True} if way else {}
        autocast = precision == "bf16"
        step = MaskedLmLoop(options.init, config, autocast=autocast, device=device, **ways)
        return Contestant(step, theirs)

    makers = {f"{_OURS}, {each}": functools.partial(engine, each) for each in precisions}
    ways = ["", "accelerated", *(["compiled"] if options.compile else [])]
    for way, precision in itertools.product(ways, precisions):
        name = ", ".join(filter(None, ("transformers", precision, way)))
        makers[name] = functools.partial(loop, precision, way)
    return makers


def _warmed_up(make: Callable[[], Contestant], device: torch.device) -> tuple[Contestant, int]:
    """Make a contestant, and run it until nothing is compiled or recorded any more.

    Returns:
        The contestant, and the most bytes that it held at one time while it worked.
    """
    torch._dynamo.reset()  # compilations of one contestant don't count against another's limit
    run = make()

    def all_batches() -> None:
        for turn in range(2 * len(run.batches)):
            run.turn = turn
            run()

    if device.type == "cuda":
        return run, harness.peak_memory(all_batches, device)
    run()
    return run, harness.peak_memory(run, device)


def measure_case(
    options: argparse.Namespace,
    case: Case,
    texts: MaskedText,
    folder: Path,
    failures: dict[str, str],
) -> dict[str, Any]:
    """Time the steps of a case; those that fail are named in ``failures``."""
    device = torch.device(options.device)
    runs: dict[str, Contestant] = {}
    peaks: dict[str, int] = {}
    for name, make in contestants(options, case, texts, folder).items():
        if not re.search(options.only, name):
            continue
        try:
            with harness.at_most(options.warmup_seconds):
                runs[name], peaks[name] = _warmed_up(make, device)
        except Exception as error:  # a peer may fail in any way; the others go on
            failures[f"{case.name}, {name}"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
    if not runs:
        raise InputError("--only: no step is so named, or all failed")

    def select(turn: int) -> None:
        for run in runs.values():
            run.turn = turn

    seconds = harness.interleave(runs, device, rounds=options.rounds, warmup=1, setup=select)
    measured: dict[str, Any] = {"case": case.name, "seconds": seconds, "peak_bytes": peaks}
    for field in ("tokens", "masked", "places"):
        measured[field] = {
            name: [getattr(batch, field) for batch in run.batches] for name, run in runs.items()
        }
    return measured


def tokens_per_second(measured: dict[str, Any], name: str) -> list[float]:
    """Return the tokens a second, without padding, of each of a contestant's steps."""
    pairs = zip(measured["tokens"][name], measured["seconds"][name], strict=True)
    return [tokens / seconds for tokens, seconds in pairs]


def measure(
    options: argparse.Namespace, device: torch.device, console: Console, folder: Path
) -> None:
    """Run all cases, print a table of each, and keep the record.

    Args:
        options: of the command line.
        device: where to run.
        console: for the tables.
        folder: for the tokenizer.

    Raises:
        InputError: batches cannot be made, or ``--only`` leaves no step.
        SystemExit: a step failed.
    """
    alone = engine_trainer(options, CASES[0], "fp32")
    texts = alone.run.objective(_TEXT)
    assert isinstance(texts, MaskedText)
    cases = [case for case in CASES if not case.joined or case.length <= alone.run.max_length]
    results: dict[str, Any] = {
        "encoder": alone.model.encoder.config.to_huggingface(),
        "tokens_per_batch": options.masked_lm,
        "cases": [],
        "failures": {},
    }
    save = harness.Record(options, "step, masked lm", device).write
    for case in cases:
        console.print(f"{case.name} ...")
        measured = measure_case(options, case, texts, folder, results["failures"])
        results["cases"].append(measured)
        save(results)
        console.print(_table(measured))
    if options.json:
        console.print(f"wrote {options.json}")
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text[:300]}", soft_wrap=True)
    if results["failures"]:
        raise SystemExit(1)


def _table(measured: dict[str, Any]) -> Table:
    table = Table(title=f"masked language modelling, {measured['case']}")
    for column in ("", "seconds", "tokens/s", "p20 to p80", "against ours", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for column in ("full", "masked", "MiB"):
        table.add_column(column, justify="right")
    names = list(measured["seconds"])
    rates = {name: tokens_per_second(measured, name) for name in names}
    first = harness.median(rates[names[0]])
    for name, samples in rates.items():
        tokens, masked, places = (
            sum(measured[field][name]) for field in ("tokens", "masked", "places")
        )
        quantiles = harness.summary(samples)
        table.add_row(
            *(name, f"{harness.median(measured['seconds'][name]):.3f}"),
            *(f"{quantiles['p50']:,.0f}", f"{quantiles['p20']:,.0f} to {quantiles['p80']:,.0f}"),
            f"{first / quantiles['p50']:.2f}",
            f"{tokens / len(samples):,.0f}",
            *(f"{tokens / places:.0%}", f"{masked / tokens:.1%}"),
            f"{measured['peak_bytes'][name] / 2**20:,.0f}",
        )
    return table
