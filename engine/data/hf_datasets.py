"""Load a data set with the library ``datasets``: plain formats only, and its own files only.

A data set's ``README.md`` names its files, which may be anywhere, and the endings of its files
choose their readers, some of which unpickle.  Both are checked before a file is read.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from os.path import abspath, basename, isdir
from typing import Any, NamedTuple

from ..utils.errors import InputError, first_line
from .task_schema import TaskSchema

_WITHOUT_PICKLES = (5, 2)
"""The version of the library since which no data set is read from pickles of pandas."""

_PLAIN = ("arrow", "cache", "csv", "json", "parquet", "text")
"""Builders that may read a data set (``cache``: of one read before).  Others load tensors by
``torch.load``, open archives, or open files that columns name."""


_LISTS = ("List", "LargeList")


class Stream(NamedTuple):
    """A split that is read from its files as it is asked for, and kept nowhere.

    Attributes:
        data: a ``datasets.IterableDataset`` of Arrow tables, in the order of its files.
        features: the kinds of its columns; None where it has no row.
        shards: the names of what it can be divided into, files as a rule, for error messages.
        digest: a hash of all that decides its rows.
        promised: how many rows its README.md says there are; 0 where it does not say.
    """

    data: Any
    features: Any
    shards: tuple[str, ...]
    digest: str
    promised: int


def load_split(name: str, subset: str, split: str) -> Any:
    """Return a split of a data set, a ``datasets.Dataset``.

    Args:
        name: of the hub, or a folder.
        subset: the configuration, or empty.
        split: its name, or a slice.

    Raises:
        InputError: the library is missing or too old, cannot load it, or would read it by other
            means or from another place than the data set's own.
    """
    with _explained(name, split):
        builder = _checked_builder(name, subset)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def records_of(data: Any, name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, a ``datasets.Dataset``.

    Args:
        data: its wanted columns.
        name: as of :func:`load_split`, as is that below.
        split: likewise.

    Raises:
        InputError: the library's files of it cannot be read.
    """
    with _explained(name, split):
        yield from data


def open_stream(name: str, subset: str, split: str) -> Stream:
    """Open a split of a data set to read it from its files, without a copy on the disk.

    Args:
        name: as of :func:`load_split`, as are those below.
        subset: likewise.
        split: its name, or those of several with + between them.

    Raises:
        InputError: as of :func:`load_split`.
    """
    with _explained(name, split):
        builder = _checked_builder(name, subset)
        data = builder.as_streaming_dataset(split=split).with_format("arrow")
        features = data.features
        if features is None and (first := next(iter(data.iter(1)), None)) is not None:
            features = _of_schema(first.schema)
        files = builder.config.data_files or {}
        own = [basename(str(file)) for file in files.get(split, ())]
        if len(own) != data.num_shards:
            own = [f"shard {number}" for number in range(data.num_shards)]
        known = {
            str(key): (list(map(str, value)), repr(value.origin_metadata))
            for key, value in files.items()
        }
        said = (builder.config_id, builder.hash, known, split, repr(features))
        digest = hashlib.sha256(repr(said).encode()).hexdigest()
        return Stream(data, features, tuple(own), digest, _promised(builder, name, split))


def _promised(builder: Any, name: str, split: str) -> int:
    """Return how many rows README.md says that a split has; 0 where it does not say.

    Raises:
        InputError: it says no number.
    """
    promised = (builder.info.splits or {}).get(split)
    rows = getattr(promised, "num_examples", None) or 0
    if not isinstance(rows, int) or rows < 0:
        raise InputError(
            f"dataset {name}: its README.md says that split {split} has {rows!r} rows; correct "
            "num_examples there, or leave it out"
        )
    return rows


def _of_schema(schema: Any) -> Any:
    from datasets import Features

    return Features.from_arrow_schema(schema)


