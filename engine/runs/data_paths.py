"""Resolve the data paths of a recipe."""

import hashlib
from collections.abc import Iterable
from os.path import isdir
from pathlib import Path

from ..config.recipe import Recipe
from ..data import demo
from ..data.addresses import is_address
from ..data.cache import default_cache
from ..data.origins import DataFile, Origin
from ..data.task_schema import FORMATS, SPLITS
from ..utils.errors import InputError
from ..utils.files import explained, whole_folder
from ..utils.ownership import check_private_place, is_own_folder


def splits_of(recipe: Recipe, task: str) -> tuple[str, ...]:
    """Return the names of the splits that a task of the recipe has."""
    source = recipe.tasks[task].source
    return tuple(SPLITS if source is None else source.known_splits)


def check_split(recipe: Recipe, split: str, tasks: Iterable[str] = ()) -> None:
    """Check that tasks have a split that a command was given.

    Args:
        recipe: of the run.
        split: the split's name.
        tasks: of the recipe; empty for all.

    Raises:
        InputError: one has not; the message says which have it.
    """
    known = {task: splits_of(recipe, task) for task in tasks or recipe.tasks}
    having = [task for task, names in known.items() if split in names]
    lacking = [task for task in known if task not in having]
    if lacking and having:
        raise InputError(
            f"--split {split}: no {split} split of {', '.join(lacking)}; name a task that has one "
            f"by --task: {', '.join(having)}"
        )
    if lacking:
        there = ", ".join(dict.fromkeys(name for names in known.values() for name in names))
        raise InputError(f"--split {split}: no {split} split; {', '.join(lacking)} has {there}")


def origin(recipe: Recipe, task: str, split: str) -> Origin:
    """Return where a split of a task comes from.

    Raises:
        InputError: the recipe names no data for it.
    """
    source = recipe.tasks[task].source if task in recipe.tasks else None
    if source is None:
        return DataFile(FORMATS[task].file(data_folder(recipe), split))
    return source.origin(task, split, data_folder(recipe) if recipe.data else None)


def data_folder(recipe: Recipe) -> Path:
    """Return the folder of the data set: the recipe's, or that of the demo corpus.

    Raises:
        InputError: the recipe names none that exists.
    """
    if not recipe.data:
        return _demo_folder()
    folder = Path(recipe.data)
    if not isdir(folder):
        raise InputError(f"--data {folder}: no such folder; give the folder of the data files")
    return folder


def reads_data_folder(recipe: Recipe) -> bool:
    """Return whether some file is looked for there: of a built-in task, or by a relative name."""
    files: list[str] = []
    for task in recipe.tasks.values():
        if task.source is None:
            return True
        files += task.source.file_names
    for objective in recipe.objectives.values():
        if not recipe.tasks.keys() >= set(objective.sentences_of):
            return True
        files += objective.files
    return not all(Path(file).is_absolute() or is_address(file) for file in files)


def _demo_folder() -> Path:
    """Return the folder of the demo corpus, written once for each version of its grammar."""
    version = hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()[:12]
    folder = default_cache() / f"demo-{version}"
    check_private_place(folder.parent)
    if not folder.exists():
        with explained("write", folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with whole_folder(folder) as partial:
                demo.write_demo(partial)
                partial.chmod(0o700)
                for path in partial.iterdir():
                    path.chmod(0o600)
        except InputError:
            if not folder.is_dir():  # where another process was faster, that is as good
                raise
    if not is_own_folder(folder):
        raise InputError(
            f"the demo corpus is not read from {folder}: it belongs to others, or others can "
            "write it; remove it, or set SUPERBERT_CACHE to a folder of your own"
        )
    return folder
