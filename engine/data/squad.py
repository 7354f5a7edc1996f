"""Answers as spans of a context: SQuAD's own files, and the columns that Hugging Face has of them.

SQuAD's files nest questions in paragraphs and these in articles; the columns have a row for each
question, with ``answers = {"text": […], "answer_start": […]}``.  ``answer_start`` counts characters
(Unicode code points) of the context from 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..utils.errors import InputError
from ..utils.untrusted_io import parse_json
from .addresses import Place
from .dialect import Dialect
from .records import parse_whole
from .rows import BadRowError, Row, Rows, as_pieces, shorten, typed_row

Span = tuple[int, int]
"""The first character of an answer in its context, and the one behind its last."""

_FIELDS = ("text", "answer_start")


def spans_of(cell: str, context: str, *, unanswerable: bool) -> list[Span]:
    """Return the answers to a question.

    Args:
        cell: JSON, ``{"text": […], "answer_start": […]}`` or a list of such objects, one each.
        context: that they are of.
        unanswerable: whether there may be none.

    Raises:
        ValueError: they are none; the message says why, in words fit for counting, then after a
            colon where.
    """
    found = [_span(text, start, context) for text, start in _pairs(cell)]
    if not found and not unanswerable:
        raise ValueError("no answer: none is given, which source.unanswerable = true allows")
    return found


def _pairs(cell: str) -> list[tuple[Any, Any]]:
    """Return text and place of each answer, of any types.

    Raises:
        ValueError: the cell has neither form.
    """
    try:
        answers = parse_json(cell)
    except ValueError:
        answers = None
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        answers = {name: [answer.get(name) for answer in answers] for name in _FIELDS}
    if isinstance(answers, dict):
        texts, starts = (answers.get(name) for name in _FIELDS)
        if isinstance(texts, list) and isinstance(starts, list):
            if len(texts) != len(starts):
                counts = f"{len(texts)} of text, {len(starts)} of answer_start"
                raise ValueError(f"answers differ in number: {counts}")
            return list(zip(texts, starts, strict=True))
    raise ValueError("not answers: expected {'text': […], 'answer_start': […]}")


def _span(text: Any, start: Any, context: str) -> Span:
    if not isinstance(text, str) or type(start) is not int:
        raise ValueError(f"not an answer: text {text!r:.40}, answer_start {start!r:.40}")
    if not text.strip():
        raise ValueError(f"empty answer: at {start}")
    if start < 0 or context[start : start + len(text)] != text:
        there = context[start : start + len(text)] if start >= 0 else ""
        raise ValueError(
            f"answer is not in its place: {shorten(text)!r} at {start}, where the context has "
            f"{shorten(there)!r}"
        )
    return start, start + len(text)


def is_nested(text: str, columns: Sequence[str]) -> bool:
    """Return whether a JSON file is one object with SQuAD's ``data``, not an object a line.

    Args:
        text: of the file, its first line that is not blank at least.
        columns: those to read.
    """
    if not text.lstrip().startswith("{"):
        return False
    try:
        # An object of a line by itself is a row, which may have a column of that name.
        first = parse_json(text.lstrip().partition("\n")[0])
        return "data" in first and not set(columns) <= first.keys()
    except ValueError:
        return True


def squad_rows(text: str, path: Place, columns: Sequence[str], dialect: Dialect) -> Rows:
    """Return the rows of a file in SQuAD's nested form, v1.1 or v2, which is held in memory.

    The columns are id, question, context, answers, title and is_impossible.  The plausible answers
    of impossible questions are no answers.

    Args:
        text: all of the file (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: those to read.
        dialect: how the file is written.

    Raises:
        InputError: it is no JSON, or not nested so.
    """
    rows = _questions(parse_whole(text, path, dialect), path, columns)
    return Rows(as_pieces(rows), [])


def _questions(content: Any, path: Place, columns: Sequence[str]) -> Iterator[Row]:
    for i, article in enumerate(_listed(content, "data", str(path))):
        in_article = f"{path}, data[{i}]"
        for j, paragraph in enumerate(_listed(article, "paragraphs", in_article)):
            in_paragraph = f"{in_article}.paragraphs[{j}]"
            for k, question in enumerate(_listed(paragraph, "qas", in_paragraph)):
                place = f"{in_paragraph}.qas[{k}]"
                if not isinstance(question, dict):
                    yield Row(place, BadRowError("not a JSON object", type(question).__name__))
                    continue
                known = {"title": article.get("title"), "context": paragraph.get("context")}
                yield _row({**question, **known}, columns, place)


def _row(record: dict[str, Any], columns: Sequence[str], place: str) -> Row:
    if record.get("is_impossible") is True and record.get("answers"):
        detail = "is_impossible is true, and there are answers"
        return Row(place, BadRowError("both answers and none", detail))
    if record["context"] is None:
        del record["context"]
    return typed_row(record, columns, place, objects=("answers",))


def _listed(holder: Any, key: str, place: str) -> list[Any]:
    """Return a list within an object.

    Raises:
        InputError: it is none.
    """
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        raise InputError(f"no list {key!r}, {place}; give a file in SQuAD's form, or JSON lines")
    return found
