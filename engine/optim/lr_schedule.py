"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine", "polynomial")
"""Names of what the rate does after warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up to ``peak``, then constant or down to 0.

    After warm-up, with the share r of the steps left (1 at first, 0 behind the last step), the
    rate is

        constant      peak
        linear        peak r
        cosine        peak (1 + cos(pi (1 - r))) / 2        half a cosine (Loshchilov, Hutter 2017)
        polynomial    peak r^power

    Attributes:
        peak: the highest rate.
        kind: one of SCHEDULES.
        warmup_steps: steps before the peak is reached.
        total_steps: steps of the whole run.
        power: of ``polynomial``, above 0; with 1 it is ``linear``.
    """

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int
    power: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the rate of step ``step``, counted from 0.

        Within the run it is 0 only where ``r^power`` is too small for a float.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        left, steps = self.total_steps - step, max(1, self.total_steps - self.warmup_steps)
        if self.kind == "cosine":
            # The same as 1 + cos(pi (1 - r)) over 2, without its cancellation near the end.
            return self.peak * math.sin(math.pi / 2 * left / steps) ** 2
        if self.kind == "polynomial" and self.power != 1:
            return self.peak * (left / steps) ** self.power
        return self.peak * left / steps
