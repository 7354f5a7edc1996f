"""Remove the checkpoints of finished runs, which are most of what a series writes."""

from pathlib import Path

from ..checkpoints.store import KINDS, Checkpoints
from ..utils.files import explained, write_text
from .folder import claimed

MARK = "pruned.txt"
"""Says in ``checkpoints/`` that they were removed, so that nothing trains the run again there."""

PRUNED = "engine.sweep --prune removed its checkpoints when it was done"


def prune(folder: Path) -> None:
    """Remove the checkpoints of a run that is done; its recipe, metrics and scores stay.

    A link is left as it is, since what it names may belong to another run.

    Raises:
        InputError: another process trains the run, or the mark cannot be written.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    if folder.is_symlink() or checkpoints.folder.is_symlink():
        return
    if not any(map(checkpoints.all, KINDS)):
        return
    with claimed(folder, resumes=True), explained("remove", checkpoints.folder):
        write_text(
            checkpoints.folder / MARK, PRUNED + "\n"
        )  # first: half of them are no run to go on with
        for kind in KINDS:
            checkpoints.keep(kind, 0)
        checkpoints.sweep()


def has_scores_alone(folder: Path) -> bool:
    """Return whether a run was pruned to the end, so that its scores are all that is left."""
    return is_pruned(folder) and not Checkpoints(folder / "checkpoints").all("step")


def is_pruned(folder: Path) -> bool:
    """Return whether the checkpoints of a run were removed."""
    return (folder / "checkpoints" / MARK).is_file()
