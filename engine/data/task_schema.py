"""The schema of a task's data: names, columns and the range of a label."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_json
from .addresses import Place
from .dialect import ARCHIVES, AUTO, BUILT_IN, COMPRESSIONS, LAYOUTS, Dialect, Layout, endings
from .squad import Span, spans_of
from .tags import OUTSIDE, Scheme, check_tags

SPLITS: Mapping[str, str] = MappingProxyType(
    {"train": "train", "dev": "dev", "test": "test-student"}
)
"""The name of each split, and how it is called in the file names."""

_TRUTH = MappingProxyType({"false": "0", "true": "1"})
"""Labels as JSON spells them, where classes have no names."""

_CONLL = ("conll", "conllu")

_UNSEEN = "_"
"""Stands for the tag of a word that was cut off."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSchema:
    """The data of one task: rows with an id, one or two sentences and a label."""

    task: str
    """The task's name in recipes, metrics and on the command line."""

    stem: str = ""
    """How the file names begin: the train split is ``{stem}-train.csv``."""

    ending: str = "csv"
    """How they end."""

    layout: Layout | None = None
    """How the files are laid out, whatever their ending says; None where it says."""

    dialect: Dialect = BUILT_IN
    """How they are written otherwise."""

    id: str = ""
    """The column of the id; empty: rows are numbered from 0."""

    sentences: tuple[str, ...]
    """The columns of the sentences of an example: one, the two of a pair, or of retrieval an
    anchor, a passage that answers it and any number that do not."""

    label: str
    """The column of the label, empty without one; files of the test split do not have it."""

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

    labels: Literal["one", "several", "words", "spans", "none"] = "one"
    """An example has one label, any number of ``classes``, a tag for each of its words, spans of
    its second sentence, or none: a passage that answers its anchor, as if by a column of ones."""

    label_columns: tuple[str, ...] = ()
    """With several labels, the columns of 0 and 1, one for each; empty: ``label`` lists them."""

    separator: str = ","
    """Between the labels of a text cell; in JSON and Parquet they are lists."""

    scheme: Scheme = "none"
    """By which tags mark entities."""

    unanswerable: bool = False
    """With spans: whether a question may have no answer in its context."""

    window_overlap: int = 128
    """With spans: tokens that two windows of a context share that is too long for a sequence."""

    max_answer_tokens: int = 30
    """With spans: the most tokens of an answer that is predicted."""

    def __post_init__(self) -> None:
        if self.whole is None:
            object.__setattr__(self, "whole", self.kind not in ("score", "retrieval"))

    @property
    def unchangeable(self) -> "TaskSchema":
        """The same where no recipe can be changed any more, so that no message advises it."""
        return replace(self, dialect=replace(self.dialect, table=""))

    def file(self, folder: Path, split: str) -> Path:
        """Return the path of a split's file in ``folder``; ``split`` is a key of SPLITS."""
        return folder / f"{self.stem}-{SPLITS[split]}.{self.ending}"

    def layout_of(self, path: Place) -> Layout:
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
            endings_ = [
                e for e, of in LAYOUTS.items() if self.labels == "words" or of not in _CONLL
            ]
            known = f"{', '.join(endings_)}, compressed ({', '.join(COMPRESSIONS)}) or not"
            advice = self.dialect.advice("delimiter", f"give a file in {known}")
            raise InputError(f"{path}: unknown ending; {advice}")
        return layout

    def columns(self, *, labelled: bool) -> tuple[str, ...]:
        """Return the columns to read: the id if there is one, the sentences, the label."""
        has_label = labelled and self.labels != "none"
        last = (self.label_columns or (self.label,)) if has_label else ()
        return (*((self.id,) if self.id else ()), *self.sentences, *last)

    @property
    def list_columns(self) -> tuple[str, ...]:
        """The columns whose cells may be lists, which a :class:`~.rows.Row` has as JSON."""
        if self.labels == "words":
            return (*self.sentences, self.label)
        return (self.label,) if self.labels == "several" else ()

    @property
    def object_columns(self) -> tuple[str, ...]:
        """The columns whose cells are objects, which a :class:`~.rows.Row` has as JSON."""
        return (self.label,) if self.labels == "spans" else ()

    def words(self, cell: str) -> list[str]:
        """Return the words of a text whose words are tagged: a list, or separated by blanks.

        Raises:
            ValueError: there are none, or one is empty.
        """
        words = _listed(cell, None)
        if not words:
            raise ValueError("no words")
        if not all(word.strip() for word in words):
            raise ValueError("an empty word")
        return words

    def parse_labels(self, cells: Sequence[str], words: int = 1) -> list[float]:
        """Return the labels of an example: one, 0 or 1 for each class, or a tag for each word.

        Args:
            cells: of the label's column, or of the columns of several labels.
            words: how many there are to be tagged.

        Raises:
            ValueError: the cells spell none; the message says why, in words fit for counting,
                then after a colon where.
        """
        if self.labels == "one":
            return [self.parse_label(cells[0])]
        if self.labels == "none":
            return [1.0]
        if self.label_columns:
            return [_yes_or_no(cell) for cell in cells]
        if self.labels == "several":
            if not cells[0].strip():
                raise ValueError("empty label list: write [] for an example without a label")
            names = _listed(cells[0], self.separator)
            numbers = [int(self._class_number(name)) for name in names]
            return [float(number in numbers) for number in range(int(self.high) + 1)]
        tags = _listed(cells[0], None)
        if len(tags) != words:
            raise ValueError(f"tags and words differ in number: {len(tags)} and {words}")
        if self.scheme != "none":
            # Unknown ones are said to be so, not to lack a beginning.
            for tag in tags:
                self._class_number(tag)
            tags = [*check_tags(tags, self.scheme)]
        return [self._class_number(tag) for tag in tags]

    def parse_spans(self, cell: str, context: str) -> list[Span]:
        """Return the answers of an example, as spans of its context: :func:`~.squad.spans_of`."""
        return spans_of(cell, context, unanswerable=self.unanswerable)

    def _class_number(self, name: str) -> float:
        try:
            return self.parse_label(name)
        except ValueError as error:
            raise ValueError(f"{error}: {name!r}") from None

    @property
    def outside(self) -> int:
        """The number of the tag O, what a word gets that the model does not see; -1 without it."""
        return self.classes.index(OUTSIDE) if OUTSIDE in self.classes else -1

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
        if value < 0:
            return _UNSEEN
        return self.classes[int(value)] if self.classes else f"{value:.0f}"

    def spell_labels(self, values: Sequence[float]) -> str:
        """Return the text of an example's labels, as :meth:`parse_labels` reads it.

        Args:
            values: the one label; 0 or 1 for each class; or the tag of each word, -1 for one that
                the model did not see (an underscore).
        """
        if self.labels in ("one", "none"):
            return self.spell_label(values[0])
        separator = self.separator if self.labels == "several" else " "
        numbers = [*values]
        if self.labels == "several":
            numbers = [number for number, value in enumerate(values) if value]
        names = [self.spell_label(number) for number in numbers]
        if not names or any(separator in name or name.startswith("[") for name in names):
            return dump_json(names)
        return separator.join(names)


