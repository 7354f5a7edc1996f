"""The output layer of a task: from what the encoder made of its sentences to predictions.

A task of one sentence is read off its vector (``single``) or off a BiLSTM over the token states
joined with that vector (``bilstm``); a task of two by one of the features in
:mod:`~engine.model.features`.  What comes out and how it is scored follows from the task's labels
(its :class:`~engine.data.formats.FileFormat`) and from the recipe's ``loss``.

A head is one task's alone, so autograd adds its gradients into that task's row directly
(engine/multitask/flat_parameters.py); only shared layers have to tell tasks apart.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.formats import FileFormat
from ..data.part import Labels
from ..errors import InputError
from ..rooms import kernels
from .bilstm import BiLstm
from .features import CROSS, JOINT_WIDTHS, PAIRS, SIMILARITIES, SINGLE, joint
from .layers import Linear
from .states import TaskStates, at_least_fp32

FEATURES = (*SINGLE, *PAIRS)
LOSSES = ("default", "mse", "cross_entropy")
_SCALE_OF_SIMILARITY = 5.0
"""Of the logit that is read off a similarity, as training begins; the threshold is at 1/2."""


class Head(Protocol):
    """What the model asks of a head: of a task's, or of an objective's (engine/objectives)."""

    @property
    def uses(self) -> tuple[str, ...]:
        """The layers that are not its own, by their names in ``SharedLayers``."""

    def __call__(self, states: TaskStates) -> Tensor:
        """Score the task's part of a batch."""

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean loss over the examples, 0-dim."""


class TaskHead(nn.Module):
    """Dropout and the output layer of one task.

    Args:
        task: what is predicted, from how many sentences.
        features: what it is predicted from, see the module's docstring.
        width: H of the encoder.
        dropout_p: applied to the sentence vectors in training.
        site: the number of this head's dropout site.
        loss: one of LOSSES.  ``default``: cross entropy for classes and for yes or no, squared
            error for scores.  ``cross_entropy`` for scores: that of a share of their range.
    """

    def __init__(
        self,
        task: FileFormat,
        features: str,
        width: int,
        *,
        dropout_p: float,
        site: int,
        loss: str = "default",
    ) -> None:
        super().__init__()
        _check(task, features, loss)
        self.task, self.features = task, features
        self.squared_error = task.kind == "score" and loss != "cross_entropy"
        self.dropout_p, self.site = dropout_p, site
        outputs = int(task.high) + 1 if task.kind == "classes" else 1
        self.lstm = BiLstm(width) if features == "bilstm" else None
        self.joint = Linear(2 * width, width) if features == "bilstm" else None
        self.output: Linear | None
        if features not in SIMILARITIES:
            self.output = Linear(JOINT_WIDTHS.get(features, 1) * width, outputs)
        elif task.kind == "binary":
            self.output = Linear(1, 1)
            nn.init.constant_(self.output.weight, _SCALE_OF_SIMILARITY)
            nn.init.constant_(self.output.bias, -_SCALE_OF_SIMILARITY / 2)
        else:
            self.output = None

    @property
    def uses(self) -> tuple[str, ...]:
        """The layers that are not its own, by their names in ``SharedLayers``."""
        return ("pair",) if self.features == "shared" else ()

    @property
    def reads_tokens(self) -> bool:
        """Whether it looks at the tokens' states, not at the sentence vectors alone."""
        return self.lstm is not None

    def forward(self, states: TaskStates) -> Tensor:
        """Score the task's n examples.

        Returns:
            In fp32 ``[n, classes]`` logits, ``[n]`` logits (binary, or cross entropy of scores) or
            ``[n]`` scores.
        """
        read = self._similarity(states) if self.features in SIMILARITIES else self._vector(states)
        if self.output is None:
            return self._of_share(read.squeeze(1))
        scores = at_least_fp32(self.output(read))
        return scores if self.task.kind == "classes" else scores.squeeze(1)

    def _similarity(self, states: TaskStates) -> Tensor:
        """Return one number for each pair, ``[n, 1]``."""
        first, second = (at_least_fp32(x) for x in self._dropped(states).chunk(2))
        similarity = SIMILARITIES[self.features](first, second)[:, None]
        return similarity if self.output is None else similarity.to(self.output.weight.dtype)

    def _vector(self, states: TaskStates) -> Tensor:
        """Return one vector for each example."""
        pooled = self._dropped(states)
        if self.lstm is not None:
            assert self.joint is not None
            read = self.lstm(states.tokens, states.cu_seqlens, states.max_seqlen)
            return self.joint(torch.cat([pooled, read], dim=1)).relu()
        if self.features in ("single", CROSS):
            return pooled
        first, second = pooled.chunk(2)
        joined = joint(first, second, self.features)
        if self.features == "shared":
            layer = states.shared.pair
            assert layer is not None
            return layer(joined, states.rows(len(joined))).relu()
        return joined

    def _dropped(self, states: TaskStates) -> Tensor:
        return kernels.dropout(
            states.pooled,
            self.dropout_p,
            training=self.training,
            seed=states.seed,
            stream=self.site,
        )

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Mean loss over the examples: cross entropy, binary cross entropy or squared error.

        Args:
            scores: what :meth:`forward` returned.
            labels: fp32 ``[n]``: class numbers, 0/1, or values.

        Raises:
            ValueError: there are no labels.
        """
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels: none for task {self.task.task!r}, which is to be trained")
        labels = labels.to(scores.dtype)
        if self.task.kind == "classes":
            return F.cross_entropy(scores, labels.long())
        if self.squared_error:
            return F.mse_loss(scores, labels)
        share = (labels - self.task.low) / (self.task.high - self.task.low)
        return F.binary_cross_entropy_with_logits(scores, share)

    def predict(self, scores: Tensor) -> Tensor:
        """Turn scores into predictions in the labels' own terms: class numbers or values."""
        if self.task.kind == "classes":
            return scores.argmax(1)
        if self.task.kind == "binary":
            return (scores > 0).long()
        if self.squared_error:
            return scores.clamp(self.task.low, self.task.high)
        return self._of_share(scores.sigmoid())

    def certainty(self, scores: Tensor) -> Tensor:
        """Return the probability ``[n]`` that each prediction has by the scores; 1 for values."""
        if self.task.kind == "classes":
            return scores.softmax(1).amax(1)
        if self.task.kind == "binary":
            return scores.abs().sigmoid()
        return torch.ones_like(scores)

    def _of_share(self, share: Tensor) -> Tensor:
        """Return the score that lies at a share of the labels' range."""
        return self.task.low + (self.task.high - self.task.low) * share


def _check(task: FileFormat, features: str, loss: str) -> None:
    """Refuse features and losses that do not go with the task.

    Raises:
        InputError: the message names the recipe's key.
    """
    allowed = SINGLE if len(task.sentences) == 1 else PAIRS
    if features not in allowed:
        raise InputError(
            f"tasks.{task.task}.features = {features!r}: expected {' or '.join(allowed)}"
        )
    if loss == "mse" and task.kind != "score":
        raise InputError(
            f"tasks.{task.task}.loss = 'mse': the labels are {task.kind}, no scores; take default"
        )
    if loss == "cross_entropy" and task.kind == "score" and features in SIMILARITIES:
        raise InputError(
            f"tasks.{task.task}.loss = 'cross_entropy': {features} has no output layer to train "
            f"by it; take features with one ({', '.join(JOINT_WIDTHS)})"
        )
