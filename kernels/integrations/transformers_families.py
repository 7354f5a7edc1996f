"""The encoders of transformers that :func:`.accelerate` knows, by their ``model_type``."""

from operator import attrgetter
from typing import Any

from torch import nn

from .transformers_deberta import DEBERTA_V2
from .transformers_embeddings import Embeddings, ErnieEmbeddings, PlaceEmbeddings, TypeEmbeddings
from .transformers_layers import (
    AlbertAttention,
    AlbertLayer,
    DistilBertAttention,
    DistilBertBlock,
    DistilBertFeedForward,
    LastNomicBertLayer,
    NomicBertLayer,
    PostNorm,
    SelfAttention,
)
from .transformers_models import FAMILIES, Family, NormedModel, count_from_zero, count_tokens
from .transformers_modernbert import MODERNBERT
from .transformers_mpnet import MPNET


def _bert_layers(prefix: str, embeddings: type | None = Embeddings) -> dict[str, type]:
    """The layers of a model whose code is a copy of BERT's, its classes called ``prefix…``."""
    own = {} if embeddings is None else {f"{prefix}Embeddings": embeddings}
    return {
        **own,
        f"{prefix}SelfAttention": SelfAttention,
        f"{prefix}SelfOutput": PostNorm,
        f"{prefix}Output": PostNorm,
    }


def _attention(prefix: str) -> dict[str, type]:
    """The attention of a model that has BERT's, but norms of its own."""
    return {f"{prefix}SelfAttention": SelfAttention}


def _attention_and_embeddings(prefix: str) -> dict[str, type]:
    """Those of a model that has BERT's, but other norms in its layers."""
    return {f"{prefix}Embeddings": Embeddings, **_attention(prefix)}


def _last_layer(model: Any) -> nn.Module:
    last: nn.Module = model.layers[-1]
    return last


FAMILIES.update(
    {
        "albert": Family(
            layers={
                "AlbertEmbeddings": Embeddings,
                "AlbertAttention": AlbertAttention,
                "AlbertLayer": AlbertLayer,
            }
        ),
        "bert": Family(layers=_bert_layers("Bert")),
        "bert-generation": Family(layers=_bert_layers("BertGeneration", PlaceEmbeddings)),
        "camembert": Family(count_tokens, layers=_bert_layers("Camembert")),
        "data2vec-text": Family(count_tokens, layers=_bert_layers("Data2VecText")),
        "deberta-v2": DEBERTA_V2,
        "distilbert": Family(
            encoder=attrgetter("transformer"),
            layers={
                "Embeddings": PlaceEmbeddings,
                "DistilBertSelfAttention": DistilBertAttention,
                "TransformerBlock": DistilBertBlock,
                "FFN": DistilBertFeedForward,
            },
        ),
        "electra": Family(layers=_bert_layers("Electra")),
        "ernie": Family(inputs=("task_type_ids",), layers=_bert_layers("Ernie", ErnieEmbeddings)),
        "modernbert": MODERNBERT,
        "mpnet": MPNET,
        "nomic_bert": Family(
            count_from_zero,
            encoder=_last_layer,
            layers={"NomicBertEmbeddings": TypeEmbeddings, "NomicBertLayer": NomicBertLayer},
            padded=LastNomicBertLayer,
        ),
        "roberta": Family(count_tokens, layers=_bert_layers("Roberta")),
        "roberta-prelayernorm": Family(
            count_tokens,
            layers=_attention_and_embeddings("RobertaPreLayerNorm"),
            model=NormedModel,
        ),
        "roc_bert": Family(
            inputs=("input_shape_ids", "input_pronunciation_ids"),
            layers=_bert_layers("RoCBert", None),
        ),
        "splinter": Family(layers=_bert_layers("Splinter")),
        "xlm-roberta": Family(count_tokens, layers=_bert_layers("XLMRoberta")),
        "xlm-roberta-xl": Family(count_tokens, layers=_attention("XLMRobertaXL")),
        "xmod": Family(
            count_tokens,
            inputs=("lang_ids",),
            layers=_attention_and_embeddings("Xmod"),
            joins_tasks=False,
        ),
    }
)
