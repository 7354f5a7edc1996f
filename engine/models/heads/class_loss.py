"""Cross entropy against classes of unequal size: class weights, label smoothing, focal loss.

Of an example with the label y and the probabilities p of C classes the loss is

    sum_c q_c w_c (1 - p_c)^gamma (-log p_c),    q_c = (1 - s) [c = y] + s / C

with the class weights w, the label smoothing s (Szegedy et al. 2016, section 7) and the focal gamma
(Lin et al. 2017, arXiv:1708.02002, equation 5).  With gamma = 0 it is torch's
``F.cross_entropy(weight=w, label_smoothing=s, reduction="none")``.  A tag of a word is such an
example, and each of several labels is one of the two classes no and yes, of which yes has the
weight w of that label, and no has 1: with gamma = 0 and s = 0 torch's
``F.binary_cross_entropy_with_logits(pos_weight=w, reduction="none")``.

The loss of a batch is the mean of these over its n examples, its tagged tokens, or its examples and
their labels.  torch's own mean divides by the sum of w_y instead, which differs from batch to
batch, so that micro-batches and ranks would have to know each other's labels.  Here the weights are
divided once by the mean of w_y over the training examples: that is what torch's divisor is on
average, and the mean of a batch is the mean over its parts.
"""

from typing import NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...data.task_schema import TaskSchema
from ...utils.errors import InputError

BALANCED = "balanced"
"""Class weights n / (C n_c), of n training examples of which n_c have class c (King and Zeng 2001),
as scikit-learn's ``compute_class_weight`` gives them.  Of several labels (n - n_l) / n_l, of which
n_l have label l, so that yes and no count the same in each label."""


class ClassLossSettings(NamedTuple):
    """Settings of a task's loss against classes of unequal size.

    Attributes:
        class_weights: one for each class, or BALANCED; none: all are 1.
        label_smoothing: s, from 0 to 1, exclusive.
        focal_gamma: gamma, at least 0.
    """

    class_weights: tuple[float, ...] | str = ()
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    @property
    def given(self) -> list[str]:
        """The names of the settings that change the loss."""
        pairs = zip(self._fields, self, PLAIN, strict=True)
        return [name for name, value, default in pairs if value != default]


PLAIN = ClassLossSettings()
"""Those of cross entropy as it is."""


class ClassLoss(nn.Module):
    """The mean of the loss above; without parameters, and nothing of it is in checkpoints.

    Args:
        settings: of a task.
        task: the schema of its data, of C classes or L labels.

    Attributes:
        weights: fp32 ``[C]``, or ``[L, 2]`` those of no and yes; None where all are the same.

    Raises:
        InputError: there are not as many weights as classes.
    """

    weights: Tensor | None

    def __init__(self, settings: ClassLossSettings, task: TaskSchema) -> None:
        super().__init__()
        asked, classes = settings.class_weights, int(task.high) + 1
        self.settings, self.task, self.table = settings, task, f"tasks.{task.task}"
        self.of_labels = task.labels == "several"
        if isinstance(asked, tuple) and len(asked) not in (0, classes):
            what = "labels" if self.of_labels else "classes"
            raise InputError(
                f"{self.table}.class_weights: {len(asked)} given, the task has {classes} {what}"
            )
        shape = (classes, 2) if self.of_labels else (classes,)
        self.register_buffer("weights", torch.ones(shape) if asked else None, persistent=False)

    def weigh(self, counts: npt.ArrayLike) -> None:
        """Set the weights, of mean 1 over what is trained on.

        Args:
            counts: ``[C]``, training examples (tagged tokens) of each class; ``[L, 2]``, those
                without and with each of several labels.

        Raises:
            InputError: BALANCED, and a class has no example; or a weight is beyond fp32's range.
        """
        if self.weights is None:
            return
        asked, sizes = self.settings.class_weights, torch.as_tensor(counts, dtype=torch.float64)
        if isinstance(asked, tuple):
            weights = torch.tensor(asked, dtype=torch.float64)
        else:
            self._check_sizes(sizes)
            weights = sizes[:, 0] / sizes[:, 1] if self.of_labels else 1 / sizes
        if self.of_labels:
            weights = torch.stack([torch.ones_like(weights), weights], dim=1)
        weights = weights / weights.max()  # sums of them stay within the range
        weights = (weights * (sizes.sum() / (weights * sizes).sum())).float()
        if not weights.isfinite().all():
            raise InputError(
                f"{self.table}.class_weights: too far apart for fp32, relative to those of the "
                "training examples; give others"
            )
        equal = bool((weights == weights.view(-1)[0]).all())
        self.weights = None if equal else weights.to(self.weights.device)

    def _check_sizes(self, sizes: Tensor) -> None:
        """Refuse to balance a class without an example.

        Raises:
            InputError: there is one; the message names the first.
        """
        if not (sizes == 0).any():
            return
        asked = f"{self.table}.class_weights = '{BALANCED}'"
        number, *side = (sizes == 0).nonzero()[0].tolist()
        name = self.task.classes[number] if self.task.classes else number
        found = f"no training example has class {name}"
        if self.task.labels == "words":
            found = f"no tag that is trained on is {name}"
        elif self.of_labels:
            found = f"{'no' if side == [1] else 'every'} training example has label {name}"
        of_each = "label" if self.of_labels else "class"
        raise InputError(f"{asked}: {found}; give a weight for each {of_each}")

    @property
    def is_plain(self) -> bool:
        """Whether it is cross entropy as it is: classes weigh the same, and nothing else is set."""
        return self.weights is None and not (
            self.settings.label_smoothing or self.settings.focal_gamma
        )

    def forward(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, 0-dim; 0 where no label counts.

        Args:
            log_probs: ``[n, C]``, the logarithms of the probabilities; ``[n, L, 2]`` those of no
                and yes of several labels.
            labels: ``[n]`` int64, class numbers, -100 for one that does not count; ``[n, L]``.
        """
        _, smoothing, gamma = self.settings
        terms = -log_probs
        if gamma:
            # Above 0: of gamma < 1 the slope at 0 is infinite, and log p is 0 there.
            others = (-log_probs.expm1()).clamp(min=torch.finfo(log_probs.dtype).tiny)
            terms = terms * others**gamma
        if self.weights is not None:
            terms = terms * self.weights.to(terms.dtype)
        # On a GPU the gradient of gather adds up in any order.
        classes = torch.arange(terms.shape[-1], device=labels.device)
        losses = terms.where(labels[..., None] == classes, 0).sum(-1)
        counting = labels >= 0
        if smoothing:
            spread = terms.mean(-1).where(counting, 0)
            losses = (1 - smoothing) * losses + smoothing * spread
        return losses.sum() / counting.sum().clamp(min=1)
