"""Heads, one file a kind: they map hidden states of a task's sentences to losses and answers.

``HEADS`` is the registry: a :class:`~engine.data.task_schema.TaskSchema` or an objective names its
kind, and everything that depends on the kind is a method of the head
(:mod:`~engine.models.heads.base`).
"""

from ...data.source import FURTHER_KINDS
from ...data.task_schema import TaskSchema
from .answer_metrics import AnswerTexts, best_of, word_f1
from .base import LOSSES, Head, HeadExport, HeadSettings, LinearHead, Scores
from .binary import BinaryHead
from .class_loss import BALANCED, PLAIN, ClassLossSettings
from .classification import ClassificationHead
from .contrastive import ContrastiveHead
from .masked_lm import MaskedLmHead
from .metrics import METRICS, Metric, Results
from .multi_label import MultiLabelHead
from .pair_features import CROSS, SHARED_INPUT
from .question_answering import AnswerHead, best_spans
from .ranking import Ranking, rank_passages
from .regression import RegressionHead
from .retrieval import DOT, RetrievalHead
from .sentence import FEATURES as SENTENCE_FEATURES
from .sentence import SentenceHead
from .similarity_loss import IN_BATCH, SimilaritySettings
from .tags import TOKENS, TagHead
from .thresholds import HALF, THRESHOLDS
from .yes_no import YesNoHead

__all__ = [
    "BALANCED",
    "CROSS",
    "FEATURES",
    "HALF",
    "HEADS",
    "IN_BATCH",
    "LOSSES",
    "METRICS",
    "PLAIN",
    "SHARED_INPUT",
    "THRESHOLDS",
    "AnswerTexts",
    "ClassLossSettings",
    "Head",
    "HeadExport",
    "HeadSettings",
    "LinearHead",
    "Metric",
    "Ranking",
    "Results",
    "Scores",
    "SentenceHead",
    "SimilaritySettings",
    "YesNoHead",
    "best_of",
    "best_spans",
    "build_head",
    "head_class",
    "metrics_for",
    "rank_passages",
    "register",
    "word_f1",
]

FEATURES = (*SENTENCE_FEATURES, DOT, TOKENS)
"""Inputs of the heads of tasks, by the names that a recipe has for them."""

HEADS: dict[str, type[Head]] = {
    "classes": ClassificationHead,
    "binary": BinaryHead,
    "multi_label": MultiLabelHead,
    "score": RegressionHead,
    "tags": TagHead,
    "retrieval": RetrievalHead,
    "question_answering": AnswerHead,
    "masked_lm": MaskedLmHead,
    "masked_lm_next": MaskedLmHead,
    "simcse": ContrastiveHead,
}
"""By kind."""


def register(kind: str, head: type[Head]) -> None:
    """Add a kind of task, which ``tasks.NAME.source.kind`` of a recipe may then name.

    Raises:
        ValueError: there is such a kind already.
    """
    if kind in HEADS:
        raise ValueError(f"kind {kind!r}: registered already, as {HEADS[kind].__name__}")
    HEADS[kind] = head
    FURTHER_KINDS.add(kind)


def head_class(kind: str) -> type[Head]:
    """Return the class of a kind's heads.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in HEADS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(HEADS)}")
    return HEADS[kind]


def metrics_for(task: TaskSchema) -> tuple[Metric, ...]:
    """Return the metrics that a task can be scored by, the default first.

    Raises:
        ValueError: there is no such kind.
    """
    return head_class(task.kind).metrics_for(task)


def build_head(settings: HeadSettings) -> Head:
    """Return a head as it begins; its weights are drawn from torch's generator.

    Raises:
        InputError: the settings do not go together.
        ValueError: there is no such kind.
    """
    return head_class(settings.kind)(settings)
