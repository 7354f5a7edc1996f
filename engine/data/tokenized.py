"""Examples as token ids in numpy arrays: a piece of a file, or the pieces put together.

Nothing here needs torch, so that processes that tokenize start fast and small.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.arrays import offsets_of, ranges
from ..utils.errors import InputError
from .table import Table, check_usable
from .task_schema import TaskSchema
from .tokenizer import EncodedTexts, Tokenizer
from .windows import Spans, windows_of

Array = npt.NDArray[Any]

SPANS = "spans."
"""How the names of the arrays of :class:`~.windows.Spans` begin."""

_UNCUT = 1 << 30

TEXT_KEYS = "text_keys"
"""uint64 ``[n * c, 2]``, of retrieval: the same for texts of the same tokens."""

ARRAYS: Mapping[str, Literal["rows", "offsets", "questions", "contexts"]] = MappingProxyType(
    {
        "tokens": "rows",
        "offsets": "offsets",
        "labels": "rows",
        "token_types": "rows",
        "word_offsets": "offsets",
        "word_sizes": "rows",
        TEXT_KEYS: "rows",
        f"{SPANS}rows": "questions",
        f"{SPANS}places": "rows",
        f"{SPANS}targets": "rows",
        f"{SPANS}context_of": "contexts",
        f"{SPANS}context_bytes": "rows",
        f"{SPANS}context_offsets": "offsets",
        f"{SPANS}answers": "rows",
        f"{SPANS}answer_offsets": "offsets",
    }
)
"""The arrays of a split, and what the numbers in them count: nothing (their rows are appended), or
the rows of another array, its questions or its contexts, of which the pieces before have some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPiece:
    """The n examples of a piece of a file, each of c sequences.

    Attributes:
        examples: n; it may be 0.
        rows: of the file that are among them: n, of question answering the questions.
        columns: c.
        arrays: some of ARRAYS, as :class:`~.split.TokenizedSplit` has them.
        truncated: how many sentences were cut to the limit on the length.
        bad_rows: how many rows were skipped or blanked, by reason.
        blank: the numbers of the blanked rows within the piece.
        first_bad: what was wrong with the first of them.
    """

    examples: int
    rows: int
    columns: int
    arrays: dict[str, Array]
    truncated: int
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    blank: tuple[int, ...] = ()
    first_bad: str = ""


class Totals(NamedTuple):
    """What is counted over all pieces, as in :class:`TokenizedPiece`."""

    examples: int
    rows: int
    columns: int
    truncated: int
    bad_rows: dict[str, int]
    blank: tuple[int, ...]
    first_bad: str


class Joiner:
    """Puts pieces together, in their order.

    Args:
        append: is given the name of an array, and the rows that a piece adds to it.
    """

    def __init__(self, append: Callable[[str, Array], None]) -> None:
        self._append = append
        self._ends = Counter[str]()  # of the arrays of offsets
        self._examples = self._rows = self._truncated = self._questions = self._contexts = 0
        self._columns, self._first_bad = 0, ""
        self._bad_rows, self._blank = Counter[str](), list[int]()

    def add(self, piece: TokenizedPiece) -> None:
        """Add a piece."""
        for name, array in piece.arrays.items():
            counts = ARRAYS[name]
            if counts == "offsets":
                own = array if name not in self._ends else array[1:]
                self._append(name, own + self._ends[name])
                self._ends[name] += int(array[-1])
            else:
                before = {"rows": 0, "questions": self._questions, "contexts": self._contexts}
                self._append(name, array + before[counts] if before[counts] else array)
        if f"{SPANS}context_of" in piece.arrays:
            self._questions += len(piece.arrays[f"{SPANS}context_of"])
            self._contexts += len(piece.arrays[f"{SPANS}context_offsets"]) - 1
        self._blank += [self._rows + row for row in piece.blank]
        self._bad_rows.update(piece.bad_rows)
        self._first_bad = self._first_bad or piece.first_bad
        self._examples += piece.examples
        self._rows += piece.rows
        self._truncated += piece.truncated
        self._columns = piece.columns

    @property
    def rows(self) -> int:
        """How many rows of the file are there so far."""
        return self._rows

    def check_usable(self, where: str) -> None:
        """Refuse pieces without a usable row.

        Args:
            where: what they come from.

        Raises:
            InputError: they have none.
        """
        usable = self._rows - len(self._blank)
        check_usable(usable, where, self._bad_rows, self._first_bad)

    def totals(self) -> Totals:
        """Return what is counted over all pieces."""
        return Totals(
            self._examples,
            self._rows,
            self._columns,
            self._truncated,
            dict(self._bad_rows),
            tuple(self._blank),
            self._first_bad,
        )


