"""Look for the data of a recipe's file beside it, so that it can be used from any folder."""

import glob
from collections.abc import Iterator, Mapping
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

from ..data.addresses import is_address
from ..data.task_schema import FORMATS


def with_places(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields of a recipe with the folders of its data.

    Without ``data`` its relative files are looked for in the folder of the recipe, if one is there
    and no task needs the built-in files.  A ``dataset`` that no folder is called like as seen from
    the working folder is looked for in ``data``, then in the folder of the recipe; a name that
    neither has is one of the hub.

    Args:
        fields: of a file, as parsed, overrides included; maybe not valid.
        folder: of the file.
    """
    data = fields.get("data", "")
    if data == "" and _has_files_in(fields, folder):
        data = str(folder.absolute())
    if not isinstance(data, str):
        return dict(fields)
    places = [Path(data), folder] if data else [folder]
    tasks = fields.get("tasks")
    if isinstance(tasks, dict):
        tasks = {name: _with_dataset(task, places) for name, task in tasks.items()}
    changed = {"data": data, "tasks": tasks}
    return {**fields, **{name: value for name, value in changed.items() if value}}


def _with_dataset(task: Any, places: list[Path]) -> Any:
    """Return a task whose data set is named by its folder, where that is in one of some places."""
    name = _table(_table(task).get("source")).get("dataset")
    if not isinstance(name, str) or not name or Path(name).is_absolute() or isdir(name):
        return task
    for place in places:
        if isdir(place / name):
            dataset = str((place / name).absolute())
            return {**task, "source": {**task["source"], "dataset": dataset}}
    return task


def _has_files_in(fields: Mapping[str, Any], folder: Path) -> bool:
    """Return whether one of the files is in a folder, and no task has the built-in ones."""
    tasks = _table(fields.get("tasks"))
    if any("source" not in _table(task) for task in tasks.values()):
        return False
    objectives = _table(fields.get("objectives")).values()
    for objective in objectives:
        names = _table(objective).get("sentences_of", ())
        if isinstance(names, list) and any(n in FORMATS and n not in tasks for n in names):
            return False
    files = [_table(_table(task).get("source")).get("files") for task in tasks.values()]
    files += [_table(objective).get("files") for objective in objectives]
    return any(_is_in(folder, name) for name in _texts(files))


def _is_in(folder: Path, name: str) -> bool:
    if not name or "\0" in name or Path(name).is_absolute() or is_address(name):
        return False
    is_pattern = glob.has_magic(name)
    return lexists(folder / name) or (
        is_pattern and next(glob.iglob(name, root_dir=folder, recursive=True), None) is not None
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts within tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