def _listed(cell: str, separator: str | None) -> list[str]:
    """Return the items of a JSON list, or of a text that is divided by a separator (or blanks).

    Raises:
        ValueError: an item is neither text nor a number.
    """
    if cell.lstrip().startswith("["):
        try:
            items = parse_json(cell)
        except ValueError:
            items = None  # a text that begins with a bracket
        if isinstance(items, list):
            for item in items:
                if isinstance(item, bool) or not isinstance(item, str | int | float):
                    raise ValueError(f"a list with neither text nor numbers: {item!r}")
            return [str(item) for item in items]
    return cell.split() if separator is None else [part.strip() for part in cell.split(separator)]


def _yes_or_no(cell: str) -> float:
    value = _TRUTH.get(cell.strip().lower(), cell.strip())
    if not _NUMBER.fullmatch(value) or float(value) not in (0, 1):
        raise ValueError("label is neither 0 nor 1")
    return float(value)


def _table(*formats: TaskSchema) -> Mapping[str, TaskSchema]:
    return MappingProxyType({format_.task: format_ for format_ in formats})


_PAIR = ("sentence1", "sentence2")

SLOTS = ("O", *(f"{prefix}-{slot}" for slot in ("WHO", "WHAT", "WHERE") for prefix in "BI"))
"""Tags of the task ``slots``."""

ASPECTS = ("praise", "blame", "strong", "people", "story", "picture")
"""Labels of the task ``aspects``: what a review says of a film, and of which side of it."""

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
    TaskSchema(
        task="slots",
        stem="slots",
        ending="conll",
        sentences=("1",),
        label="2",
        kind="tags",
        high=len(SLOTS) - 1,
        classes=SLOTS,
        labels="words",
        scheme="BIO",
    ),
    TaskSchema(
        task="aspects",
        stem="aspects",
        ending="jsonl",
        id="id",
        sentences=("review",),
        label="aspects",
        kind="multi_label",
        high=len(ASPECTS) - 1,
        classes=ASPECTS,
        labels="several",
    ),
    TaskSchema(
        task="replies",
        stem="replies",
        ending="jsonl",
        id="id",
        sentences=("question", "reply"),
        label="",
        kind="retrieval",
        low=-1,
        high=1,
        labels="none",
    ),
    TaskSchema(
        task="spans",
        stem="spans",
        ending="json",
        id="id",
        sentences=("question", "context"),
        label="answers",
        kind="question_answering",
        high=1,
        labels="spans",
        unanswerable=True,
    ),
)
"""Built-in tasks.  The first four are the CS224N file set: tab-separated, with a header, whatever
their ending says; the others are of the demo corpus alone (engine/data/demo.py)."""
