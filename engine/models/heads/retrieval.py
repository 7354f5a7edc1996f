"""Find the passage that answers an anchor: similarities of sentence vectors, nDCG.

An example is an anchor, a passage that answers it and any number of passages that do not (hard
negatives).  Similarities are the cosines of their vectors, or dot products; the losses are in
:mod:`~engine.models.heads.similarity_loss`, the ranks in :mod:`~engine.models.heads.ranking`.
"""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from ..._kernels import kernels
from ...data.task_batch import Labels, TextIds
from ...utils.errors import InputError
from ..pooling import TaskStates, at_least_fp32
from ..step_scores import StepScores
from .base import Head, HeadSettings
from .metrics import METRICS
from .similarity_loss import in_batch_loss, triplet_loss

COSINE, DOT = "cosine", "dot"
_TEMPERATURES = MappingProxyType({COSINE: 0.05, DOT: 1.0})
"""By features, the default of sentence-transformers: scales of 20 and of 1."""

TRIPLET = "triplet"


class RetrievalHead(Head):
    """A head without weights; scores are the n examples' vectors ``[n, c, H]``.

    With ``cosine`` they are of length 1.  The labels are :class:`TextIds` ``[n, c]``; c is 2 or
    more in training, and may be 1 where passages are encoded for a search.
    """

    known_features = (COSINE, DOT)
    known_losses = ("default", "cross_entropy", TRIPLET)
    metrics = tuple(
        METRICS[name] for name in ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100")
    )
    answers = "similarity"
    answers_text = "`similarity`, of the vectors of an anchor and a passage: of no layer"
    answers_code = MappingProxyType({"similarity": "x"})

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        self.dropout_p, self.dropout_id = settings.dropout_p, settings.dropout_id
        own = settings.similarity
        self.temperature = own.temperature or _TEMPERATURES[settings.features]
        self.symmetric, self.margin = own.symmetric, own.margin
        self.is_triplet = settings.loss == TRIPLET
        self._width = settings.config.hidden_size

    @classmethod
    def compares_examples(cls, loss: str) -> bool:
        """Return whether examples are each other's negatives."""
        return loss != TRIPLET

    @property
    def shape_of_scores(self) -> tuple[int, ...]:
        """``(c, H)``."""
        assert self.task is not None
        return len(self.task.sentences), self._width

    @classmethod
    def check(cls, settings: HeadSettings) -> None:
        """Refuse triplets without negatives, besides.

        Raises:
            InputError: the message names the recipe's key.
        """
        super().check(settings)
        assert settings.task is not None
        if settings.loss == TRIPLET and len(settings.task.sentences) < 3:
            raise InputError(
                f"tasks.{settings.name}.loss = '{TRIPLET}': needs a negative for each anchor; name "
                "its column last in source.text"
            )

    def forward(self, states: TaskStates) -> Tensor:
        """Return the vectors of the texts, ``[n, c, H]``."""
        columns = _ids(states.labels, self.name).shape[1]
        pooled = kernels.dropout(
            states.pooled,
            self.dropout_p,
            training=self.training,
            seed=states.seed,
            rng_offset=self.dropout_id,
        )
        vectors = at_least_fp32(pooled).unflatten(0, (columns, -1)).transpose(0, 1)
        return F.normalize(vectors, dim=-1) if self.features == COSINE else vectors

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean loss of the examples, with no other negatives than their own."""
        ids = _ids(labels, self.name)
        if self.is_triplet:
            return triplet_loss(scores, self.margin)
        return in_batch_loss(scores, ids, self.temperature, symmetric=self.symmetric)

    def step_loss(self, scores: Tensor, _labels: Labels | None, of_step: StepScores) -> Tensor:
        """Return the share of the examples in the step's mean loss, with the gradient of it all."""
        whole = in_batch_loss(
            of_step.with_own(scores), of_step.ids, self.temperature, symmetric=self.symmetric
        )
        share = len(scores) / (of_step.ids[:, 0] >= 0).sum()
        return whole - whole.detach() * (1 - share)

    def predict(self, scores: Tensor) -> Tensor:
        """Return the similarity of each anchor and its passage, ``[n]``."""
        return (scores[:, 0] * scores[:, 1]).sum(-1)


def _ids(labels: Labels | None, name: str) -> Tensor:
    if not isinstance(labels, TextIds):
        raise ValueError(f"labels: none for task {name!r}, which compares texts by their ids")
    return labels.ids
