"""Cases of ``bench.transformers``: what goes through a model, padded and packed.

Batches of texts, of real data or of random tokens of like lengths, and batches in which every row
has as many tokens as the others, so that nothing can be gained by leaving padding out.
"""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.utils.errors import InputError

from .batching import pad

Batch = dict[str, Any]
"""Arguments of a model."""
Tokens = Sequence[int]
"""An example's token ids."""


@dataclass(frozen=True)
class Case:
    """What goes through a model, and whether it learns from it.

    Attributes:
        name: of the batches.
        trains: forward and backward pass in training mode; else forward pass in inference mode.
        texts: kinds of text in a batch; none where nothing is padded.
        full: share of a batch's places that tokens take: of 50 batches those nearest to it are
            taken, instead of the first.
        shape: rows, and tokens of each, where nothing is padded.
        with_mask: whether a padded batch has an attention mask.
    """

    name: str
    trains: bool
    texts: tuple[str, ...] = ()
    full: float | None = None
    shape: tuple[int, int] = (0, 0)
    with_mask: bool = True

    @property
    def mode(self) -> str:
        """What is done with the model."""
        return "training" if self.trains else "inference"


_TEXTS = (("sst", "quora"), ("sts",), ("cfimdb",))
_SHAPES = ((1, 8), (1, 32), (4, 16), (64, 16), (32, 64), (8, 512))
_FULL = 0.32  # of 50 batches of SST and Quora five are emptier
# The short ones first: a run may be cut off.
CASES = [
    case
    for trains in (False, True)
    for case in (
        *(Case(" and ".join(texts), trains, texts) for texts in _TEXTS),
        Case(f"sst and quora, {_FULL:.0%} full", trains, _TEXTS[0], _FULL),
        *(Case(f"{n} x {length}", trains, shape=(n, length)) for n, length in _SHAPES),
        *(
            Case(f"{n} x {length} without mask", trains, shape=(n, length), with_mask=False)
            for n, length in _SHAPES
        ),
    )
]

# Of each kind of text: its file, its columns, and examples in a batch.
_FILES = {
    "sst": ("ids-sst-train.csv", ("sentence",), 32),
    "quora": ("quora-train.csv", ("sentence1", "sentence2"), 32),
    "sts": ("sts-train.csv", ("sentence1", "sentence2"), 64),
    "cfimdb": ("ids-cfimdb-train.csv", ("sentence",), 8),
}
_DRAWN = 50  # batches, where some are taken for their padding
# Mean and deviation of the lengths in tokens, where there is no data.
_LENGTHS = {"sst": (24, 11), "quora": (30, 11), "sts": (29, 12), "cfimdb": (235, 140)}
_SHORTEST, _LONGEST = 4, 512
_RANDOM_IDS = (1000, 30_000)  # of words, and not of special tokens


def examples(case: Case, batches: int, data: Path | None, init: Path | None) -> list[list[Tokens]]:
    """Return the examples of each batch.

    Args:
        case: which.
        batches: how many.
        data: folder of the texts' files; None for random tokens.
        init: model folder with the tokenizer that reads them.

    Raises:
        InputError: a file cannot be read.
    """
    if not case.texts:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(*_RANDOM_IDS, (batches, *case.shape), generator=generator)
        return list(ids.tolist())
    count = batches if case.full is None else max(batches, _DRAWN)
    drawn = {
        text: _drawn(text, _FILES[text][2] * count, data, init) if data else _random(text, count)
        for text in case.texts
    }
    found = [
        [tokens for own in drawn.values() for tokens in own[turn::count]] for turn in range(count)
    ]
    if case.full is not None:
        wanted = case.full
        found.sort(key=lambda own: abs(share_of_tokens([own]) - wanted))
    return found[:batches]


def share_of_tokens(batches: Sequence[Sequence[Tokens]]) -> float:
    """Return how much of padded batches is tokens."""
    places = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return sum(len(tokens) for batch in batches for tokens in batch) / places


def _random(text: str, batches: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    mean, deviation = _LENGTHS[text]
    lengths = mean + deviation * torch.randn(_FILES[text][2] * batches, generator=generator)
    return [
        torch.randint(*_RANDOM_IDS, (length,), generator=generator).tolist()
        for length in lengths.round().int().clamp(_SHORTEST, _LONGEST).tolist()
    ]


@functools.cache
def _drawn(text: str, count: int, data: Path, init: Path) -> list[Tokens]:
    from transformers import AutoTokenizer

    file, columns, _ = _FILES[text]
    tokenizer = AutoTokenizer.from_pretrained(init)
    try:
        with (data / file).open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t"))
    except OSError as error:
        raise InputError(f"{data / file}: {error.strerror}") from error
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    texts = [[rows[i][column] or "" for column in columns] for i in chosen]
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=_LONGEST)
    return list(encoded["input_ids"])


def padded(
    batch: Sequence[Tokens], padding: int, device: torch.device, *, with_mask: bool = True
) -> Batch:
    """Return ``input_ids [B, S]``, padded to the longest row, and ``attention_mask``."""
    ids, mask = pad([torch.tensor(tokens, device=device) for tokens in batch], padding)
    return {"input_ids": ids, "attention_mask": mask} if with_mask else {"input_ids": ids}


def packed(batch: Sequence[Tokens], device: torch.device) -> Batch:
    """Return one row of all tokens, as `PackingCollator` makes it."""
    collated = kernels.PackingCollator()([{"input_ids": list(tokens)} for tokens in batch])
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in collated.items()}


def with_positions(batch: Batch, first: int) -> Batch:
    """Add ``position_ids [1, T]`` to a packed batch, from ``first`` on in each sequence.

    Transformers' own models need them; an accelerated one counts by itself.
    """
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    positions = torch.cat([torch.arange(first, first + length) for length in lengths])
    return {**batch, "position_ids": positions[None].to(batch["input_ids"].device)}
