"""Answer sentences with a trained run that was loaded once."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..data.loader import evaluation_batches
from ..data.split import TokenizedSplit
from ..data.table import Table
from ..data.task_schema import TaskSchema
from ..models.context import Context
from ..models.heads import Head, head_class
from ..models.pooling import pool
from ..runtime.precision import pick_device, pick_dtype
from ..utils.errors import InputError
from .run import Run, open_run
from .scoring import MAX_TOKENS, Answers, answers
from .search import Found, anchors_of, passages_of, search

Label = str | int
"""A class: its name, or its number where classes have none."""

Example = str | Sequence[str]
"""A sentence; the two of a pair; a question and its context; where words are tagged, a text or its
words."""

_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Prediction(NamedTuple):
    """The answer to one example.

    Attributes:
        prediction: the class; of a regression the value; of several labels a list of those that
            apply; of tagged words a list with the tag of each, None for one that was cut off and
            that no tag O stands for; of question answering a part of the context, empty for none.
        probabilities: of each class or label, by its name or number; of tagged words that of each
            word's tag, None for one that was cut off.  None of a regression and of answers that are
            texts.
        words: that the tags are of; None of other tasks.
        span: of question answering, the first character of the answer in its context and the one
            behind its last; None for no answer, and of other tasks.
    """

    prediction: Label | float | list[Label | None]
    probabilities: dict[str, float] | list[float | None] | None
    words: list[str] | None = None
    span: tuple[int, int] | None = None


class Match(NamedTuple):
    """A passage that was found for an anchor.

    Attributes:
        number: of the passage among those given, from 0.
        similarity: of the two.
    """

    number: int
    similarity: float


class Predictor:
    """A trained run, loaded once to answer many times.

    All files are read when it is made, and none afterwards, so that the run's folder may change or
    go.  Threads may share one: their calls wait for each other, since each uses all cores.
    Processes do not: make one in each.  On a CPU torch computes from then on with no more threads
    than there are cores.

    Args:
        run: the run's folder, or the run.
        device: ``cpu`` or ``cuda``; None for the GPU if there is one.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto``; None for the run's own, which gives the
            answers of ``python -m engine.predict``.

    Raises:
        InputError: the folder holds no run, or one without a usable checkpoint, or there is no such
            device or precision.
    """

    def __init__(
        self, run: str | Path | Run, *, device: str | None = None, precision: str | None = None
    ) -> None:
        if precision is not None and precision not in _PRECISIONS:
            known = ", ".join(_PRECISIONS)
            raise InputError(f"precision {precision!r}: expected one of {known}")
        self._run = run if isinstance(run, Run) else open_run(Path(run))
        self._device, self._lock = pick_device(device), Lock()
        dtype = None if precision is None else pick_dtype(precision, self._device)
        self._model, _ = self._run.trained_model(self._device, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self._model.encoder.parameters()).dtype

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the run's tasks."""
        return tuple(self._run.recipe.tasks)

    def __call__(self, task: str, examples: Sequence[Example]) -> list[Prediction]:
        """Answer examples.

        Args:
            task: one of :attr:`tasks`.
            examples: sentences; pairs of them, for a task on pairs; questions, each with its
                context, where answers are parts of that; for a task that tags words, texts (divided
                at blanks) or lists of words.  Too long ones lose their end; but contexts, which are
                read in windows.

        Returns:
            A prediction for each, in their order.

        Raises:
            InputError: there is no such task, or an example is empty or not of its kind.
        """
        form = schema(self._run, task)
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            kind = type(examples).__name__
            raise InputError(f"examples: expected a list of them, got one {kind}; put it in a list")
        if not examples:
            return []
        table = _table(form, examples)
        found = predictions(form, table, *self.answer(task, table))
        return [prediction for prediction in found if prediction is not None]

    def answer(self, task: str, table: Table) -> tuple[TokenizedSplit, Answers]:
        """Return the rows of a table tokenized, and the model's answers to them.

        Args:
            task: one of :attr:`tasks`.
            table: read by the schema of that task.

        Raises:
            InputError: there is no such task, or what the model computes is not finite.
        """
        form = schema(self._run, task)
        with self._lock:
            split = self._run.tokenize(form, table)
            return split, answers(self._model, split)

    def search(
        self, task: str, anchors: Sequence[str], passages: Sequence[str], k: int = 10
    ) -> list[list[Match]]:
        """Find the passages that are most similar to anchors, such as questions.

        Args:
            task: one of :attr:`tasks`, of the kind retrieval.
            anchors: texts.  Too long ones lose their end, as passages do.
            passages: texts, all of which are compared with each anchor.
            k: how many to find for each, at most all.

        Returns:
            For each anchor the matches, the most similar first.

        Raises:
            InputError: there is no such task or it is of another kind, k is not positive, or a text
                is empty or none.
        """
        form = schema(self._run, task)
        schemas = anchors_of(form), passages_of(form)
        if type(k) is not int or k < 1:
            raise InputError(f"k = {k!r}: expected a whole number of 1 or more")
        for texts in (anchors, passages):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                kind = type(texts).__name__
                raise InputError(f"expected a list of texts, got one {kind}; put it in a list")
        asked, told = (
            _table(own, texts) for own, texts in zip(schemas, (anchors, passages), strict=True)
        )
        if not len(asked) or not len(told):
            return [[] for _ in anchors]
        found = self.find(task, asked, told, k)
        return [
            [Match(*each) for each in zip(numbers, similarities, strict=True)]
            for numbers, similarities in zip(
                found.passages.tolist(), found.similarities.tolist(), strict=True
            )
        ]

    def find(self, task: str, anchors: Table, passages: Table, k: int) -> Found:
        """Find passages of a table for anchors of another; otherwise as :meth:`search`.

        Args:
            task: as there.
            anchors: read by the schema of :func:`~.search.anchors_of`.
            passages: read by that of :func:`~.search.passages_of`.
            k: as there.
        """
        form = schema(self._run, task)
        with self._lock:
            asked = self._run.tokenize(anchors_of(form), anchors)
            found = self._run.tokenize(passages_of(form), passages)
            return search(self._model, asked, found, k)

    def embed(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return sentence vectors: of the first token or the mean of all, as the run pools them.

        They are those of sentence-transformers from an export of the run, within the rounding of
        the precision that the predictor computes in.

        Args:
            sentences: n of them, which may be empty.  Too long ones lose their end.

        Returns:
            ``[n, H]`` float32.

        Raises:
            InputError: ``sentences`` is no list of texts, what the model computes is not finite,
                or the run has adapters, with which each task has vectors of its own.
        """
        if self._model.adapters:
            raise InputError(
                f"{self._run.folder}: trained with adapter_width = "
                f"{self._run.recipe.adapter_width}; each task has its own sentence vectors"
            )
        if isinstance(sentences, str):
            raise InputError("sentences: expected a list of them, got one str; put it in a list")
        for number, sentence in enumerate(sentences):
            _check_text(number, sentence, empty=True)
        vectors = np.zeros((len(sentences), self._run.config.hidden_size), dtype=np.float32)
        if not len(sentences):
            return vectors
        table = Table(ids=[""] * len(sentences), sentences=([*sentences],), labels=None)
        with self._lock, torch.inference_mode():
            split = self._run.tokenize(None, table)
            for indices, batch in evaluation_batches(split, MAX_TOKENS):
                moved = batch.to(self._device)
                hidden = self._model.encoder(moved.input_ids, Context.of(moved))
                pooled = pool(hidden, moved.cu_seqlens, self._model.pooling)
                vectors[indices] = pooled.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise InputError(f"{self._run.folder}: sentence vectors are not finite")
        return vectors


def schema(run: Run, task: str, split: str = "") -> TaskSchema:
    """Return the schema of a task of a run, whose recipe cannot be changed any more.

    Args:
        run: the run.
        task: the task's name.
        split: whose schema; empty for that of all which the recipe does not name.

    Raises:
        InputError: the run has no such task.
    """
    if task not in run.recipe.tasks:
        raise InputError(f"task {task!r}: {run.folder} has {run.task_names}")
    form = run.recipe.split_schema(task, split).unchangeable
    # Negatives are for training; an answer is the similarity of an anchor and a passage.
    return replace(form, sentences=form.sentences[:2]) if form.labels == "none" else form


def has_probabilities(form: TaskSchema) -> bool:
    """Return whether answers to a task have probabilities."""
    return head_class(form.kind).probabilities is not Head.probabilities


def class_names(form: TaskSchema, count: int) -> list[str]:
    """Return the names of a task's classes or labels; their numbers where they have none."""
    numbers = [str(number) for number in range(count)]
    return [*form.classes] if len(form.classes) == count else numbers


def predictions(
    form: TaskSchema, table: Table, split: TokenizedSplit, found: Answers
) -> list[Prediction | None]:
    """Return a model's answers by the names of classes.

    Args:
        form: the task's schema.
        table: the examples.
        split: the same tokenized.
        found: the answers.

    Returns:
        A prediction for each row, None for a blanked one.
    """
    shares, unseen = found.probabilities, split.unseen
    blank = set(table.blank)
    names = [] if shares is None else class_names(form, shares.shape[1])
    made: list[Prediction | None] = []
    for number, (start, end) in enumerate(pairwise(found.offsets.tolist())):
        values = found.predictions[start:end].ravel().tolist()
        if number in blank:
            made.append(None)
        elif form.labels == "spans":
            made.append(_span(values, table.sentences[1][number]))
        elif form.labels == "words":
            tags = [_label(form, value) for value in values]
            own = [
                None if unseen[place] or shares is None else float(shares[place, int(value)])
                for place, value in zip(range(start, end), values, strict=True)
            ]
            words = None if table.words is None else table.words[number]
            made.append(Prediction(tags, own, words))
        else:
            own_shares = None if shares is None else shares[start].tolist()
            by_name = None if own_shares is None else dict(zip(names, own_shares, strict=True))
            if form.labels == "several":
                labels = [_label(form, at) for at, value in enumerate(values) if value]
                made.append(Prediction(labels, by_name))
            else:
                value = values[0]
                answer = _label(form, value) if form.whole else value
                assert answer is not None
                made.append(Prediction(answer, by_name))
    return made


def _span(values: Sequence[float], context: str) -> Prediction:
    """Return an answer that is a span of its context, without blanks around it."""
    first, end = map(int, values)
    text = context[first:end]
    first += len(text) - len(text.lstrip())
    text = text.strip()
    return Prediction(text, None, span=(first, first + len(text)) if text else None)


def _label(form: TaskSchema, number: float) -> Label | None:
    if number < 0:
        return None
    return form.classes[int(number)] if form.classes else int(number)


def _table(form: TaskSchema, examples: Sequence[Example]) -> Table:
    """Return examples as rows.

    Raises:
        InputError: one is empty or not of the task's kind.
    """
    columns, words = tuple[list[str], ...]([] for _ in form.sentences), list[list[str]]()
    for number, example in enumerate(examples):
        texts: Sequence[Any]
        if form.labels == "words":
            own = example.split() if isinstance(example, str) else _items(number, example)
            if not own:
                raise InputError(f"example {number}: no words; leave it out")
            texts = own
            words.append(own)
        elif len(columns) == 2:
            texts = [] if isinstance(example, str) else _items(number, example)
            if len(texts) != 2:
                raise InputError(f"example {number}: expected a pair of sentences, as a tuple")
        else:
            texts = [example]
        for text in texts:
            _check_text(number, text)
        if form.labels == "words":
            texts = [" ".join(texts)]
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    ids = [str(number) for number in range(len(examples))]
    tagged = words if form.labels == "words" else None
    return Table(ids=ids, sentences=columns, labels=None, words=tagged)


def _items(number: int, example: object) -> list[Any]:
    if isinstance(example, list | tuple):
        return [*example]
    raise InputError(f"example {number}: expected texts, got {type(example).__name__}")


def _check_text(number: int, text: object, *, empty: bool = False) -> None:
    """Refuse what is no text.

    Raises:
        InputError: it is none, or empty, or half of a character, which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise InputError(f"example {number}: expected a text, got {type(text).__name__}")
    if not text.strip() and not empty:
        raise InputError(f"example {number}: an empty text; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"example {number}: has half of a character; correct it") from None
