"""Base of the heads of whole sentences: their features, and the output layer.

The features of a single sentence are its vector (``single``), or that vector joined with a BiLSTM's
output over the token states (``bilstm``); those of a pair are in
:mod:`~engine.models.heads.pair_features`.
"""

import torch
from torch import Tensor

from ..._kernels import kernels
from ...data.task_schema import TaskSchema
from ..layers import Linear
from ..pooling import TaskStates, at_least_fp32
from .base import Head, HeadSettings, LinearHead
from .bilstm import BiLstm
from .pair_features import CROSS, JOINT_WIDTHS, PAIRS, SIMILARITIES, joint

SINGLE = ("single", "bilstm")
FEATURES = (*SINGLE, *PAIRS)


class SentenceHead(Head):
    """Dropout, the features of a sentence or pair, and a linear output layer.

    Args:
        settings: of a task.
        outputs: numbers that the output layer gives for an example.

    Attributes:
        output: the output layer; None where a similarity is the score itself.
    """

    known_features = FEATURES
    output: Linear | None

    def __init__(self, settings: HeadSettings, outputs: int) -> None:
        super().__init__(settings)
        width, bilstm = settings.config.hidden_size, settings.features == "bilstm"
        self.dropout_p, self.dropout_id = settings.dropout_p, settings.dropout_id
        self.reads_tokens = bilstm
        self.lstm = BiLstm(width) if bilstm else None
        self.joint = Linear(2 * width, width) if bilstm else None
        self.output = None
        if settings.features not in SIMILARITIES:
            self.output = Linear(JOINT_WIDTHS.get(settings.features, 1) * width, outputs)

    @classmethod
    def features_for(cls, task: TaskSchema) -> tuple[str, ...]:
        """Return the features of one sentence, or of two."""
        allowed = SINGLE if len(task.sentences) == 1 else PAIRS
        return tuple(name for name in cls.known_features if name in allowed)

    @classmethod
    def layers_used(cls, settings: HeadSettings) -> tuple[str, ...]:
        """Return the layer that all tasks with the features ``shared`` share."""
        return ("pair",) if settings.features == "shared" else ()

    def forward(self, states: TaskStates) -> Tensor:
        """Return the output layer's numbers, ``[n, outputs]``, or without one the similarities."""
        read = self._similarity(states) if self.features in SIMILARITIES else self._vector(states)
        return read if self.output is None else at_least_fp32(self.output(read))

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
            return layer(joined, states.row_context(len(joined))).relu()
        return joined

    def _linear(
        self, problem_type: str, share_of: tuple[float, float] | None = None
    ) -> LinearHead | None:
        """Return the output layer, where its input is the vector of one sequence."""
        if self.output is None or self.features not in ("single", CROSS):
            return None
        weight, bias = (x.detach().float().cpu() for x in (self.output.weight, self.output.bias))
        return LinearHead(weight, bias, problem_type, share_of)

    def _dropped(self, states: TaskStates) -> Tensor:
        return kernels.dropout(
            states.pooled,
            self.dropout_p,
            training=self.training,
            seed=states.seed,
            rng_offset=self.dropout_id,
        )
