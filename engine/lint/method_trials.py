"""Find out what a balancing method reads and returns, by trying it."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..gradients.balancing import BalancerInput, BalanceSettings, Method, TrainedTasks, build_method

_TRIALS = 3
"""Calls after which a method's weights without conflict are known."""
_SOON = {"dwa_window": 1}
"""Settings by which a method that waits for its losses gets to weights of its own within them."""

_SEED = torch.tensor(0)


def settings_read(balance: str, tasks: Sequence[str], settings: BalanceSettings) -> set[str]:
    """Return the fields of ``settings`` that a method reads.

    Args:
        balance: the method's name.
        tasks: the trained tasks.
        settings: of the methods.

    Raises:
        InputError: the method does not fit the tasks.
    """
    reads = _Reads(settings)
    _Trial(balance, tasks, cast(BalanceSettings, reads)).weights(torch.ones(len(tasks)))
    return reads.names


def sums_what_is_separate(balance: str, tasks: Sequence[str], settings: BalanceSettings) -> bool:
    """Return whether a method gives the sum of task gradients that share no parameter.

    Their Gram matrix is diagonal; the weights then have to be 1 whatever their lengths and losses.

    Args:
        balance: the method's name.
        tasks: the trained tasks.
        settings: of the methods.

    Raises:
        InputError: the method does not fit the tasks.
    """
    trial = _Trial(balance, tasks, settings.model_copy(update=_SOON))
    lengths = torch.arange(1.0, len(tasks) + 1)
    return all(bool((trial.weights(lengths**power) == 1).all()) for power in range(_TRIALS))


class _Trial:
    """A method that is called with diagonal Gram matrices, one step after the other."""

    def __init__(self, balance: str, tasks: Sequence[str], settings: BalanceSettings) -> None:
        known = TrainedTasks(tuple(tasks), (1,) * len(tasks))
        self._method: Method = build_method(balance, known, settings)
        self._state = self._method.initial_state
        self._order = torch.arange(len(tasks)).expand(len(tasks), len(tasks)).contiguous()

    def weights(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the weights ``[K]`` of gradients of squared ``lengths``, losses the same."""
        inputs = BalancerInput(torch.diag(lengths), self._order, lengths, self._state, _SEED)
        output = self._method.decide(inputs)
        self._state = output.state
        return output.weights


class _Reads:
    """Settings that note which of them are read."""

    def __init__(self, settings: BalanceSettings) -> None:
        self._settings = settings
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._settings, name)
