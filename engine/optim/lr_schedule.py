"""The learning rate as a function of the step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up to ``peak``, then constant or a straight line to 0.

    Attributes:
        peak: the highest rate.
        kind: ``"constant"`` or ``"linear"``.
        warmup_steps: steps before the peak is reached.
        total_steps: steps of the whole run.
    """

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the rate of step ``step``, counted from 0; never 0 within the run."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        return self.peak * (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
