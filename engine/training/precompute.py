"""Precompute hidden states of a frozen encoder, once instead of at every step."""

from dataclasses import replace

import numpy as np
import torch

from ..data.loader import evaluation_batches
from ..data.split import TokenizedSplit
from ..models.context import Context
from ..models.multitask import MultitaskModel
from ..models.pooling import pool
from ..utils.arrays import ranges

_MAX_TOKENS = 8192  # a batch


def precompute_hidden_states(model: MultitaskModel, split: TokenizedSplit) -> TokenizedSplit:
    """Return the split with the hidden states of its examples, so that no step runs the encoder.

    The encoder computes them without dropout.  A head that reads tokens gets the states of all
    tokens; for other heads each sequence becomes one token, whose state is the sequence's vector.

    Args:
        model: on any device; its encoder must not change afterwards.
        split: of a task that the model has a head for.
    """
    device = next(model.parameters()).device
    width = model.encoder.config.hidden_size
    all_tokens = model.head(split.task).reads_tokens
    offsets = split.offsets if all_tokens else np.arange(len(split.lengths) + 1)
    states = np.empty((offsets[-1], width), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for indices, batch in evaluation_batches(split, _MAX_TOKENS):
            batch = batch.to(device)
            hidden = model.encoder(batch.input_ids, Context.of(batch))
            if not all_tokens:
                hidden = pool(hidden, batch.cu_seqlens, model.pooling)
            columns = np.arange(split.columns)[:, None]
            sequences = (indices * split.columns + columns).reshape(-1)
            places = ranges(offsets[sequences], np.diff(offsets)[sequences])
            states[places] = hidden.float().cpu().numpy()
    model.train(was_training)
    tokens = split.tokens if all_tokens else np.zeros(len(states), dtype=split.tokens.dtype)
    return replace(split, tokens=tokens, offsets=offsets, token_types=None, states=states)
