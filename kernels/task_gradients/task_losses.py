"""The losses of a step, one for each task, by position or by name."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NoReturn

from torch import Tensor

Loss = Tensor | float | None
"""A scalar; None or a constant where the task has no loss in this step."""

Losses = Iterable[Loss] | Mapping[str, Loss]
"""A loss for each task, in the tasks' order or by name."""


class TaskNames:
    """The names of the tasks, by which losses are put into their order.

    Args:
        names: of all tasks; those of the first mapping when None.

    Raises:
        ValueError: a name twice, or none.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = None if names is None else tuple(names)
        if self.names is not None and len(set(self.names)) != max(len(self.names), 1):
            raise ValueError(f"tasks: expected names, each once, got {list(self.names)}")

    def sort(self, losses: Losses, may_lack_all: bool = False) -> list[Tensor | None]:
        """Return one loss for each task; None for a task without one that has a gradient.

        Args:
            losses: by position or by name.
            may_lack_all: whether no task may have a loss, as other ranks have some.

        Raises:
            ValueError: none has a gradient, one is not a scalar, or the tasks are others.
        """
        names = self.names
        if isinstance(losses, Mapping):
            names = tuple(losses) if names is None else names
            unknown = [name for name in losses if name not in names]
            if unknown:
                raise ValueError(
                    f"losses: task {unknown[0]!r} is none of {list(names)}, which were given first;"
                    " name all tasks with tasks=[…] where the optimizer is wrapped"
                )
            losses = [losses.get(name) for name in names]
        losses = _in_order(losses)
        if names is not None and len(losses) != len(names):
            raise ValueError(f"losses: expected {len(names)}, for {list(names)}, got {len(losses)}")
        by_task = [_with_gradient(number, loss) for number, loss in enumerate(losses)]
        if not by_task:
            raise ValueError("losses must be one or more scalars, one for each task")
        if all(loss is None for loss in by_task) and not may_lack_all:
            self.refuse_no_gradient()
        self.names = names
        return by_task

    def refuse_no_gradient(self) -> NoReturn:
        """Refuse losses of which none has a gradient.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "losses: none has a gradient; expected a task at least whose loss depends on "
            "parameters, computed outside torch.no_grad()"
        )


def _in_order(losses: Iterable[Loss]) -> list[Loss]:
    is_scalar = isinstance(losses, Tensor) and losses.dim() == 0
    if is_scalar or isinstance(losses, Set) or not isinstance(losses, Iterable):
        raise ValueError(
            "losses: expected one for each task, [loss_a, loss_b] or by name, got "
            + ("a single tensor" if is_scalar else f"a {type(losses).__name__}")
        )
    return list(losses)


def _with_gradient(number: int, loss: Loss) -> Tensor | None:
    if loss is None or isinstance(loss, int | float):
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "losses must be one or more scalars, one for each task; "
            f"number {number} is {got}, counted from 0"
        )
    return loss if loss.requires_grad else None
