"""Philox4x32-10 in plain torch, the reference of all random words in this package.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: a counter-based generator,
whose words are a function of the counter and the 64-bit seed.  :mod:`.dropout` and
:mod:`.balancing.pcgrad` define their counters; C++ and CUDA have the generator in csrc, Triton's
own is ``tl.philox``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""All bits of a 32-bit word."""


def philox_words(counter: Sequence[Tensor], seed: Tensor | int) -> Tensor:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of one shape, each a 32-bit word.
        seed: int64; a tensor is on the device of the counter, and 0-dim.

    Returns:
        int64 ``[*shape, 4]``, each a 32-bit word.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57
        word0, word1 = ((product1 >> 32) & WORD) ^ word1 ^ key0, product1 & WORD
        word2, word3 = ((product0 >> 32) & WORD) ^ word3 ^ key1, product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return torch.stack((word0, word1, word2, word3), -1)
