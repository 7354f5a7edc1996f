"""What the files of each task look like: names, columns and the range of a label."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

LabelKind = Literal["classes", "binary", "score"]

SPLITS: Mapping[str, str] = MappingProxyType(
    {"train": "train", "dev": "dev", "test": "test-student"}
)
"""The name of each split, and how it is called in the file names."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFormat:
    """The files of one task: tab-separated, with a header, whatever their ending says."""

    task: str
    """The task's name in recipes, metrics and on the command line."""

    stem: str
    """How the file names begin: the train split is ``{stem}-train.csv``."""

    sentences: tuple[str, ...]
    """The columns of the one sentence or the two sentences of an example."""

    label: str
    """The column of the label; files of the test split do not have it."""

    kind: LabelKind
    """``classes``: 0, 1, … ``high``; ``binary``: 0 or 1; ``score``: any number in the range."""

    high: int
    """The largest label; the smallest is 0."""

    def file(self, folder: Path, split: str) -> Path:
        """Return the path of a split's file in ``folder``; ``split`` is a key of SPLITS."""
        return folder / f"{self.stem}-{SPLITS[split]}.csv"

    def parse_label(self, text: str) -> float:
        """Return the label that ``text`` spells.

        Raises:
            ValueError: it spells none; the message says why, in words fit for counting.
        """
        if not _NUMBER.fullmatch(text.strip()):
            raise ValueError("label is not a number")
        value = float(text)
        if not 0 <= value <= self.high:
            raise ValueError(f"label is outside 0 to {self.high}")
        if self.kind != "score" and not value.is_integer():
            raise ValueError("label is not a whole number")
        return value


def _table(*formats: FileFormat) -> Mapping[str, FileFormat]:
    return MappingProxyType({format_.task: format_ for format_ in formats})


_PAIR = ("sentence1", "sentence2")

FORMATS = _table(
    FileFormat(
        task="sst",
        stem="ids-sst",
        sentences=("sentence",),
        label="sentiment",
        kind="classes",
        high=4,
    ),
    FileFormat(
        task="quora",
        stem="quora",
        sentences=_PAIR,
        label="is_duplicate",
        kind="binary",
        high=1,
    ),
    FileFormat(
        task="sts",
        stem="sts",
        sentences=_PAIR,
        label="similarity",
        kind="score",
        high=5,
    ),
    FileFormat(
        task="cfimdb",
        stem="ids-cfimdb",
        sentences=("sentence",),
        label="sentiment",
        kind="binary",
        high=1,
    ),
)
"""The CS224N file set by task."""
