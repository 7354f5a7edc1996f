"""Load a data set with the library ``datasets``: plain formats only, and its own files only.

A data set's ``README.md`` names its files, which may be anywhere, and the endings of its files
choose their readers, some of which unpickle.  Both are checked before a file is read.
"""

import os
from collections.abc import Collection
from importlib import metadata
from importlib.util import find_spec
from os.path import abspath, isdir
from typing import Any

from ..utils.errors import InputError

_WITHOUT_PICKLES = (5, 2)
"""The version of the library since which no data set is read from pickles of pandas."""

_PLAIN = ("arrow", "cache", "csv", "json", "parquet", "text")
"""Builders that may read a data set (``cache``: of one read before).  Others load tensors by
``torch.load``, open archives, or open files that columns name."""


_LISTS = ("List", "LargeList")


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
    try:
        builder = load_dataset_builder(name, subset or None)
        _check_reader(name, builder)
        _check_files(name, builder)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its loaders do
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(
            f"dataset {name}: cannot load split {split} ({reason}); "
            "check dataset, subset and splits"
        ) from error


def check_columns(
    data: Any,
    columns: tuple[str, ...],
    where: str,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> None:
    """Refuse columns whose values the library opens files for, such as images.

    Args:
        data: a ``datasets.Dataset``.
        columns: of it, to be read.
        where: it comes from, for error messages.
        lists: columns that may hold lists of text or numbers.
        objects: columns that may hold objects of such lists, or lists of objects.

    Raises:
        InputError: one holds neither text nor numbers.
    """
    for name in columns:
        feature = data.features[name]
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
