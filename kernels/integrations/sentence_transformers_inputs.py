"""Let sentence-transformers give an accelerated model packed inputs.

For flash attention its `Transformer` module can leave padding out: a collator joins the texts of a
batch, and poolings read ``cu_seq_lens_q``.  :class:`PackedInputs` turns this on.  Inputs stay
padded, for the model to pack them itself, in versions of sentence-transformers without it and where
a module behind reads places of a padded batch.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from threading import RLock
from typing import Any

import torch
from torch import nn

from .class_exchange import Exchanged, exchange_class, is_exchanged, restore_class
from .packing_collator import PackingCollator
from .transformers_models import FAMILIES, PackedModel, PackedOutput, PaddedHead

# A model's outputs are those of its tokens in the first two, of its sequences in the last one.
_TASKS = ("feature-extraction", "fill-mask", "sequence-classification")
# Modules of sentence-transformers that take packed features, or look at one token at a time.
_TAKE_PACKED = frozenset(
    {
        *("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm", "MultiVectorMask"),
        *("SpladePooling", "SparseAutoEncoder"),
    }
)
_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


_TOKENIZING = RLock()
"""Held while a thread tokenizes; free in a process that is forked."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_TOKENIZING.acquire,
        after_in_parent=_TOKENIZING.release,
        after_in_child=_TOKENIZING.release,
    )


class TextCollator(PackingCollator):
    """Packs texts; ``seq_idx`` ``[1, T]`` spares poolings a wait for the device."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate tokenized texts."""
        batch = super().__call__(features)
        lengths = batch["cu_seq_lens_q"].diff()
        numbers = torch.arange(len(lengths), dtype=torch.int32)
        return {**batch, "seq_idx": numbers.repeat_interleave(lengths)[None]}


class PackedInputs(Exchanged):
    """sentence-transformers' `Transformer`, whose model is accelerated."""

    def _can_flatten_inputs(self) -> bool:
        """Get ready to pack texts; the module asks when its ``unpad_inputs`` is set."""
        module: Any = self
        methods = [how["method"] for how in module.modality_config.values()]
        if (
            module.transformer_task not in _TASKS
            or any(map(_refuses_packed, module.model.modules()))
            or "text" not in module.modality_config
            or any(method != "forward" for method in methods)
        ):
            return False
        module.data_collator = TextCollator()
        module._flatten_position_offset = 0  # positions are left to the model
        if module.model_forward_params is not None:
            module.model_forward_params |= _ARGUMENTS
        return True

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize texts, one thread at a time.

        A tokenizer keeps the padding that it was last asked for, so that another thread's would be
        taken for tokens.
        """
        module: Any = self
        with _TOKENIZING:
            return module.original_class.preprocess(self, *args, **kwargs)

    def _should_flatten_inputs(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to pack a batch: not while the model is restored, or tokens are asked for."""
        module: Any = self
        if _GIVES_PADDED.get() or not any(
            isinstance(part, PackedModel) for part in module.model.modules()
        ):
            return False
        return bool(module.original_class._should_flatten_inputs(self, *args, **kwargs))


class SentenceTransformer(Exchanged):
    """sentence-transformers' model, some of whose results are of padded texts."""

    def _inference(self, inputs: list[Any], *, output_value: str | None, **kwargs: Any) -> Any:
        """Encode texts; those whose tokens are asked for are padded, and packed by the model."""
        module: Any = self
        token = _GIVES_PADDED.set(output_value != "sentence_embedding")
        try:
            return module.original_class._inference(
                self, inputs, output_value=output_value, **kwargs
            )
        finally:
            _GIVES_PADDED.reset(token)


_GIVES_PADDED: ContextVar[bool] = ContextVar("_GIVES_PADDED", default=False)
"""Whether the texts that this thread encodes are padded; other threads go on packing theirs."""


def _refuses_packed(part: nn.Module) -> bool:
    """Whether it is a model, or an encoder under a head, that takes padded inputs alone."""
    output = getattr(part, "packed_output", None)
    return isinstance(part, PaddedHead) or output is PackedOutput.REFUSED


def padded_transformers(model: nn.Module) -> list[nn.Module]:
    """The modules in ``model`` that could give accelerated models packed inputs.

    Raises:
        ValueError: a module looks at the hidden states of padding.
    """
    base = sys.modules.get("sentence_transformers.base.model")
    whole = getattr(base, "BaseModel", ())
    found = []
    for outer in model.modules():
        if not isinstance(outer, whole):
            continue
        stages = list(_stages(outer))
        transformers = [stage for stage in stages if _is_transformer(stage)]
        for stage in transformers:
            expansion = getattr(stage, "query_expansion", None)
            if expansion is not None and not expansion["attend"]:
                raise ValueError(
                    "model: query_expansion with attend=False scores places of padding, which are "
                    "not computed here; use attend=True, or do not accelerate it"
                )
        others = [stage for stage in stages if not _is_transformer(stage)]
        if all(_takes_packed(stage) for stage in others):
            found += [stage for stage in transformers if not is_exchanged(stage)]
    return found


def encoding_models(model: nn.Module) -> list[nn.Module]:
    """The models in ``model`` that encode texts, and may be asked for those of their tokens."""
    name = "sentence_transformers.sentence_transformer.model"
    whole = getattr(sys.modules.get(name), "SentenceTransformer", ())
    return [
        outer
        for outer in model.modules()
        if isinstance(outer, whole) and hasattr(outer, "_inference") and not is_exchanged(outer)
    ]


def give_packed(transformer: Any) -> None:
    """Let a module give its model packed inputs, unless its ``unpad_inputs`` is False."""
    exchange_class(transformer, PackedInputs)
    transformer.unpad_inputs = transformer.unpad_inputs  # looks again at what it can do


def give_padded(transformer: Any) -> None:
    """Undo :func:`give_packed`, once the model names its own attention again."""
    restore_class(transformer)
    for name in ("data_collator", "_flatten_position_offset"):
        vars(transformer).pop(name, None)
    if transformer.model_forward_params is not None:
        transformer.model_forward_params -= _ARGUMENTS
    transformer.unpad_inputs = transformer.unpad_inputs


def _stages(outer: nn.Module) -> Iterator[nn.Module]:
    """What runs one after the other in a model of sentence-transformers, of each of its routes."""
    for stage in outer.children():
        is_container = isinstance(stage, nn.Sequential | nn.ModuleDict)
        if is_container or _is_theirs(stage, frozenset({"Router"})):
            yield from _stages(stage)
        else:
            yield stage


def _is_theirs(stage: nn.Module, names: frozenset[str]) -> bool:
    kind = type(stage)
    return kind.__name__ in names and kind.__module__.startswith("sentence_transformers.")


def _takes_packed(stage: nn.Module) -> bool:
    return _is_theirs(stage, _TAKE_PACKED)


def _is_transformer(stage: Any) -> bool:
    """Whether it is a module, of a version that can leave padding out, with a model we know."""
    return (
        _is_theirs(stage, frozenset({"Transformer", "MLMTransformer"}))
        and hasattr(type(stage), "unpad_inputs")
        and hasattr(type(stage), "_should_flatten_inputs")
        and getattr(stage.config, "model_type", None) in FAMILIES
    )
