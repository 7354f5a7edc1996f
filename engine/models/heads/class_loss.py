"""Cross entropy against classes of unequal size: class weights, label smoothing, focal loss.

Of an example with the label y and the probabilities p of C classes the loss is

    sum_c q_c w_c (1 - p_c)^gamma (-log p_c),    q_c = (1 - s) [c = y] + s / C

with the class weights w, the label smoothing s (Szegedy et al. 2016, section 7) and the focal gamma
(Lin et al. 2017, arXiv:1708.02002, equation 5).  With gamma = 0 it is torch's
``F.cross_entropy(weight=w, label_smoothing=s, reduction="none")``.

The loss of a batch is the mean of these over its n examples.  torch's own mean divides by the sum
of w_y instead, which differs from batch to batch, so that micro-batches and ranks would have to
know each other's labels.  Here the weights are divided once by the mean of w_y over the training
examples: that is what torch's divisor is on average, and the mean of a batch is the mean over its
parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...utils.errors import InputError

BALANCED = "balanced"
"""Class weights n / (C n_c), of n training examples of which n_c have class c (King and Zeng 2001),
as scikit-learn's ``compute_class_weight`` gives them."""


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
        classes: C, how many there are.
        table: the task's in the recipe, for messages.

    Raises:
        InputError: there are not as many weights as classes.
    """

    weights: Tensor | None

    def __init__(self, settings: ClassLossSettings, classes: int, table: str) -> None:
        super().__init__()
        asked = settings.class_weights
        if isinstance(asked, tuple) and len(asked) not in (0, classes):
            raise InputError(
                f"{table}.class_weights: {len(asked)} given, the task has {classes} classes"
            )
        self.settings, self.table = settings, table
        self.register_buffer("weights", torch.ones(classes) if asked else None, persistent=False)

    def weigh(self, counts: Sequence[int]) -> None:
        """Set the weights, of mean 1 over the training examples.

        Args:
            counts: training examples of each class.

        Raises:
            InputError: BALANCED, and a class has no example; or a weight is beyond fp32's range.
        """
        if self.weights is None:
            return
        asked, sizes = self.settings.class_weights, torch.tensor(counts, dtype=torch.float64)
        if isinstance(asked, tuple):
            weights = torch.tensor(asked, dtype=torch.float64)
            weights = weights / weights.max()  # sums of them stay within the range
        else:
            if 0 in counts:
                raise InputError(
                    f"{self.table}.class_weights = '{asked}': no training example has class "
                    f"{list(counts).index(0)}; give a weight for each class"
                )
            weights = 1 / sizes
        weights = (weights * (sizes.sum() / (weights * sizes).sum())).float()
        if not weights.isfinite().all():
            raise InputError(
                f"{self.table}.class_weights: too far apart for fp32, relative to those of the "
                "training examples; give others"
            )
        equal = bool((weights == weights[0]).all())
        self.weights = None if equal else weights.to(self.weights.device)

    @property
    def is_plain(self) -> bool:
        """Whether it is cross entropy as it is: classes weigh the same, and nothing else is set."""
        return self.weights is None and not (
            self.settings.label_smoothing or self.settings.focal_gamma
        )

    def forward(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, 0-dim.

        Args:
            log_probs: ``[n, C]``, the logarithms of the probabilities.
            labels: ``[n]`` int64, class numbers.
        """
        _, smoothing, gamma = self.settings
        terms = -log_probs
        if gamma:
            # Above 0: of gamma < 1 the slope at 0 is infinite, and log p is 0 there.
            others = (-log_probs.expm1()).clamp(min=torch.finfo(log_probs.dtype).tiny)
            terms = terms * others**gamma
        if self.weights is not None:
            terms = terms * self.weights.to(terms.dtype)
        losses = terms.gather(1, labels[:, None]).squeeze(1)
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * terms.mean(1)
        return losses.mean()
