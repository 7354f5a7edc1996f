"""The texts that a recipe trains on: those of its tasks, and those of its objectives."""

from collections.abc import Iterator
from os.path import exists  # unlike pathlib's it raises nothing
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..data.cache import load_vocabulary
from ..data.raw_text import Found, each_line, evenly, lines_of, sentences_of
from ..data.rows import lines_on
from ..data.source import DataFile, HubSplit
from ..data.table import Table, TableReader
from ..data.tokenizer import Tokenizer
from ..utils.untrusted_io import read_bytes
from .data_paths import data_folder, origin


def training_table(recipe: Recipe, task: str) -> Table:
    """Return the training examples of a task of the recipe, or of a built-in one, as text."""
    form = recipe.split_schema(task, "train")
    return origin(recipe, task, "train").table(form, labelled=True, on_bad_row=recipe.on_bad_row)


def objective_texts(recipe: Recipe, name: str) -> tuple[list[str], Found]:
    """Return the texts of an objective, cut as the recipe says, and where they come from.

    Raises:
        InputError: a file of them cannot be read.
    """
    settings = recipe.objectives[name]
    texts, sizes, notes = list[str](), list[int](), list[str]()
    for task in _tasks_of(recipe, name):
        table = training_table(recipe, task)
        texts += sentences_of(table, task, settings.max_per_source, recipe.seed)
        sizes.append(len(table))
        said = lines_on(origin(recipe, task, "train").name, table.notes)
        notes += [f"{task}: {line}" for line in said]
        skipped = table.bad_rows.items()
        notes += [f"{name}: {count} rows of {task} skipped ({why})" for why, count in skipped]
    for path in _files_of(recipe, name):
        lines = lines_of(path)
        texts += lines.texts[: settings.max_per_source or None]
        sizes.append(len(lines.texts))
        notes += [f"{name}: {line}" for line in lines_on(path.name, lines.notes)]
    found = Found(max(sizes), len(texts), tuple(notes))
    return evenly(texts, settings.max_texts), found


def learn_vocabulary(recipe: Recipe) -> Tokenizer:
    """Return the vocabulary of what a recipe trains on, from the cache where it was learnt before.

    Raises:
        InputError: a file of the texts cannot be read.
    """
    tasks, files = _vocabulary_sources(recipe)
    made_from = [str(recipe.encoder.vocab_size), recipe.on_bad_row]
    for task in tasks:
        form = recipe.split_schema(task, "train")
        made_from += [repr(form), origin(recipe, task, "train").digest()]
    made_from += [DataFile(file).digest() for file in files]

    def learn() -> Tokenizer:
        return Tokenizer.train(VocabularyTexts(recipe), recipe.encoder.vocab_size)

    names = [*tasks, *(file.name for file in files)]
    return load_vocabulary(made_from, f"vocabulary of {', '.join(names)}", learn)


class VocabularyTexts:
    """The texts that a vocabulary is learnt from: whatever some phase trains on, uncut.

    Each task and each file counts once.  They are read anew whenever they are gone through.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        recipe = self._recipe
        tasks, files = _vocabulary_sources(recipe)
        for task in tasks:
            form, found = recipe.split_schema(task, "train"), origin(recipe, task, "train")
            how: dict[str, Any] = {"labelled": True, "on_bad_row": recipe.on_bad_row}
            with found.rows(form, labelled=True) as rows:
                for table in TableReader(rows, found.where, form, **how):
                    for column in table.sentences:
                        yield from column
        for file in files:
            yield from each_line(file, [])


def _vocabulary_sources(recipe: Recipe) -> tuple[list[str], list[Path]]:
    """Return the tasks and the files whose texts decide a vocabulary."""
    tasks, files = dict[str, None](), dict[Path, None]()
    for name in recipe.trained:
        if name in recipe.tasks:
            tasks[name] = None
    for name in recipe.trained:
        if name in recipe.objectives:
            tasks |= dict.fromkeys(_tasks_of(recipe, name))
            files |= dict.fromkeys(_files_of(recipe, name))
    return list(tasks), list(files)


def check_texts(recipe: Recipe) -> None:
    """Look for the data of all phases, so that none is missed when its turn has come.

    Raises:
        InputError: the recipe does not name a split that it needs, or a file is not there.
    """
    for phase in recipe.in_phases.values():
        wanted: list[tuple[str, str]] = []
        for name in phase.train:
            tasks = _tasks_of(recipe, name) if name in recipe.objectives else (name,)
            wanted += [(task, "train") for task in tasks]
            for file in _files_of(recipe, name) if name in recipe.objectives else ():
                _check_file(file)
        wanted += [(task, "dev") for task in recipe.tasks if phase.scored]
        for task, split in wanted:
            found = origin(recipe, task, split)
            for one in () if isinstance(found, HubSplit) else found.files:
                if one.is_missing:
                    one.digest()  # which says what is wrong


def _check_file(path: Path) -> None:
    if not exists(path):
        read_bytes(path, None)  # which says what is wrong


def _tasks_of(recipe: Recipe, objective: str) -> tuple[str, ...]:
    """Return the tasks whose training sentences an objective reads."""
    settings = recipe.objectives[objective]
    return settings.sentences_of or (() if settings.files else tuple(recipe.tasks))


def _files_of(recipe: Recipe, objective: str) -> tuple[Path, ...]:
    files = recipe.objectives[objective].files
    return tuple(data_folder(recipe) / file for file in files)