def tokenize_table(
    form: TaskSchema | None,
    table: Table,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    joins_pairs: bool = False,
) -> TokenizedPiece:
    """Tokenize a table as its task needs it: windows of contexts, keys of retrieval's texts.

    Args:
        form: the task's schema; None for sentences of no task.
        table: the rows, read by it.
        tokenizer: what to split them with.
        max_length: the most tokens in a sequence, ``[CLS]`` and ``[SEP]`` included.
        joins_pairs: make one sequence of the two sentences of each example.

    Raises:
        InputError: the limit is too low for what a sequence has to hold.
    """
    if form is not None and form.labels == "spans":
        return _tokenize_windows(form, table, tokenizer, max_length)
    arrays, columns = dict[str, Array](), len(table.sentences)
    joins = joins_pairs and columns == 2
    if table.words is None:
        by_example = [text for texts in zip(*table.sentences, strict=True) for text in texts]
        # Of a pair the longer sentence is cut first, by its length before.
        encoded = tokenizer.encode(by_example, _UNCUT if joins else max_length)
    else:
        encoded, arrays["word_sizes"] = tokenizer.encode_words(table.words, max_length)
        arrays["word_offsets"] = offsets_of([len(words) for words in table.words])
    if form is not None and form.labels == "none":
        arrays[TEXT_KEYS] = _text_keys(encoded)
    if table.labels is not None:
        arrays["labels"] = table.labels
    truncated = encoded.truncated
    arrays["tokens"], arrays["offsets"] = encoded.tokens, encoded.offsets
    if joins:
        arrays |= _pairs_joined(encoded, tokenizer, max_length)
        truncated = int(arrays.pop("is_cut").sum())
        columns = 1
    return TokenizedPiece(
        examples=len(table),
        rows=len(table),
        columns=columns,
        arrays=arrays | {"tokens": _narrow(arrays["tokens"], tokenizer)},
        truncated=truncated,
        bad_rows=table.bad_rows,
        blank=table.blank,
        first_bad=table.first_bad,
    )


def _narrow(tokens: Array, tokenizer: Tokenizer) -> Array:
    return tokens.astype(np.uint16) if tokenizer.vocab_size <= 1 << 16 else tokens


def _tokenize_windows(
    form: TaskSchema, table: Table, tokenizer: Tokenizer, max_length: int
) -> TokenizedPiece:
    questions, contexts = table.sentences
    found = windows_of(
        questions, contexts, table.answers, tokenizer, max_length, form.window_overlap
    )
    arrays: dict[str, Array] = {
        "tokens": _narrow(found.encoded.tokens, tokenizer),
        "offsets": found.encoded.offsets,
        **{f"{SPANS}{name}": array for name, array in found.spans._asdict().items()},
    }
    if found.token_types is not None:
        arrays["token_types"] = found.token_types
    if table.labels is not None:
        # Of each window, for subsets that keep the share of those without an answer.
        arrays["labels"] = (found.spans.targets[:, 0] > 0).astype(np.float32)
    return TokenizedPiece(
        examples=len(found.spans.rows),
        rows=len(table),
        columns=1,
        arrays=arrays,
        truncated=found.encoded.truncated,
        bad_rows=table.bad_rows,
        blank=table.blank,
        first_bad=table.first_bad,
    )


def _text_keys(encoded: EncodedTexts) -> Array:
    """Return a key of 128 bits for each text, the same for the same tokens."""
    tokens = encoded.tokens.tobytes()
    bounds = pairwise((encoded.offsets * encoded.tokens.itemsize).tolist())
    keys = (hashlib.blake2b(tokens[a:b], digest_size=16).digest() for a, b in bounds)
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)


def text_ids(keys: Array) -> npt.NDArray[np.int64]:
    """Return a number for each text, the same for the same key: that of the first such text."""
    whole = np.ascontiguousarray(keys).view("V16").reshape(-1)
    _, first, found = np.unique(whole, return_index=True, return_inverse=True)
    return first[found.reshape(-1)].astype(np.int64)


def _pairs_joined(encoded: EncodedTexts, tokenizer: Tokenizer, max_length: int) -> dict[str, Array]:
    """Make one sequence, ``[CLS] A [SEP] B [SEP]``, of the two sentences of each example.

    B is segment 1, behind one separator; RoBERTa has two, and no segments.  Pairs that are too long
    lose tokens at the end of the longer sentence until both are equally long, then of both.

    Raises:
        InputError: the limit is too low for a token of each sentence.
    """
    separators = tokenizer.pair_separators
    most = max_length - separators - 2
    if most < 2:
        raise InputError(
            f"max_length = {max_length}: expected {separators + 4} or more for a pair in a sequence"
        )
    starts = encoded.offsets[:-1].reshape(-1, 2)
    own = np.diff(encoded.offsets).reshape(-1, 2) - 2  # without [CLS] and [SEP]
    shorter = np.minimum(own.min(axis=1, initial=max_length), most // 2)
    longer = np.minimum(own.max(axis=1, initial=0), most - shorter)
    kept = np.stack([shorter, longer], axis=1)
    first_is_longer = own[:, 0] > own[:, 1]
    kept[first_is_longer] = kept[first_is_longer, ::-1]

    last = starts + own + 1  # each sentence's own [SEP]
    first, second = [starts[:, 0], *[last[:, 0]] * separators], [starts[:, 1] + 1, last[:, 1]]
    one = np.ones_like(own[:, 0])
    sizes = np.stack([kept[:, 0] + 1, *[one] * separators, kept[:, 1], one], axis=1)
    places = ranges(np.stack([*first, *second], axis=1).reshape(-1), sizes.reshape(-1))
    joined: dict[str, Array] = {
        "tokens": encoded.tokens[places],
        "offsets": offsets_of(sizes.sum(axis=1)),
        "is_cut": kept < own,
    }
    if separators == 1:
        segments = np.array([*[0] * len(first), *[1] * len(second)], dtype=np.uint8)
        joined["token_types"] = np.repeat(np.tile(segments, len(own)), sizes.reshape(-1))
    return joined


def spans_of_arrays(arrays: Mapping[str, Array]) -> Spans | None:
    """Return the spans among some arrays; None without any."""
    if f"{SPANS}rows" not in arrays:
        return None
    return Spans(*(arrays[f"{SPANS}{name}"] for name in Spans._fields))
