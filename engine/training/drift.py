"""End a run whose ranks do not compute with the same weights or random state."""

from ..distributed.rank_check import Mismatch
from ..utils.errors import DriftError, InputError
from .divergence import kept_checkpoints
from .trainer import Trainer


def check_ranks_at_start(trainer: Trainer) -> None:
    """Compare what ranks begin with, before they exchange anything; all ranks must call.

    Raises:
        InputError: they begin with different weights or settings.
    """
    trainer.rank_check.add(0, now=True)
    found = trainer.rank_check.mismatch()
    if found is not None:
        raise InputError(
            f"{_spelt(trainer, found)} before training; give all ranks the same recipe, options "
            "and --init"
        )


def check_ranks(trainer: Trainer) -> None:
    """Compare the checksums that were taken since the last call; all ranks must call.

    Raises:
        DriftError: ranks differ after a step.
    """
    found = trainer.rank_check.mismatch()
    if found is not None:
        raise DriftError(
            f"{_spelt(trainer, found)} after step {found.steps_done}: a machine is faulty, or the "
            f"machines differ; {kept_checkpoints(trainer)}"
        )


def _spelt(trainer: Trainer, found: Mismatch) -> str:
    ranks, names = trainer.ranks, ", ".join(found.names)
    return f"rank {ranks.rank} of {ranks.size}: {found.between} in {names}"
