"""The head of masked language modelling and of next sentence prediction (Devlin et al. 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._kernels import kernels
from ...data.task_batch import Labels, MaskedTokens
from ..context import RowContext
from ..layers import Embedding, LayerNorm, Linear
from ..pooling import TaskStates, at_least_fp32
from .base import Head, HeadSettings, Scores

_WORDS = {
    "cls.predictions.bias": "bias",
    "cls.predictions.transform.dense.weight": "transform.weight",
    "cls.predictions.transform.dense.bias": "transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
}
_PRETRAINED = _WORDS | {
    "pooler.dense.weight": "pooler.weight",
    "pooler.dense.bias": "pooler.bias",
    "cls.seq_relationship.weight": "follows.weight",
    "cls.seq_relationship.bias": "follows.bias",
}


class MaskedLmHead(Head):
    """A head that predicts masked tokens; its decoder is the word table.

    Of the kind ``masked_lm_next`` it predicts from [CLS], too, whether the second segment follows
    the first.
    """

    is_pretrained = True
    fills_masks = True

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        config, next_sentence = settings.config, settings.kind == "masked_lm_next"
        width, std = config.hidden_size, config.initializer_range
        biases = config.head_biases
        self.transform = Linear(width, width, bias=biases.dense, init_std=std)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps, bias=biases.norm)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pooler = Linear(width, width, init_std=std) if next_sentence else None
        self.follows = Linear(width, 1, init_std=std) if next_sentence else None

    @classmethod
    def layers_used(cls, _settings: HeadSettings) -> tuple[str, ...]:
        """Return the word table, all of whose entries the decoder uses."""
        return ("word",)

    def forward(self, states: TaskStates) -> Scores:
        """Return the logits ``[m, V]`` of the m masked tokens.

        With next sentence prediction, also the logits ``[n]`` that the second segments follow.
        """
        labels = states.labels
        assert isinstance(labels, MaskedTokens), "the batch has no masks"
        masked = kernels.take_rows(states.tokens, labels.positions)
        words = self.word_logits(masked, states.shared.word, states.row_context(len(masked)))
        if self.pooler is None or self.follows is None:
            return words
        first = kernels.take_rows(states.tokens, states.cu_seqlens[:-1].long())
        return words, at_least_fp32(self.follows(self.pooler(first).tanh())).squeeze(1)

    def loss(self, scores: Scores, labels: Labels | None) -> Tensor:
        """Return the mean cross entropy of the masked tokens, and of the segments, added."""
        assert isinstance(labels, MaskedTokens), "the batch has no masks"
        if isinstance(scores, Tensor):
            return F.cross_entropy(scores, labels.targets)
        words, follows = scores
        assert labels.is_next is not None
        loss = F.cross_entropy(words, labels.targets)
        return loss + F.binary_cross_entropy_with_logits(follows, labels.is_next)

    def word_logits(
        self, hidden: Tensor, word: Embedding, context: RowContext | None = None
    ) -> Tensor:
        """Return a logit for each word of the table: ``[m, H]`` to fp32 ``[m, V]``.

        Args:
            hidden: ``[m, H]``.
            word: the table.
            context: of the m rows, when task gradients are collected.
        """
        changed = self.norm(F.gelu(self.transform(hidden)))
        return at_least_fp32(word.decode(changed, context) + self.bias)

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over the head that a Hugging Face model was pretrained with, if it is there whole.

        The two outputs of its next sentence prediction (0: follows) become one logit.
        """
        known = {ours: tensors[theirs] for theirs, ours in _PRETRAINED.items() if theirs in tensors}
        for name in ("follows.weight", "follows.bias"):
            if name in known:
                known[name] = known[name][:1] - known[name][1:]
        own = self.state_dict()
        if any(name not in known or known[name].shape != own[name].shape for name in own):
            return False
        self.load_state_dict({name: known[name].float() for name in own})
        return True

    def to_pretrained(self) -> dict[str, Tensor]:
        """Return the weights of its words' logits, under BERT's names."""
        own = self.state_dict()
        return {theirs: own[ours] for theirs, ours in _WORDS.items() if ours in own}
