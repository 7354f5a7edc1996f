"""One task's share of a batch, as numpy arrays, before the tasks' batches are concatenated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from ..utils.arrays import Indices


class MaskedTokens(NamedTuple):
    """Labels of masked language modelling.

    Attributes:
        positions: int64 ``[m]``, the masked tokens among the tokens of the task batch, each once;
            -1 for one that does not count.
        targets: int64 ``[m]``, what stood there; -100 for one that does not count.
        is_next: float32 ``[n]``, 1 where an example's second segment follows its first in the
            text; None without next sentence prediction.
    """

    positions: Tensor
    targets: Tensor
    is_next: Tensor | None


class TaggedTokens(NamedTuple):
    """Labels of words.

    Attributes:
        positions: int64 ``[m]``, the tokens whose states are to be scored, among those of the task
            batch: the first of each word, or all; -1 for a word without a token.
        targets: int64 ``[m]``, their tags; -100 for one that does not count.
    """

    positions: Tensor
    targets: Tensor


class TextIds(NamedTuple):
    """What a batch of retrieval has in place of labels.

    Attributes:
        ids: int64 ``[n, c]``, a number for each text, the same for texts of the same tokens.
    """

    ids: Tensor


class AnswerSpans(NamedTuple):
    """Labels of n windows of contexts.

    Attributes:
        first: int64 ``[n]``, the token that begins the answer, among those of the task batch;
            [CLS] where the window has no answer.
        last: int64 ``[n]``, the token that ends it; the same there.
        offsets: int64 ``[n + 1]``; window i is tokens ``offsets[i]:offsets[i + 1]``.
    """

    first: Tensor
    last: Tensor
    offsets: Tensor


Labels = Tensor | MaskedTokens | TaggedTokens | TextIds | AnswerSpans
"""float32 ``[n]`` for a task, of several labels ``[n, L]``; masked or tagged tokens; text ids;
spans of answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBatch:
    """n examples of c sequences each.

    Attributes:
        task: the task's name.
        tokens: int64 ``[T]``: all first sequences, then in the same order all second ones.
        sizes: int64 ``[n * c]``, the tokens of each sequence.
        columns: c, 1 or 2, of retrieval 2 or more.
        labels: or None.
        token_types: int64 ``[T]``, the segment of each token; None where all are 0.
        states: fp32 ``[T, H]``, precomputed hidden states of a frozen encoder.
    """

    task: str
    tokens: Indices
    sizes: Indices
    columns: int
    labels: Labels | None
    token_types: Indices | None = None
    states: npt.NDArray[np.float32] | None = None

    @property
    def examples(self) -> int:
        """N."""
        return len(self.sizes) // self.columns

    @property
    def terms(self) -> int:
        """How many terms its mean loss has: its examples, or its tagged tokens."""
        if isinstance(self.labels, TaggedTokens):
            return int((self.labels.targets >= 0).sum())
        return self.examples


def empty_task_batch(task: str) -> TaskBatch:
    """Return the batch of a task without examples, as some ranks have."""
    nothing = np.empty(0, dtype=np.int64)
    return TaskBatch(task=task, tokens=nothing, sizes=nothing, columns=1, labels=None)


class Examples(Protocol):
    """Examples that batches are drawn from: a split of a task, or the text of an objective."""

    @property
    def task(self) -> str:
        """The task's name."""

    def __len__(self) -> int:
        """Return how many examples there are."""

    def task_batch(self, chosen: Indices, step: int, /) -> TaskBatch:
        """Return the chosen examples; ``step`` decides what is random about them."""

    def sequence_sizes(self, chosen: Indices, step: int, /) -> Indices:
        """Return the tokens of each sequence of :meth:`task_batch`, int64 ``[n * c]``."""

    def terms(self, chosen: Indices, /) -> int:
        """Return how many terms the mean loss of chosen examples has."""


_MASKED_MULTIPLE = 64
"""Masked tokens are padded to a multiple of this where batches have few shapes."""


def pad_labels(labels: Labels | None) -> Labels | None:
    """Pad masked or tagged tokens with ones that do not count: position -1, target -100."""
    if labels is None or isinstance(labels, Tensor | TextIds | AnswerSpans):
        return labels
    padding = (0, -len(labels.positions) % _MASKED_MULTIPLE)
    return labels._replace(
        positions=F.pad(labels.positions, padding, value=-1),
        targets=F.pad(labels.targets, padding, value=-100),
    )


def map_labels(labels: Labels | None, move: Callable[[Tensor], Tensor]) -> Labels | None:
    """Apply ``move`` to every tensor of some labels."""
    if labels is None or isinstance(labels, Tensor):
        return None if labels is None else move(labels)
    moved = {name: move(x) for name, x in labels._asdict().items() if x is not None}
    return labels._replace(**moved)
