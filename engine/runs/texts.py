"""The texts that a recipe trains on: those of its tasks, and those of its objectives."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import exists  # unlike pathlib's it raises nothing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config.recipe import Recipe
from ..data.cache import load_vocabulary
from ..data.hub_stream import HubStream
from ..data.raw_text import each_line, evenly
from ..data.rows import lines_on
from ..data.sampler import stratified_subset
from ..data.source import DataFile, HubSplit
from ..data.table import TableReader, strata
from ..data.tokenizer import Tokenizer
from ..utils.untrusted_io import read_bytes
from .data_paths import data_folder, origin


class ObjectiveTexts:
    """The texts of an objective, cut as the recipe says, read anew whenever they are gone through.

    Args:
        recipe: that has it.
        name: of the objective.

    Attributes:
        largest: examples of the largest task, or lines of the largest file; known, as is what is
            below, once the texts were gone through.
        found: texts of all tasks and files, each cut to the objective's ``max_per_source``.
        notes: warnings about the files, a line each.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._recipe, self._name = recipe, name
        self._settings = recipe.objectives[name]
        self.largest = self.found = 0
        self.notes: list[str] = []

    @property
    def made_from(self) -> list[str]:
        """All that decides the texts."""
        recipe, settings = self._recipe, self._settings
        limits = (settings.max_per_source, settings.max_texts, recipe.seed, recipe.on_bad_row)
        made_from = list(map(str, limits))
        for task in _tasks_of(recipe, self._name):
            form = recipe.split_schema(task, "train")
            made_from += [task, repr(form), origin(recipe, task, "train").digest()]
        return made_from + [DataFile(file).digest() for file in _files_of(recipe, self._name)]

    @property
    def names(self) -> str:
        """The names of what the texts are from."""
        files = [file.name for file in _files_of(self._recipe, self._name)]
        return ", ".join([*_tasks_of(self._recipe, self._name), *files])

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        most = self._settings.max_texts
        count = sum(1 for _ in self._all()) if most else 0
        if not 0 < most < count:
            return self._all()
        kept = set(evenly(range(count), most))
        return (text for number, text in enumerate(self._all()) if number in kept)

    def _all(self) -> Iterator[str]:
        """Yield the texts of all sources."""
        self.largest, self.found, self.notes = 0, 0, []
        for task in _tasks_of(self._recipe, self._name):
            yield from self._counted(self._of_task(task))
        limit = self._settings.max_per_source
        for path in _files_of(self._recipe, self._name):
            notes, lines = list[str](), 0
            for lines, text in enumerate(each_line(path, notes), start=1):
                if not limit or lines <= limit:
                    self.found += 1
                    yield text
            self.largest = max(self.largest, lines)
            self.notes += [f"{self._name}: {line}" for line in lines_on(path.name, tuple(notes))]

    def _counted(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.found += 1
            yield text

    def _of_task(self, task: str) -> Iterator[str]:
        """Yield the sentences of a task's examples; those of a pair follow one another."""
        recipe, limit = self._recipe, self._settings.max_per_source
        with _tables(recipe, task) as tables:
            labels, rows = list[npt.NDArray[np.float32]](), 0
            if limit:
                for table in tables:
                    assert table.labels is not None, "read with labels"
                    labels.append(table.labels)
                    rows += len(table)
        chosen = None
        if limit:
            every = strata(np.concatenate(labels), rows)
            chosen = np.zeros(rows, dtype=bool)
            chosen[stratified_subset(every, limit, task, recipe.seed)] = True
        start, bad_rows = 0, Counter[str]()
        with _tables(recipe, task) as tables:
            for table in tables:
                for number in range(len(table)):
                    if chosen is None or chosen[start + number]:
                        yield from (column[number] for column in table.sentences)
                start += len(table)
                bad_rows.update(table.bad_rows)
            said = lines_on(origin(recipe, task, "train").name, tables.notes)
        self.largest = max(self.largest, start)
        self.notes += [f"{task}: {line}" for line in said]
        self.notes += [
            f"{self._name}: {count} rows of {task} skipped ({why})"
            for why, count in bad_rows.items()
        ]


@contextmanager
def _tables(recipe: Recipe, task: str) -> Iterator[TableReader]:
    """Open the training examples of a task of the recipe, or of a built-in one, as text."""
    form, found = recipe.split_schema(task, "train"), origin(recipe, task, "train")
    with found.rows(form, labelled=True) as rows:
        yield TableReader(rows, found.where, form, labelled=True, on_bad_row=recipe.on_bad_row)


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
            with _tables(recipe, task) as tables:
                for table in tables:
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
            for one in () if isinstance(found, HubSplit | HubStream) else found.files:
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
