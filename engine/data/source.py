"""Sources of a task's examples, as a recipe names them: files, or a data set."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ..utils.errors import InputError
from ..utils.field_types import (
    Count,
    FileName,
    GivenName,
    Name,
    OneOrSeveral,
    Positive,
    Real,
    Settings,
)
from .addresses import is_address
from .dialect import AUTO, DELIMITERS, LAYOUTS, Compression, Dialect, Layout, Quoting, endings
from .hub_stream import HubStream
from .origins import DataFile, DataFiles, HubSplit, Origin
from .shards import shards
from .split_source import Column, Delimiter, Encoding, Label, Split, SplitSource, Text
from .tags import Scheme, scheme_of
from .task_schema import TaskSchema

_COLUMN_NUMBER = re.compile(r"[1-9][0-9]{0,8}")

FURTHER_KINDS: set[str] = set()
"""Kinds of heads, beside those below, that a source may name: :func:`engine.models.heads.register`.
Their labels are classes where ``classes`` is given, else numbers within ``range``."""


def _known_kind(kind: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return kind if isinstance(kind, str) and kind in FURTHER_KINDS else check(kind)


Kind = Annotated[
    Literal[
        "classification",
        "regression",
        "pair_classification",
        "pair_regression",
        "multi_label_classification",
        "pair_multi_label_classification",
        "token_classification",
        "retrieval",
        "question_answering",
    ],
    WrapValidator(_known_kind),
]
_TAGS, _RETRIEVAL, _SPANS = "token_classification", "retrieval", "question_answering"
_OF_SPANS = ("unanswerable", "window_overlap", "max_answer_tokens")
_SHUFFLE_BUFFER = 10_000
_OF_FILES = ("layout", "delimiter", "quoting", "header", "encoding", "compression")
"""The fields that say how files are written."""


def _width(label: Label) -> int:
    """Return the number of columns of several labels; 0 of one that has them all."""
    return len(label) if isinstance(label, tuple) else 0


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _names_or_number(classes: Any) -> Any:
    """Refuse what is neither in one line, where pydantic has one for each of the two."""
    is_number = type(classes) is int and 2 <= classes < 1 << 31
    if is_number or (isinstance(classes, list | tuple) and all(type(c) is str for c in classes)):
        return classes
    raise ValueError("expected names, such as ['no', 'yes'], or how many there are, from 2 on")


class TaskSource(Settings):
    """The data of a task that is not built in: ``[tasks.NAME.source]`` of a recipe."""

    kind: Kind
    """What is predicted, from one sentence or from a pair: a class, a number, any number of
    classes (multi_label), or a tag for each word (token_classification); retrieval: which passage
    answers an anchor, such as a question; question_answering: a span of a context."""
    text: Text
    """The column of the sentence, or those of the pair.  token_classification: of the words, a list
    or a text with blanks between them.  retrieval: of the anchor, of a passage that answers it
    and, if there are any, of passages that do not (hard negatives).  question_answering: of the
    question and the context."""
    label: Label = "label"
    """The column of the label, of a list of labels, or of tags; multi_label: or a column of 0 and 1
    for each class, which are called as the columns are.  question_answering: of the answers,
    objects of text and answer_start."""
    id: Column = ""
    """The column that names an example; empty: rows are numbered from 0."""
    classes: Annotated[tuple[str, ...] | int, BeforeValidator(_names_or_number)] = ()
    """Classification: the names of the classes, or how many there are when labels are numbers."""
    label_separator: Annotated[str, Field(min_length=1, max_length=8)] = ","
    """multi_label: what is between the labels of a cell that is no list."""
    scheme: Scheme = "auto"
    """token_classification: how tags mark entities: BIO, BIOES, IOB1 (read as BIO), none (parts of
    speech, say); auto: as the classes say."""
    unanswerable: bool = False
    """question_answering: questions may have no answer in their context (SQuAD v2)."""
    window_overlap: Count = 128
    """question_answering: tokens that neighbouring windows of a long context share, at most half of
    a window's; transformers call it doc_stride."""
    max_answer_tokens: Positive = 30
    """question_answering: the most tokens of an answer that is predicted."""
    range: tuple[Real, Real] = (0.0, 5.0)
    """Regression: the smallest and the largest label."""

    files: dict[Split, OneOrSeveral[FileName]] = {}
    """A file for each split, relative to the data folder, or to that of the recipe without
    ``--data``: .tsv, .csv, .jsonl, .json or .parquet, and behind that .gz, .bz2, .xz or .zst where
    it is compressed.  All are read piece by piece, but for a .json that is one array, or in SQuAD's
    form, which memory has to hold.  Or several files,
    which are read one after the other: a list, a folder, or a pattern such as part-*.parquet.
    Names may be addresses that fsspec opens: s3://bucket/part-*.parquet, https://….  Splits are
    train, dev and test, and further ones, to be scored or predicted by their names."""
    split_by_rank: bool = False
    """With several ranks: deal the files of the train split to them, so that each reads and keeps
    its own alone; machines without a common disk may have some each.  Batches then depend on the
    number of ranks."""
    layout: Literal["auto", Layout] = "auto"
    """Files: tabs, commas, json, json_lines, parquet, conll, conllu; auto: as the ending says."""
    delimiter: Delimiter = AUTO
    """Files: the character between two fields, or tab; auto: as the ending says, but tabs where a
    header has the columns only so."""
    quoting: Quoting = "csv"
    """Files: csv: a field may stand in double quotes; none: a quote is a character like others."""
    header: bool = True
    """Files: whether the first row names the columns; if not, they are called 1, 2, …"""
    encoding: Encoding = AUTO
    """Files: utf-8, latin-1, cp1252, utf-16-le, …; auto: as a byte order mark says, or UTF-8."""
    compression: Compression = "auto"
    """Files: none, gzip, bz2, xz, zstd; auto: as what stands behind the ending says."""
    dataset: Name = ""
    """Instead of files: a folder that the library ``datasets`` loads, relative to the working
    folder, the data folder or that of the recipe, whichever has it first; or a name of the hub."""
    subset: Name = ""
    """The data set's configuration, where it has several."""
    splits: dict[Split, GivenName] = {"train": "train", "dev": "validation"}
    """What the data set calls each split; slices such as ``train[:90%]`` are understood."""
    streaming: bool = False
    """Read the training examples of a data set by name as they are trained on, without a copy on
    the disk, for data that exceed it; dev and test are read once, into the cache."""
    shuffle_buffer: Positive = _SHUFFLE_BUFFER
    """streaming: rows that are in memory and in random order, beside the order of the files; with
    several ranks, of each."""
    of_split: dict[Split, SplitSource] = {}
    """Splits that are written otherwise, by name: the fields that each has of its own."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TaskSource":
        if bool(self.files) == bool(self.dataset):
            raise ValueError("give either files or dataset")
        for split, names in self.files.items():
            if not names:
                raise ValueError(f"files.{split}: an empty list; name a file")
        self._check_labels()
        self._check_texts()
        has_classes = not self.has_range and self.kind not in (_RETRIEVAL, _SPANS)
        if has_classes and self._num_classes < 2:
            raise ValueError(f"classes: {self.kind} needs at least two, by name or as a number")
        if len(set(self._names)) != len(self._names):
            raise ValueError("classes: a name stands twice")
        for name in self._names:
            if name != name.strip():
                raise ValueError(
                    f"classes: {name!r} has spaces around it, which labels are read without; "
                    "leave them out"
                )
        if self.range[0] >= self.range[1]:
            raise ValueError("range: expected the smaller bound first")
        return self

    def _check_texts(self) -> None:
        if self.kind == _RETRIEVAL:
            if len(self.text) < 2:
                raise ValueError(
                    "text: retrieval needs the columns of an anchor and of a passage that answers "
                    "it; name both"
                )
            if len(set(self.text)) < len(self.text):
                raise ValueError("text: a column stands twice")
            return
        is_pair = self.kind == _SPANS or self.kind.startswith("pair")
        most = 2 if self.kind in FURTHER_KINDS or is_pair else 1
        least = 1 if self.kind in FURTHER_KINDS else most
        if not least <= len(self.text) <= most:
            raise ValueError(f"text: {self.kind} needs {most} column(s), got {len(self.text)}")

    def _check_labels(self) -> None:
        several, tags = self._has_several, self.kind == _TAGS
        labelled, spans = self.kind != _RETRIEVAL, self.kind == _SPANS
        if isinstance(self.label, tuple):
            if not several:
                raise ValueError(f"label: {self.kind} has one column of labels; name it")
            if self.classes:
                raise ValueError(
                    "classes: the columns that label names are the classes; leave it out"
                )
            if len(self.label) < 2:
                raise ValueError(
                    "label: expected the columns of two labels or more, or one of lists"
                )
        for name, given, has_effect in (
            (
                "label_separator",
                self.label_separator,
                several and not isinstance(self.label, tuple),
            ),
            ("scheme", self.scheme, tags),
            ("label", self.label, labelled),
            *((name, getattr(self, name), labelled and not spans) for name in ("classes", "range")),
            *((name, getattr(self, name), spans) for name in _OF_SPANS),
        ):
            if given != type(self).model_fields[name].default and not has_effect:
                raise ValueError(f"{name}: has no effect on {self.kind}; leave it out")
        if tags:
            try:
                scheme_of(self._names, self.scheme)
            except ValueError as error:
                raise ValueError(f"scheme: {error}") from None

    @property
    def _has_several(self) -> bool:
        return "multi_label" in self.kind and self.kind not in FURTHER_KINDS

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the classes, if they have any."""
        if isinstance(self.label, tuple):
            return self.label
        return self.classes if isinstance(self.classes, tuple) else ()

    @model_validator(mode="after")
    def _files_are_written_so(self) -> "TaskSource":
        fields = type(self).model_fields
        given = [name for name in _OF_FILES if getattr(self, name) != fields[name].default]
        self._check_effect(given, self.file_names)
        if self.split_by_rank and "train" not in self.files:
            what = "a data set by name" if self.dataset else "files without a train split"
            raise ValueError(f"split_by_rank: has no effect on {what}; leave it out")
        labels = (self.label,) if isinstance(self.label, str) else self.label
        self._check_numbers(() if self.kind == _RETRIEVAL else labels)
        return self

    @model_validator(mode="after")
    def _can_be_streamed(self) -> "TaskSource":
        if not self.streaming and self.shuffle_buffer != _SHUFFLE_BUFFER:
            raise ValueError("shuffle_buffer: has no effect without streaming; leave it out")
        if not self.streaming:
            return self
        if not self.dataset:
            raise ValueError("streaming: has no effect on files; name a dataset, or leave it out")
        for split, name in self.splits.items():
            if "[" in name:
                raise ValueError(
                    f"splits.{split}: {name} is a slice, which cannot be streamed; name a whole "
                    "split"
                )
        return self

    @model_validator(mode="after")
    def _splits_are_written_so(self) -> "TaskSource":
        for split, own in self.of_split.items():
            if split not in self.known_splits:
                table = "splits" if self.dataset else "files"
                raise ValueError(f"of_split.{split}: {table} has no such split; name it there")
            source = self.of(split)
            if not own.given:
                raise ValueError(f"of_split.{split}: no field is given; leave it out")
            if len(source.text) != len(self.text):
                raise ValueError(
                    f"of_split.{split}.text: expected {len(self.text)} column(s), as elsewhere"
                )
            if _width(source.label) != _width(self.label):
                raise ValueError(f"of_split.{split}.label: expected as many columns as elsewhere")
            if own.label is not None and self.kind == _RETRIEVAL:
                raise ValueError(
                    f"of_split.{split}.label: has no effect on retrieval; leave it out"
                )
            try:
                source._check_texts()
                source._check_effect(own.given, source.file_names)
                source._check_numbers()
            except ValueError as error:
                raise ValueError(f"of_split.{split}.{error}") from None
        return self

    def _check_effect(self, names: Collection[str], files: Collection[str]) -> None:
        """Refuse fields that change nothing about files.

        Raises:
            ValueError: the message begins with the field.
        """
        found: set[Layout | None] = {LAYOUTS.get(endings(Path(name))[0]) for name in files}
        if self.layout != "auto":
            found = {self.layout} if files else set()
        delimited = found & {None, *DELIMITERS}
        has_effect = {
            "layout": found,
            "delimiter": delimited | found & {"conll", "conllu"},
            "quoting": delimited,
            "header": delimited,
            "encoding": found - {"parquet"},
            "compression": found,
        }
        for name in _OF_FILES:
            if name in names and not has_effect[name]:
                what = "a data set by name" if self.dataset else "files of this kind"
                raise ValueError(f"{name}: has no effect on {what}; leave it out")

    def _check_numbers(self, labels: Collection[str] = ()) -> None:
        """Refuse names of columns where there is no header.

        Raises:
            ValueError: the message begins with the field.
        """
        if self.header:
            return
        named = [("text", text) for text in self.text]
        named += [*(("label", label) for label in labels), ("id", self.id or "1")]
        for key, name in named:
            if not _COLUMN_NUMBER.fullmatch(name):
                raise ValueError(
                    f"{key}: without a header columns are called 1, 2, …, not {name!r}"
                )

    @property
    def file_names(self) -> list[str]:
        """The names of all files, folders and patterns."""
        return [name for names in self.files.values() for name in _listed(names)]

    @property
    def known_splits(self) -> Collection[str]:
        """The splits there are."""
        return list(self.splits if self.dataset else self.files)

    def of(self, split: str) -> "TaskSource":
        """Return the source of one split alone, as ``of_split`` has it."""
        own = self.of_split[split].given if split in self.of_split else {}
        files = {split: self.files[split]} if split in self.files else {}
        return self.model_copy(update={**own, "files": files})

    @property
    def has_range(self) -> bool:
        """Whether labels are numbers within ``range``, and not classes."""
        if self.kind in FURTHER_KINDS:
            return self.classes == ()
        return self.kind.endswith("regression")

    @property
    def _num_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self._names)

    @property
    def _head(self) -> str:
        """The kind of the head."""
        if self.kind in FURTHER_KINDS:
            return self.kind
        if self.kind in (_TAGS, _RETRIEVAL, _SPANS):
            return "tags" if self.kind == _TAGS else self.kind
        if self._has_several:
            return "multi_label"
        if self.has_range:
            return "score"
        return "classes" if self._num_classes > 2 else "binary"

    @property
    def _labels(self) -> Literal["one", "several", "words", "spans", "none"]:
        """What an example has for labels."""
        if self.kind == _SPANS:
            return "spans"
        if self.kind == _RETRIEVAL:
            return "none"
        if self.kind == _TAGS:
            return "words"
        return "several" if self._has_several else "one"

    def format(self, task: str, split: str = "") -> TaskSchema:
        """Return the schema of the data.

        Args:
            task: the task's name.
            split: whose; empty for what all have that ``of_split`` does not name.
        """
        low, high = self.range if self.has_range else (0, self._num_classes - 1)
        names = () if self.has_range else self._names
        own, table = self.of(split), f"tasks.{task}.source"
        is_retrieval = self.kind == _RETRIEVAL
        return TaskSchema(
            task=task,
            layout=None if own.layout == "auto" else own.layout,
            labels=self._labels,
            label_columns=own.label if isinstance(own.label, tuple) else (),
            separator=self.label_separator,
            scheme=scheme_of(self._names, self.scheme) if self.kind == _TAGS else "none",
            id=own.id,
            sentences=own.text,
            label="" if isinstance(own.label, tuple) or is_retrieval else own.label,
            kind=self._head,
            whole=not self.has_range and not is_retrieval,
            low=-1 if is_retrieval else low,
            high=1 if is_retrieval or self.kind == _SPANS else high,
            **{name: getattr(self, name) for name in _OF_SPANS},
            classes=names,
            dialect=Dialect(
                delimiter=own.delimiter,
                quoting=own.quoting,
                header=own.header,
                encoding=own.encoding,
                compression=own.compression,
                table=f"{table}.of_split.{split}" if split in self.of_split else table,
            ),
        )

    def origin(self, task: str, split: str, folder: Path | None) -> Origin:
        """Return where a split comes from.

        Args:
            task: the task's name, for error messages.
            split: which.
            folder: that of the data files, if the run has one.

        Raises:
            InputError: the source does not have it.
        """
        if split not in self.known_splits:
            table, there = "splits" if self.dataset else "files", ", ".join(self.known_splits)
            raise InputError(
                f"tasks.{task}.source.{table}: no {split} split (it has {there}); name it there"
            )
        if self.dataset:
            kind = HubStream if self.streaming else HubSplit
            return kind(self.dataset, self.subset, self.splits[split])
        names = _listed(self.files[split])
        for name in names:
            if not (Path(name).is_absolute() or is_address(name)) and folder is None:
                raise InputError(
                    f"tasks.{task}.source.files: {name} is relative to the folder of the data "
                    "files, and not beside the recipe; name that folder with --data"
                )
        key = f"tasks.{task}.source.files.{split}"
        files = [DataFile(path) for path in shards(names, folder or Path(), key)]
        return files[0] if len(files) == 1 else DataFiles(tuple(files))
