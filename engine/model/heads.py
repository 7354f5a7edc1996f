"""From token states to predictions: pooling, the features of a sentence pair, heads, losses.

Each task has one head.  What its input looks like is ``features``:

    single       u                          one sentence
    mean         (u + v) / 2                two sentences, linear output
    concat       [u; v]                     two sentences, linear output
    difference   [u; v; |u - v|]            two sentences, linear output (Sentence-BERT, Reimers
                                            and Gurevych 2019)
    cosine       low + (high - low) cos     two sentences, no weights; predictions cut at low

and what comes out and how it is scored follows from the task's labels (its
:class:`~engine.data.formats.FileFormat`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.formats import FileFormat
from ..errors import InputError
from ..rooms import kernels
from .layers import Linear

POOLINGS = ("cls", "mean")
PAIR_FEATURES = {"mean": 1, "concat": 2, "difference": 3, "cosine": 0}  # width in units of H
FEATURES = ("single", *PAIR_FEATURES)


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Reduce token states to one vector for each sequence.

    Args:
        hidden: ``[T, H]``.
        cu_seqlens: ``[S + 1]`` int32; no sequence is empty.
        pooling: ``"cls"`` (first token) or ``"mean"`` (over all tokens, [CLS] and [SEP] included).

    Returns:
        ``[S, H]`` in the dtype of ``hidden``; the mean is taken in fp32.
    """
    if pooling == "cls":
        return hidden[cu_seqlens[:-1].long()]
    offsets = cu_seqlens.long()
    mean = torch.segment_reduce(_at_least_fp32(hidden), "mean", offsets=offsets, axis=0)
    return mean.to(hidden.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    """Widen bf16; leave fp32, and float64, in which the tests compute their references."""
    return x.float() if x.element_size() < 4 else x


def pair_features(first: Tensor, second: Tensor, features: str) -> Tensor:
    """Join the two sentence vectors of each pair, ``[n, H]`` each, as ``features`` says."""
    if features == "mean":
        return (first + second) / 2
    if features == "concat":
        return torch.cat([first, second], dim=1)
    return torch.cat([first, second, (first - second).abs()], dim=1)


class TaskHead(nn.Module):
    """Dropout and the output layer of one task.

    Args:
        task: what is predicted, from how many sentences.
        features: what it is predicted from, see the module's docstring.
        width: H of the encoder.
        dropout_p: applied to the sentence vectors in training.
        site: the number of this head's dropout site.
    """

    def __init__(
        self, task: FileFormat, features: str, width: int, *, dropout_p: float, site: int
    ) -> None:
        super().__init__()
        allowed = ("single",) if len(task.sentences) == 1 else tuple(PAIR_FEATURES)
        if features not in allowed:
            raise InputError(
                f"tasks.{task.task}.features = {features!r}: expected {' or '.join(allowed)}"
            )
        if features == "cosine" and task.kind != "score":
            raise InputError(
                f"tasks.{task.task}.features = 'cosine' gives a score, the labels are {task.kind}"
            )
        self.task, self.features = task, features
        self.dropout_p, self.site = dropout_p, site
        units = PAIR_FEATURES.get(features, 1)
        outputs = int(task.high) + 1 if task.kind == "classes" else 1
        self.output = Linear(units * width, outputs) if units else None

    def forward(
        self,
        pooled: Tensor,
        segments: kernels.TaskSegments | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Score the task's examples.

        Args:
            pooled: ``[n, H]``, or ``[2 n, H]`` for pairs: all first sentences, then all second.
            segments: ``(0, n)`` when the head writes its gradients into its row.
            seed: 0-dim int64; needed in training mode.

        Returns:
            In fp32 ``[n, classes]`` logits, ``[n]`` logits (binary) or ``[n]`` scores.
        """
        pooled = kernels.dropout(
            pooled, self.dropout_p, training=self.training, seed=seed, stream=self.site
        )
        if self.features == "single":
            joined = pooled
        else:
            first, second = pooled.chunk(2)
            if self.output is None:
                first, second = _at_least_fp32(first), _at_least_fp32(second)
                span = self.task.high - self.task.low
                return self.task.low + span * F.cosine_similarity(first, second)
            joined = pair_features(first, second, self.features)
        assert self.output is not None
        scores = _at_least_fp32(self.output(joined, segments))
        return scores if self.task.kind == "classes" else scores.squeeze(1)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the examples: cross entropy, binary cross entropy or squared error.

        Args:
            scores: what :meth:`forward` returned.
            labels: fp32 ``[n]``: class numbers, 0/1, or values.
        """
        labels = labels.to(scores.dtype)
        if self.task.kind == "classes":
            return F.cross_entropy(scores, labels.long())
        if self.task.kind == "binary":
            return F.binary_cross_entropy_with_logits(scores, labels)
        return F.mse_loss(scores, labels)

    def predict(self, scores: Tensor) -> Tensor:
        """Turn scores into predictions in the labels' own terms: class numbers or values."""
        if self.task.kind == "classes":
            return scores.argmax(1)
        if self.task.kind == "binary":
            return (scores > 0).long()
        return scores.clamp(self.task.low, self.task.high)
