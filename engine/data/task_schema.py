"""The schema of a task's data: names, columns and the range of a label."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ..utils.errors import InputError
from .dialect import ARCHIVES, AUTO, BUILT_IN, COMPRESSIONS, LAYOUTS, Dialect, Layout, endings

SPLITS: Mapping[str, str] = MappingProxyType(
    {"train": "train", "dev": "dev", "test": "test-student"}
)
"""The name of each split, and how it is called in the file names."""

_TRUTH = MappingProxyType({"false": "0", "true": "1"})
"""Labels as JSON spells them, where classes have no names."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSchema:
    """The data of one task: rows with an id, one or two sentences and a label."""

    task: str
    """The task's name in recipes, metrics and on the command line."""

    stem: str = ""
    """How the file names begin: the train split is ``{stem}-train.csv``."""

    layout: Layout | None = None
    """How the files are laid out, whatever their ending says; None where it says."""

    dialect: Dialect = BUILT_IN
    """How they are written otherwise."""

    id: str = ""
    """The column of the id; empty: rows are numbered from 0."""

    sentences: tuple[str, ...]
    """The columns of the one sentence or the two sentences of an example."""

    label: str
    """The column of the label; files of the test split do not have it."""

    kind: str
    """``classes``: 0, 1, … ``high``; ``binary``: 0 or 1; ``score``: any number in the range; or
    another kind of head (engine/models/heads)."""

    low: float = 0
    """The smallest label."""

    high: float
    """The largest label."""

    classes: tuple[str, ...] = ()
    """The names of the classes, where labels are spelled by name."""

    whole: bool | None = None
    """Whether labels are whole numbers, as those of classes; None: as ``kind`` says."""

    def __post_init__(self) -> None:
        if self.whole is None:
            object.__setattr__(self, "whole", self.kind != "score")

    @property
    def unchangeable(self) -> "TaskSchema":
        """The same where no recipe can be changed any more, so that no message advises it."""
        return replace(self, dialect=replace(self.dialect, table=""))

    def file(self, folder: Path, split: str) -> Path:
        """Return the path of a split's file in ``folder``; ``split`` is a key of SPLITS."""
        return folder / f"{self.stem}-{SPLITS[split]}.csv"

    def layout_of(self, path: Path) -> Layout:
        """Return the layout of a file of this task.

        Raises:
            InputError: its ending is that of an archive, or is not known and the recipe gives no
                delimiter.
        """
        ending = endings(path)[0]
        if ending in ARCHIVES:
            raise InputError(f"{path}: an archive; unpack it, or save its table as .csv")
        layout = self.layout or LAYOUTS.get(ending)
        if layout is None and self.dialect.delimiter != AUTO:
            return "commas"
        if layout is None:
            known = f"{', '.join(LAYOUTS)}, compressed ({', '.join(COMPRESSIONS)}) or not"
            advice = self.dialect.advice("delimiter", f"give a file in {known}")
            raise InputError(f"{path}: unknown ending; {advice}")
        return layout

    def columns(self, *, labelled: bool) -> tuple[str, ...]:
        """Return the columns to read: the id if there is one, the sentences, the label."""
        last = (self.label,) if labelled else ()
        return (*((self.id,) if self.id else ()), *self.sentences, *last)

    def parse_label(self, text: str) -> float:
        """Return the label that ``text`` spells.

        Raises:
            ValueError: it spells none; the message says why, in words fit for counting.
        """
        if self.classes:
            if text.strip() not in self.classes:
                raise ValueError("label is not among the classes")
            return float(self.classes.index(text.strip()))
        text = _TRUTH.get(text.strip(), text)
        if not _NUMBER.fullmatch(text.strip()):
            raise ValueError("label is not a number")
        value = float(text)
        if not self.low <= value <= self.high:
            raise ValueError(f"label is outside {self.low:g} to {self.high:g}")
        if self.whole and not value.is_integer():
            raise ValueError("label is not a whole number")
        return value

    def spell_label(self, value: float) -> str:
        """Return the text of a label or prediction: a class's name or number, or a score."""
        if not self.whole:
            return f"{value:.4f}"
        return self.classes[int(value)] if self.classes else f"{value:.0f}"


def _table(*formats: TaskSchema) -> Mapping[str, TaskSchema]:
    return MappingProxyType({format_.task: format_ for format_ in formats})


_PAIR = ("sentence1", "sentence2")

FORMATS = _table(
    TaskSchema(
        task="sst",
        stem="ids-sst",
        layout="tabs",
        id="id",
        sentences=("sentence",),
        label="sentiment",
        kind="classes",
        high=4,
    ),
    TaskSchema(
        task="quora",
        stem="quora",
        layout="tabs",
        id="id",
        sentences=_PAIR,
        label="is_duplicate",
        kind="binary",
        high=1,
    ),
    TaskSchema(
        task="sts",
        stem="sts",
        layout="tabs",
        id="id",
        sentences=_PAIR,
        label="similarity",
        kind="score",
        high=5,
    ),
    TaskSchema(
        task="cfimdb",
        stem="ids-cfimdb",
        layout="tabs",
        id="id",
        sentences=("sentence",),
        label="sentiment",
        kind="binary",
        high=1,
    ),
)
"""The CS224N file set by task: tab-separated, with a header, whatever their ending says."""
