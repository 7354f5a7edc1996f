"""Thresholds of a model's answers: choose them on a split, and say which they are."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..data.task_schema import TaskSchema
from ..distributed.ranks import Ranks
from ..models.heads import HALF, Head, Metric, YesNoHead
from ..models.heads.thresholds import DEV_PER_LABEL, choose_thresholds, deciding_metric

_MOST_LABELS = 30
"""Labels whose thresholds are listed."""


def fit_thresholds(
    head: Head,
    scores: Tensor,
    labels: npt.NDArray[np.float32],
    metrics: Sequence[Metric],
    ranks: Ranks,
) -> None:
    """Choose a head's thresholds on a split, if its recipe says so; all ranks get the same.

    Where scores are not finite they stay as they are, as nothing is kept of such a model.

    Args:
        head: of a task.
        scores: all of a split, fp32 on the CPU, the same on all ranks.
        labels: of the split.
        metrics: of the task, the deciding one first.
        ranks: the processes that share the work.
    """
    if not isinstance(head, YesNoHead) or head.threshold == HALF or not scores.isfinite().all():
        return
    found = None
    if ranks.is_main:
        several = scores.dim() == 2
        metric = deciding_metric(head.threshold, [one.name for one in metrics], several=several)
        per_label = head.threshold == DEV_PER_LABEL
        found = choose_thresholds(scores.numpy(), labels, metric, per_label=per_label).tolist()
    head.set_thresholds(ranks.broadcast(found))


def describe_thresholds(head: Head, form: TaskSchema) -> str:
    """Return the probabilities above which a task is answered with yes; empty if it is 1/2."""
    if not isinstance(head, YesNoHead) or head.threshold == HALF:
        return ""
    shares = [f"{share:.3g}" for share in head.thresholds.double().sigmoid().tolist()]
    if head.threshold == DEV_PER_LABEL:
        names = form.classes or [str(number) for number in range(len(shares))]
        named = zip(names[:_MOST_LABELS], shares, strict=False)
        more = ", …" if len(shares) > _MOST_LABELS else ""
        return ", ".join(f"{name} {share}" for name, share in named) + more
    return shares[0]
