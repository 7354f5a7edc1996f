"""Combine two sentence vectors ``u`` and ``v`` into the features that score a pair.

*Joint* features, each followed by a linear output layer:

    mean             (u + v) / 2
    concat           [u; v]
    distance         |u - v|
    difference       [u; v; |u - v|]        Sentence-BERT (Reimers and Gurevych 2019)
    shared           relu(W [u; v] + b)     W and b are shared by all tasks that take it

*Similarities*, one number for a pair.  As a score it is a share of the labels' range, without any
weights; for a yes or no it has a learnt scale and threshold:

    cosine           cos(u, v)              of labels from 0 to 5 it is 5 cos, predictions cut at 0
    cosine_shifted   (cos(u, v) + 1) / 2    of those it is 2.5 (cos + 1)
    pearson          sigmoid(r(u, v))       r: correlation over the H components

With ``cross`` both sentences are in one sequence, whose one vector is scored like a single
sentence's, by a linear output layer (:func:`~engine.data.split.join_pairs`; Devlin et al. 2019).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

JOINT_WIDTHS: Mapping[str, int] = MappingProxyType(
    {"mean": 1, "concat": 2, "distance": 1, "difference": 3, "shared": 1}
)
"""Width of the joint features, in units of H."""

SHARED_INPUT = 2
"""Width of what the shared layer reads, in units of H."""


def joint(first: Tensor, second: Tensor, features: str) -> Tensor:
    """Join the vectors of each pair, ``[n, H]`` each; for ``shared``, return its layer's input."""
    if features == "mean":
        return (first + second) / 2
    if features == "distance":
        return (first - second).abs()
    if features == "difference":
        return torch.cat([first, second, (first - second).abs()], dim=1)
    return torch.cat([first, second], dim=1)


def _cosine_shifted(first: Tensor, second: Tensor) -> Tensor:
    return (F.cosine_similarity(first, second) + 1) / 2


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    first, second = (x - x.mean(1, keepdim=True) for x in (first, second))
    return F.cosine_similarity(first, second).sigmoid()


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cosine": F.cosine_similarity, "cosine_shifted": _cosine_shifted, "pearson": _pearson}
)
"""By name, functions of ``[n, H]`` and ``[n, H]``, both fp32, to ``[n]``."""

CROSS = "cross"
PAIRS = (*JOINT_WIDTHS, *SIMILARITIES, CROSS)