def spelling(features: Any, form: TaskSchema) -> Callable[[Any], Any]:
    """Return what spells the labels of records.

    Class labels are stored as numbers; where a task knows names, so does the data set.

    Args:
        features: the kinds of the columns.
        form: the schema of the task.
    """
    feature = (features or {}).get(form.label) if form.classes else None
    feature = getattr(feature, "feature", feature)  # of the items of a list
    named = feature if hasattr(feature, "int2str") else None

    def spelled(value: Any) -> Any:
        if isinstance(value, list):
            return [spelled(item) for item in value]
        if named is None or not isinstance(value, int):
            return value
        # -1 stands for a label that is held back; it spells no class.
        return named.int2str(value) if value >= 0 else str(value)

    return spelled


@contextmanager
def _explained(name: str, split: str) -> Iterator[None]:
    """Turn whatever the library and its loaders raise into one line.

    Raises:
        InputError: in place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        looked = (
            ""
            if isdir(name)
            else (
                "taken for a name of the hub, since no folder of that name is in the working "
                "folder, in --data or beside the recipe: "
            )
        )
        raise InputError(
            f"dataset {name}: cannot load split {split} ({reason_of(error)}); {looked}"
            "check dataset, subset and splits"
        ) from error


def reason_of(error: Exception) -> str:
    """Return the first line of what an exception says, in which columns are not listed."""
    if "because column names don't match" in str(error):
        return "other columns than in the files before"
    return first_line(error)


def _checked_builder(name: str, subset: str) -> Any:
    """Return what reads a data set, once it is known to read plain files of its own."""
    try:
        from datasets import load_dataset_builder

        version = metadata.version("datasets")
    except ImportError:
        raise InputError(
            f"dataset {name}: needs the library datasets (pip install datasets)"
        ) from None
    if tuple(map(int, version.split(".")[:2])) < _WITHOUT_PICKLES:
        raise InputError(
            f"dataset {name}: datasets {version} loads pickles, which run code; "
            "pip install --upgrade datasets"
        )
    # Such a reader looks through the whole working directory before it can be asked.
    if name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}") is not None:
        raise _no_data_set(name)
    # What these say of a file that cannot be read is raised, too.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    builder = load_dataset_builder(name, subset or None)
    _check_reader(name, builder)
    _check_files(name, builder)
    return builder


def check_columns(
    features: Any,
    columns: tuple[str, ...],
    where: str,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> None:
    """Refuse columns whose values the library opens files for, such as images.

    Args:
        features: the kinds of the columns of a data set.
        columns: of it, to be read.
        where: it comes from, for error messages.
        lists: columns that may hold lists of text or numbers.
        objects: columns that may hold objects of such lists, or lists of objects.

    Raises:
        InputError: one holds neither text nor numbers.
    """
    for name in columns:
        feature = features[name]
        if name in lists and type(feature).__name__ in _LISTS:
            feature = feature.feature
        kinds = _kinds(feature) if name in objects else {type(feature).__name__}
        for kind in kinds - {"Value", "ClassLabel"}:
            raise InputError(
                f"column {name!r} holds neither text nor numbers but {kind}, {where}; "
                "name another column"
            )


def _kinds(feature: Any) -> set[str]:
    """Return the kinds of the values within objects and lists."""
    if isinstance(feature, dict):
        return set().union(*map(_kinds, feature.values()))
    if type(feature).__name__ in _LISTS:
        return _kinds(feature.feature)
    return {type(feature).__name__}


def _check_reader(name: str, builder: Any) -> None:
    reader = type(builder).__module__.split(".")
    if reader[:2] != ["datasets", "packaged_modules"] or reader[2] not in _PLAIN:
        raise InputError(
            f"dataset {name}: would be read as {reader[-1]}; only {', '.join(_PLAIN)} are read: "
            "convert it, to Parquet for one"
        )


def _check_files(name: str, builder: Any) -> None:
    if isdir(name):
        own = abspath(name) + os.sep
    elif builder.repo_id:
        own = f"hf://datasets/{builder.repo_id}@"
    else:
        raise _no_data_set(name)
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            place = file if "://" in file else abspath(file)
            if not place.startswith(own) or ".." in file.removeprefix(own).split("/"):
                raise InputError(
                    f"dataset {name}: its README.md names {file}, which is not a file of its own; "
                    "correct data_files there"
                )


def _no_data_set(name: str) -> InputError:
    return InputError(
        f"dataset {name}: no data set but a format; give a folder (./{name}) or a hub name"
    )
