"""Answers as spans of a context: a linear layer on token states, exact match and F1 of words."""

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ..._kernels import kernels
from ...data.task_batch import AnswerSpans, Labels
from ...data.windows import Spans
from ..layers import Linear
from ..pooling import TaskStates, at_least_fp32
from .answer_loss import answer_loss
from .base import Head, HeadSettings
from .metrics import METRICS
from .tags import TOKENS


class AnswerHead(Head):
    """Scores are logits ``[T, 2]`` of each token to begin and to end the answer.

    Labels are :class:`AnswerSpans`; a window without the answer points to its [CLS].
    """

    known_features = (TOKENS,)
    known_losses = ("default", "cross_entropy")
    metrics = (METRICS["squad_f1"], METRICS["exact_match"])
    answers = "span"
    answers_text = (
        "`span`, two logits for each token of [CLS] question [SEP] context [SEP], to begin and to "
        "end the answer; those of [CLS] stand for none"
    )
    reads_tokens = True

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        self.dropout_p, self.dropout_id = settings.dropout_p, settings.dropout_id
        self.output = Linear(settings.config.hidden_size, 2)

    def forward(self, states: TaskStates) -> Tensor:
        """Return the logits ``[T, 2]``, those of padding behind the windows among them."""
        rows = kernels.dropout(
            states.tokens,
            self.dropout_p,
            training=self.training,
            seed=states.seed,
            rng_offset=self.dropout_id,
        )
        return at_least_fp32(self.output(rows))

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean loss of the windows."""
        if not isinstance(labels, AnswerSpans):
            raise ValueError(f"labels: none for task {self.name!r}, which is to be trained")
        return answer_loss(scores, labels)


def best_spans(
    logits: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    spans: Spans,
    max_tokens: int,
    *,
    unanswerable: bool,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the best answer to each question over all windows of its context.

    It is the span of the context, of at most so many tokens, with the largest sum of two logits.
    The sum of [CLS] is that of no answer, the least of all windows; where there may be none, the
    larger of the two decides (Devlin et al. 2019, section 4.3, with a threshold of 0).

    Args:
        logits: ``[T, 2]`` of n windows.
        offsets: int64 ``[n + 1]``, where these begin.
        spans: of the R questions.
        max_tokens: the most tokens in an answer.
        unanswerable: whether a question may have no answer.

    Returns:
        ``[R, 2]``, the first character of each answer in its context and the one behind its last;
        0, 0 for none, NaN where a logit is not finite.  And ``[R]``, the probability of its first
        token times that of its last, in the window that it is of.
    """
    count = spans.num_rows
    found, certainty = np.zeros((count, 2), np.float32), np.zeros(count, np.float32)
    best, none = np.full(count, -np.inf), np.full(count, np.inf)
    of_none = np.zeros(count, np.float32)
    for window, row in enumerate(spans.rows.tolist()):
        own = logits[offsets[window] : offsets[window + 1]].astype(np.float64)
        if not np.isfinite(own).all():
            found[row], best[row], none[row] = np.nan, np.inf, -np.inf
            continue
        whole = np.logaddexp.reduce(own, axis=0).sum()
        if own[0].sum() < none[row]:
            none[row], of_none[row] = own[0].sum(), np.exp(own[0].sum() - whole)
        places = spans.places[offsets[window] : offsets[window + 1]]
        # A token of no character, such as a mark of a word's beginning, bounds no answer.
        tokens = np.flatnonzero(places[:, 1] > places[:, 0])
        if len(tokens):
            first, last, score = _best_pair(own[tokens], max_tokens)
            if score > best[row]:
                best[row], certainty[row] = score, np.exp(score - whole)
                found[row] = places[tokens[first], 0], places[tokens[last], 1]
    empty = np.isneginf(best) | ((none > best) if unanswerable else False)
    found[empty], certainty[empty] = 0, of_none[empty]
    return found, certainty


def _best_pair(logits: npt.NDArray[np.float64], most: int) -> tuple[int, int, float]:
    """Return the first and last token of the best span of at most ``most``, and its sum.

    Args:
        logits: ``[m, 2]``, m of 1 or more.
        most: 1 or more.
    """
    most = min(most, len(logits))
    ends = np.concatenate([logits[:, 1], np.full(most - 1, -np.inf)])
    sums = logits[:, :1] + sliding_window_view(ends, most)
    first, more = np.unravel_index(np.argmax(sums), sums.shape)
    return int(first), int(first + more), float(sums[first, more])
