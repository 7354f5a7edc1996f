"""Dynamic loss scaling for fp16 gradients, decided on the device.

Micikevicius et al., "Mixed Precision Training", ICLR 2018: small gradients vanish in fp16, so the
losses are multiplied by a scale and the update divides by it.  A step whose gradients overflow is
skipped and halves the scale; many good ones in a row double it.
"""

import torch
from torch import Tensor

_FIRST, _SMALLEST, _LARGEST = 2.0**16, 1.0, 2.0**24


class LossScale:
    """A loss scale as large as the gradients allow; the host never reads it.

    Args:
        device: of the training.
        growth_interval: steps in a row without overflow that double the scale.

    Attributes:
        scale: 0-dim fp32, a power of two, so that dividing by it rounds nothing.
        good_steps: 0-dim int64, since the last change.
    """

    def __init__(self, device: torch.device, *, growth_interval: int = 2000) -> None:
        self.scale = torch.full((), _FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._growth_interval = growth_interval

    @property
    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try; reads the device."""
        return self.scale.item() > _SMALLEST

    def update(self, overflow: Tensor) -> None:
        """Halve the scale, count the step, or double the scale.

        Args:
            overflow: 0-dim bool, whether this step's gradients were not finite.
        """
        count = self.good_steps + 1
        grow = ~overflow & (count >= self._growth_interval)
        changed = torch.where(overflow, self.scale / 2, self.scale * 2)
        self.scale.copy_(
            torch.where(overflow | grow, changed.clamp(_SMALLEST, _LARGEST), self.scale)
        )
        self.good_steps.copy_(torch.where(overflow | grow, 0, count))
