"""SimCSE against its formula."""

from itertools import pairwise

import torch
from torch.nn import functional as F

from engine.models.context import Context

from .cases import SEED, batch_of


def test_simcse_is_its_formula_and_its_copies_differ(model, tokenizer):
    model.train()
    batch = batch_of(tokenizer, ("simcse",))
    names = ("simcse",)
    (loss,) = model.losses(model(batch, names, seed=SEED), batch, names)
    hidden = model.encoder(batch.input_ids, Context.of(batch, seed=SEED)).double()
    bounds = batch.cu_seqlens.tolist()
    pooled = [hidden[a:b].mean(0) for a, b in pairwise(bounds)]
    first, second = pooled[:5], pooled[5:]
    assert not any(torch.allclose(u, v) for u, v in zip(first, second, strict=True))
    losses = []
    for i, u in enumerate(first):
        powers = [torch.exp(F.cosine_similarity(u, v, dim=0) / 0.05) for v in second]
        losses.append(-torch.log(powers[i] / sum(powers)))
    torch.testing.assert_close(loss.double(), sum(losses) / 5, rtol=1e-5, atol=1e-6)
