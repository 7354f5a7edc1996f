"""NVIDIA apex's FusedAdam and FusedLAMB on flat parameters, where apex is installed."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from ..utils.errors import InputError
from .adamw import AdamSettings

CLASSES = {"apex_adam": "FusedAdam", "apex_lamb": "FusedLAMB"}


class ApexOptimizer:
    """An optimizer of apex that gets the combined gradient; weights and moments stay flat.

    Unlike this engine's own optimizers it stores the combined gradient, and waits for the device
    to learn whether a step is skipped, since apex cannot be told there.

    Args:
        name: a key of :data:`CLASSES`.
        parameters: what is updated; matrices decay, biases and norms do not.
        settings: see :class:`.AdamSettings`.

    Raises:
        InputError: apex does not import.
    """

    def __init__(
        self, name: str, parameters: FlatParameters, **settings: Unpack[AdamSettings]
    ) -> None:
        try:
            optimizers = import_module("apex.optimizers")
        except ImportError:
            raise InputError(
                f"optimizer = {name}: NVIDIA's apex is not installed; build it from "
                "github.com/NVIDIA/apex (PyPI's apex is another project)"
            ) from None
        self.exp_avg = torch.zeros_like(parameters.master)
        self.exp_avg_sq = torch.zeros_like(parameters.master)
        self.updates = torch.zeros((), device=parameters.master.device)
        self._parameters = parameters
        self._gradient = torch.zeros_like(parameters.master)
        self._tensors = [
            (nn.Parameter(slot.view(parameters.master)), slot) for slot in parameters.slots.values()
        ]
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": settings["weight_decay"]},
            {"params": [], "weight_decay": 0.0},
        ]
        for tensor, slot in self._tensors:
            groups[slot.offset >= parameters.decayed]["params"].append(tensor)
        # apex's LAMB would clip by itself; the engine has done so.
        own = {"max_grad_norm": float("inf")} if name == "apex_lamb" else {}
        self._optimizer = getattr(optimizers, CLASSES[name])(
            groups, lr=0.0, betas=settings["betas"], eps=settings["eps"], **own
        )
        for tensor, slot in self._tensors:
            moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
            self._optimizer.state[tensor] = {n: slot.view(flat) for n, flat in moments.items()}

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The moments, by name."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def state(self) -> dict[str, Tensor]:
        """No further state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def step(
        self,
        weights: Tensor,
        segments: Sequence[Segment],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update weights and moments, as :meth:`.AdamW.step` does."""
        if skip:
            return
        flat = self._parameters
        for segment in segments:
            columns = segment.columns
            kernels.combine(flat.rows[:, columns], weights[segment.group], self._gradient[columns])
        self._gradient *= scale
        for tensor, slot in self._tensors:
            tensor.grad = slot.view(self._gradient)
        for group in self._optimizer.param_groups:
            group["lr"], group["step"] = float(lr), int(self.updates)
        self._optimizer.step()
        self.updates += 1
        flat.refresh_compute()
