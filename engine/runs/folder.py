"""The folder that a run is written into: free, or this run's own, and held while it is trained."""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path

from ..distributed.ranks import Ranks
from ..utils.errors import InputError
from ..utils.files import explained, is_partial, remove_partial_files
from .lock import LOCK, held

OUTPUT = "output.log"
"""Holds what the run printed, where several runs of a series are trained at once."""

_BEFORE_RECIPE = re.compile(
    rf"{re.escape(OUTPUT)}|tokenizer(_config)?\.json|vocab\.txt|config\.json|recipe\.toml"
)
"""Files that a run writes first, the recipe last."""

_FILES = re.compile(
    rf"{_BEFORE_RECIPE.pattern}|metrics\.jsonl?|evaluations\.jsonl|skipped-\d+(-rank-\d+)?\.json"
    r"|stream-[\w-]+-rank-\d+\.json"
)


@contextmanager
def claimed(
    folder: Path, ranks: Ranks | None = None, *, resumes: bool = False, wait: float = 0.0
) -> Iterator[None]:
    """Within the block this run alone writes into its folder, which is made if missing.

    Args:
        folder: of the run.
        ranks: the processes that train it.
        resumes: whether it may hold a run, or the beginning of one.
        wait: seconds for which to wait for the process that trains it.

    Raises:
        InputError: another process trains it, or it holds something else.
    """
    ranks = ranks or Ranks()
    check_folder(folder, resumes=resumes)
    with held(folder, ranks, wait):
        if ranks.is_main:
            remove_partial_files(folder, _FILES)
        yield


def check_folder(folder: Path, *, resumes: bool) -> None:
    """Check that a folder is free or, where a run is resumed, holds that or its beginning.

    Raises:
        InputError: it holds something else, or cannot be looked into.
    """
    if resumes and isfile(folder / "recipe.toml"):
        return
    with explained("look into", folder):
        found = _names(folder)
    if resumes and LOCK in found:
        found = [name for name in found if not _is_of_beginning(name)]
    if not set(found) <= {LOCK}:
        if resumes:
            raise InputError(
                f"--resume: --out {folder} holds no run (no recipe.toml) but something else; give "
                "the folder of a run, or a new one"
            )
        holds = "a run" if (folder / "recipe.toml").exists() else "something"
        hint = " or pass --resume to go on with it" if holds == "a run" else ""
        raise InputError(f"--out {folder}: holds {holds} already; give another folder{hint}")


def _names(folder: Path) -> list[str]:
    """List a folder in one call: another rank may make it at this very moment.

    Raises:
        InputError: no folder can be called so.
    """
    try:
        return os.listdir(folder)
    except ValueError as error:  # a NUL character
        raise InputError(f"--out {str(folder)!a}: {error}; give another folder") from None
    except FileNotFoundError:
        return []
    except NotADirectoryError:  # a file, or below one
        return [""] if folder.exists() else []


def _is_of_beginning(name: str) -> bool:
    return _BEFORE_RECIPE.fullmatch(name) is not None or is_partial(name, _BEFORE_RECIPE)


def free_folders(parent: Path, recipe: str) -> Iterator[Path]:
    """Yield those of ``parent/NAME-1``, ``parent/NAME-2``, … that do not exist."""
    name = Path(recipe).stem
    for number in itertools.count(1):
        folder = parent / f"{name}-{number}"
        if not os.path.lexists(folder):
            yield folder
