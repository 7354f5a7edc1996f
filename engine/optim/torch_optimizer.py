"""Optimizers of torch.optim on flat parameters: SGD, Adafactor, and any other by its name.

They get the combined gradient, which is stored for them, and keep their state by parameter.
"""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from ..utils.errors import InputError

TORCH = "torch."
"""``torch.X`` names the class X of torch.optim."""
NAMED = {"sgd": "SGD", "adafactor": "Adafactor"}
"""Classes of torch.optim that have a name of their own."""

OptionValue = bool | int | float | str | list[float]

_OF_RECIPE = ("params", "lr", "weight_decay")
_REFUSED = {
    "capturable": "steps of torch's optimizers are not recorded",
    "differentiable": "no step is differentiated",
    "maximize": "losses are minimized",
}


def is_torch(name: str) -> bool:
    """Return whether a recipe's ``optimizer`` is one of torch.optim."""
    return name in NAMED or name.startswith(TORCH)


def torch_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class that a recipe names.

    Raises:
        ValueError: torch.optim has no such optimizer.
    """
    known = {
        other: value
        for other, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    own = NAMED.get(name, name.removeprefix(TORCH))
    if own not in known:
        raise ValueError(
            f"optimizer = {name!r}: torch.optim has no such optimizer; known: {', '.join(known)}"
        )
    return known[own]


def torch_arguments(
    name: str, options: Mapping[str, OptionValue], momentum: float, weight_decay: float
) -> dict[str, Any]:
    """Return the arguments of an optimizer besides parameters, rate and decay; try them.

    Args:
        name: that a recipe gives.
        options: further arguments of the constructor.
        momentum: of SGD.
        weight_decay: of matrices.

    Raises:
        ValueError: torch has no such optimizer, an argument is unknown, belongs to the recipe or is
            refused by torch, or the optimizer cannot be used.
    """
    kind = torch_class(name)
    known = inspect.signature(kind).parameters
    own = {"momentum": momentum} if name == "sgd" else {}
    for key in options:
        where = f"optimizer_options.{key}"
        if key in own or key in _OF_RECIPE:
            raise ValueError(f"{where}: the recipe has a field for it, or sets it by itself")
        if key in _REFUSED:
            raise ValueError(f"{where}: {_REFUSED[key]}; leave it out")
        if key not in known:
            usable = [k for k in known if k not in (*_OF_RECIPE, *_REFUSED, *own)]
            raise ValueError(f"{where}: {name} has no such argument; known: {', '.join(usable)}")
    if weight_decay and "weight_decay" not in known:
        raise ValueError(f"weight_decay = {weight_decay:g}: {name} has none; set it to 0")
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    } | own
    if "fused" in known and not {"fused", "foreach"} & options.keys():
        arguments["fused"] = True  # one pass for all tensors
    try:
        tensors = [nn.Parameter(torch.zeros(size)) for size in ((2, 2), (2,))]
        trial = kind(tensors, lr=1e-3, **arguments)
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        trial.step()
        kept = [value for own in trial.state.values() for value in own.values()]
        if any(not isinstance(value, Tensor | None) for value in kept):
            raise TypeError("it keeps a state that is no tensor, which no checkpoint would hold")
    except Exception as error:  # whatever torch makes of an argument
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"optimizer = {name}: cannot be used ({reason})") from None
    return arguments


class TorchOptimizer:
    """An optimizer of torch.optim that gets the combined gradient; weights stay flat.

    It waits for the device to learn whether a step is skipped, and the rate.  A parameter that
    takes no part in a step has no gradient there, so that its weights and state stay.

    Args:
        name: of the optimizer, as in a recipe.
        parameters: what is updated; matrices decay, biases and norms do not.
        factors: on the learning rate of each stage, by its name; None or empty: 1.
        arguments: of the constructor, from :func:`torch_arguments`.
        weight_decay: of matrices, as the class means it.

    Raises:
        InputError: torch refuses them.
    """

    def __init__(
        self,
        name: str,
        parameters: FlatParameters,
        factors: Mapping[str, float] | None,
        arguments: Mapping[str, Any],
        weight_decay: float,
    ) -> None:
        self.updates = torch.zeros((), device=parameters.master.device)
        self._parameters = parameters
        self._gradient = torch.zeros_like(parameters.master)
        self._tensors = {
            key: nn.Parameter(slot.view(parameters.master))
            for key, slot in parameters.slots.items()
        }
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for key, slot in parameters.slots.items():
            factor = factors[parameters.specs[key].stage.name] if factors else 1.0
            decays = slot.offset < parameters.decayed
            groups.setdefault((decays, factor), []).append(self._tensors[key])
        self._factors = [factor for _, factor in groups]
        self._kind, self._arguments = torch_class(name), dict(arguments)
        has_decay = "weight_decay" in inspect.signature(self._kind).parameters
        members: list[dict[str, Any]] = [
            {"params": own} | ({"weight_decay": weight_decay * decays} if has_decay else {})
            for (decays, _), own in groups.items()
        ]
        try:
            self._optimizer = self._kind(members, lr=1e-3, **self._arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"optimizer = {name}: {error}") from None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """No vectors: its state is kept by parameter."""
        return {}

    @property
    def state(self) -> dict[str, Tensor]:
        """The state of each parameter, by name, and which of them have one yet.

        States that are not there yet are zeros.
        """
        state, own = {}, self._optimizer.state
        for key, tensor in self._tensors.items():
            present = bool(own.get(tensor))
            state[f"{key}.present"] = torch.tensor(float(present))
            values = own[tensor] if present else self._later_state(tensor)
            for name, value in values.items():
                if isinstance(value, Tensor):
                    state[f"{key}.{name}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of the names and shapes of :attr:`state`."""
        for key, tensor in self._tensors.items():
            self._optimizer.state.pop(tensor, None)
            if not state[f"{key}.present"].item():
                continue
            template = self._later_state(tensor)
            self._optimizer.state[tensor] = {
                name: value.copy_(state[f"{key}.{name}"].view(value.shape))
                if isinstance(value, Tensor)
                else value
                for name, value in template.items()
            }

    def _later_state(self, tensor: nn.Parameter) -> dict[str, Any]:
        """Return zeros in the place of the state that a parameter has after its first step."""
        copy = nn.Parameter(torch.zeros_like(tensor))
        copy.grad = torch.zeros_like(copy)
        trial = self._kind([copy], lr=1e-3, **self._arguments)
        trial.step()
        state: dict[str, Any] = trial.state[copy]
        return {
            name: torch.zeros_like(value) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def step(
        self,
        weights: Tensor,
        segments: Sequence[Segment],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update weights and state, as :meth:`.AdamW.step` does."""
        if skip:
            return
        flat = self._parameters
        for group, columns in segments:
            kernels.combine(flat.rows[:, columns], weights[group], self._gradient[columns])
        self._gradient *= scale
        starts = [segment.columns.start for segment in segments]
        for key, slot in flat.slots.items():
            place = bisect_right(starts, slot.offset) - 1
            takes_part = place >= 0 and slot.offset < segments[place].columns.stop
            self._tensors[key].grad = slot.view(self._gradient) if takes_part else None
        peak = float(lr)
        for param_group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            param_group["lr"] = peak * factor
        self._optimizer.step()
        self.updates += 1
        flat.refresh_compute()
