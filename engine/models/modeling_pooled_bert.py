"""A BERT with a linear layer on the mean of its tokens' states, or on the first one's.

transformers loads this file with ``trust_remote_code=True``; it needs nothing but transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import can_return_tuple


class PooledBertConfig(BertConfig):
    """A BERT's, with two more entries, of the head.

    classifier_pooling: ``mean``, over all tokens that are no padding, or ``cls``, the first.
    share_of: ``[low, high]``, between which a logit says at what share the value lies; or None.
    """

    model_type = "pooled_bert"


class PooledBertForSequenceClassification(BertPreTrainedModel):
    """Logits ``[n, L]`` of n sequences; of a regression values ``[n, 1]``."""

    config_class = PooledBertConfig

    def __init__(self, config: PooledBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score sequences; with ``labels``, return the loss of the config's problem type."""
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pooled = self._pool(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        if self.config.share_of is not None:
            low, high = self.config.share_of
            logits = low + (high - low) * logits.sigmoid()
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Reduce ``[n, T, H]`` to ``[n, H]``; the mean is taken in fp32."""
        if self.config.classifier_pooling == "cls":
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.float().mean(1).to(hidden.dtype)
        mask = attention_mask[:, :, None].to(torch.float32)
        return ((hidden * mask).sum(1) / mask.sum(1)).to(hidden.dtype)


# Pipelines say of classes that are not listed here that they cannot use them.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[PooledBertConfig.model_type] = (
    PooledBertForSequenceClassification.__name__
)
