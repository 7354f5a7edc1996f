"""Send metrics to TensorBoard and Weights & Biases, besides the run's own files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..utils.errors import InputError

LOGGERS = ("tensorboard", "wandb", "wandb_offline")


class Logger(Protocol):
    """Interface of a logger that takes nested dictionaries of numbers."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record values of a step; steps never go back."""

    def close(self) -> None:
        """Write what is waiting."""


class TensorBoard:
    """Event files in ``tensorboard`` of the run's folder."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of later steps, left by a run that was cut off, are hidden.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=start)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record values of a step."""
        for name, value in flat(values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run of the project ``superbert``; offline it stays in ``wandb`` of the run's folder."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], *, offline: bool) -> None:
        import wandb

        with _wandb_explained():
            self._run = wandb.init(
                project="superbert",
                name=folder.name,
                dir=folder,
                config=dict(recipe),
                mode="offline" if offline else "online",
            )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record values of a step."""
        self._run.log(dict(flat(values)), step=step)

    def close(self) -> None:
        """Write or send what is waiting."""
        self._run.finish()


def check_loggers(names: Sequence[str]) -> None:
    """Check that what the loggers need is installed, and that W&B lets one in.

    Raises:
        InputError: it is not, or does not.
    """
    for name in names:
        library = name.removesuffix("_offline")
        if find_spec(library) is None:
            raise InputError(f"loggers: {name} needs the package {library} (pip install {library})")
    if "wandb" in names:
        import wandb

        with _wandb_explained():
            wandb.login()


@contextmanager
def _wandb_explained() -> Iterator[None]:
    """Turn what W&B raises, for want of a key or of a network, into an input error."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValueError) as error:
        raise InputError(f"loggers: wandb: {error}; or set loggers=['wandb_offline']") from None


def open_loggers(
    names: Sequence[str], folder: Path, recipe: Mapping[str, Any], start: int
) -> list[Logger]:
    """Open the loggers that a recipe names.

    Args:
        names: out of :data:`LOGGERS`.
        folder: the run's.
        recipe: all settings, for loggers that keep them.
        start: the first step that will come.
    """
    return [
        TensorBoard(folder, start)
        if name == "tensorboard"
        else WeightsAndBiases(folder, recipe, offline=name == "wandb_offline")
        for name in names
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of nested dictionaries under names joined by ``/``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", value
