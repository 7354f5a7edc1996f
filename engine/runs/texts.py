"""The texts that a recipe trains on: those of its tasks, and those of its objectives."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config.recipe import Recipe
from ..data.addresses import Place
from ..data.cache import Reading, Show, load_vocabulary
from ..data.hub_stream import HubStream
from ..data.origins import DataFile, HubSplit, Origin, with_names
from ..data.raw_text import each_line, evenly
from ..data.rows import lines_on
from ..data.sampler import stratified_subset
from ..data.shards import shards
from ..data.table import TableReader, bad_row_lines, strata
from ..data.tokenizer import Tokenizer
from .data_paths import data_folder, origin, reads_data_folder

_TEXT = (".txt", ".text")
"""Endings of the files that are read of a folder of texts, but for that of their compression."""

_TIMES = 2
"""A vocabulary is learnt by going through the texts so often."""

_SHOWN = 4096
"""Texts after which their number is shown."""


class ObjectiveTexts:
    """The texts of an objective, cut as the recipe says, read anew whenever they are gone through.

    Args:
        recipe: that has it.
        name: of the objective.
        files: those that are dealt to this rank; None for all that the recipe names.

    Attributes:
        largest: examples of the largest task, or lines of the largest file; known, as is what is
            below, once the texts were gone through.
        found: texts of all tasks and files, each cut to the objective's ``max_per_source``.
        notes: warnings about the files, a line each.
    """

    def __init__(self, recipe: Recipe, name: str, files: Sequence[Place] | None = None) -> None:
        self._recipe, self._name = recipe, name
        self._settings = recipe.objectives[name]
        paths = _files_of(recipe, name) if files is None else files
        self._sources = _Sources(recipe, _tasks_of(recipe, name), paths)
        self.largest = self.found = 0
        self.notes: list[str] = []

    def made_from(self, *, verify: bool = False) -> list[str]:
        """Return all that decides the texts.

        Args:
            verify: read all of large files to tell whether they have changed.
        """
        recipe, settings = self._recipe, self._settings
        # The seed draws the examples of tasks, where not all are taken; runs that differ in
        # nothing else share an entry.  The name stands in the notes.
        seed = recipe.seed if settings.max_per_source and self._sources.tasks else ""
        limits = (settings.max_per_source, settings.max_texts, seed, recipe.on_bad_row, self._name)
        return [*map(str, limits), *self._sources.digests(verify=verify)]

    def check_unchanged(self) -> None:
        """Refuse files that changed since :meth:`made_from` looked at them.

        Raises:
            InputError: one has.
        """
        self._sources.check_unchanged()

    @property
    def names(self) -> str:
        """The names of what the texts are from."""
        return self._sources.names

    @property
    def share(self) -> float:
        """How much is read, from 0 to 1."""
        return self._sources.share

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
        self._sources.share = 0.0
        for number, (task, found) in enumerate(self._sources.tasks.items()):
            yield from self._counted(self._of_task(number, task, found))
        limit = self._settings.max_per_source
        for number, path in enumerate(self._sources.paths, start=len(self._sources.tasks)):
            notes, lines, say = list[str](), 0, partial(self._sources.say, number)
            for lines, text in enumerate(each_line(path, notes, say), start=1):
                if not limit or lines <= limit:
                    self.found += 1
                    yield text
            self.largest = max(self.largest, lines)
            self.notes += [f"{self._name}: {line}" for line in lines_on(path.name, tuple(notes))]

    def _counted(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.found += 1
            yield text

    def _of_task(self, number: int, task: str, found: Origin) -> Iterator[str]:
        """Yield the sentences of a task's examples; those of a pair follow one another."""
        recipe, limit = self._recipe, self._settings.max_per_source
        with _tables(recipe, task, found) as tables:
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
        start, bad_rows, first_bad = 0, Counter[str](), ""
        with _tables(recipe, task, found) as tables:
            for table in tables:
                for row in range(len(table)):
                    if chosen is None or chosen[start + row]:
                        yield from (column[row] for column in table.sentences)
                self._sources.say(number, tables.share)
                start += len(table)
                bad_rows.update(table.bad_rows)
                first_bad = first_bad or table.first_bad
            said = lines_on(found.name, tables.notes)
        self.largest = max(self.largest, start)
        self.notes += [f"{task}: {line}" for line in said]
        first_bad = with_names(first_bad, found)  # the cache may keep it
        skipped = bad_row_lines(bad_rows, first_bad, f"rows of {task} skipped")
        self.notes += [f"{self._name}: {line}" for line in skipped]


class _Sources:
    """Tasks and files that texts are from, looked for once, so that they stay the same.

    Args:
        recipe: that names them.
        tasks: of which the training examples are read.
        paths: of files with a text a line.

    Attributes:
        share: how much of them is read, from 0 to 1.
    """

    def __init__(self, recipe: Recipe, tasks: Iterable[str], paths: Iterable[Place]) -> None:
        self._recipe = recipe
        self.tasks = {task: origin(recipe, task, "train") for task in tasks}
        self.paths = list(paths)
        self.share = 0.0
        self._files = list(map(DataFile, self.paths))

    def say(self, number: int, share: float) -> None:
        """Note how much is read of a source, by its number, when those before it are read."""
        self.share = (number + share) / (len(self.tasks) + len(self.paths))

    @property
    def names(self) -> str:
        """Their names."""
        return ", ".join([*self.tasks, *(path.name for path in self.paths)])

    def digests(self, *, verify: bool) -> list[str]:
        """Return all that decides what is read."""
        found = list[str]()
        for task, source in self.tasks.items():
            form = self._recipe.split_schema(task, "train")
            found += [task, repr(form), source.digest(verify=verify)]
        return found + [file.digest(verify=verify) for file in self._files]

    def check_unchanged(self) -> None:
        """Refuse files that changed since their digests were asked for."""
        for source in (*self.tasks.values(), *self._files):
            source.check_unchanged()


@contextmanager
def _tables(recipe: Recipe, task: str, found: Origin) -> Iterator[TableReader]:
    """Open the training examples of a task of the recipe, or of a built-in one, as text."""
    form = recipe.split_schema(task, "train")
    with found.rows(form, labelled=True) as rows:
        yield TableReader(rows, found.where, form, labelled=True, on_bad_row=recipe.on_bad_row)


def learn_vocabulary(recipe: Recipe, reading: Reading) -> Tokenizer:
    """Return the vocabulary of what a recipe trains on, from the cache where it was learnt before.

    Raises:
        InputError: a file of the texts cannot be read.
    """
    texts = VocabularyTexts(recipe)
    made_from = [str(recipe.encoder.vocab_size), recipe.on_bad_row]
    made_from += texts.sources.digests(verify=reading.verify)

    def learn() -> Tokenizer:
        name = f"{texts.sources.names} twice, for a vocabulary"
        with reading.watch(name, "texts") as texts.show:
            tokenizer = Tokenizer.train(texts, recipe.encoder.vocab_size)
        texts.sources.check_unchanged()
        return tokenizer

    return load_vocabulary(made_from, f"vocabulary of {texts.sources.names}", learn)


class VocabularyTexts:
    """The texts that a vocabulary is learnt from: whatever some phase trains on, uncut.

    Each task and each file counts once.  They are read anew whenever they are gone through.

    Args:
        recipe: of the run.

    Attributes:
        sources: of the texts.
        show: is told now and then how many texts are read.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.sources = _Sources(recipe, *_vocabulary_sources(recipe))
        self.show: Show = _show_nothing
        self._times = self._read = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        self.sources.share = 0.0
        for text in self._all():
            self._read += 1
            if self._read % _SHOWN == 0:
                self.show(self._read, min(1.0, (self._times + self.sources.share) / _TIMES))
            yield text
        self._times += 1

    def _all(self) -> Iterator[str]:
        for number, (task, found) in enumerate(self.sources.tasks.items()):
            with _tables(self._recipe, task, found) as tables:
                for table in tables:
                    for column in table.sentences:
                        yield from column
                    self.sources.say(number, tables.share)
        for number, path in enumerate(self.sources.paths, start=len(self.sources.tasks)):
            yield from each_line(path, [], partial(self.sources.say, number))


def watched(texts: Iterable[str], show: Callable[[int], None]) -> Iterator[str]:
    """Yield texts, and show now and then how many."""
    for number, text in enumerate(texts, start=1):
        if number % _SHOWN == 0:
            show(number)
        yield text


def _show_nothing(_rows: int, _share: float) -> None:
    pass


def _vocabulary_sources(recipe: Recipe) -> tuple[list[str], list[Place]]:
    """Return the tasks and the files whose texts decide a vocabulary."""
    tasks, files = dict[str, None](), dict[Place, None]()
    for name in recipe.trained:
        if name in recipe.tasks:
            tasks[name] = None
    for name in recipe.trained:
        if name in recipe.objectives:
            tasks |= dict.fromkeys(_tasks_of(recipe, name))
            files |= dict.fromkeys(_files_of(recipe, name))
    return list(tasks), list(files)


def check_texts(recipe: Recipe, ranks: int = 1) -> None:
    """Look for the data of all phases, so that none is missed when its turn has come.

    Files that are dealt to several ranks are looked for when they are dealt, since some of them may
    be on other machines.

    Args:
        recipe: of the run.
        ranks: processes that train it.

    Raises:
        InputError: the recipe does not name a split that it needs, or a file is not there.
    """
    for phase in recipe.in_phases.values():
        wanted: list[tuple[str, str]] = []
        for name in phase.train:
            tasks = _tasks_of(recipe, name) if name in recipe.objectives else (name,)
            wanted += [(task, "train") for task in tasks if not is_dealt(recipe, task, ranks)]
            is_objective = name in recipe.objectives and not is_dealt(recipe, name, ranks)
            for file in _files_of(recipe, name) if is_objective else ():
                _check_file(DataFile(file))
        wanted += [(task, "dev") for task in recipe.tasks if phase.scored]
        for task, split in wanted:
            found = origin(recipe, task, split)
            for one in () if isinstance(found, HubSplit | HubStream) else found.files:
                _check_file(one)


def is_dealt(recipe: Recipe, name: str, ranks: int) -> bool:
    """Return whether the training files of a task or an objective are dealt to several ranks."""
    source = recipe.tasks[name].source if name in recipe.tasks else recipe.objectives.get(name)
    return ranks > 1 and source is not None and source.split_by_rank


def _check_file(file: DataFile) -> None:
    if file.is_missing:
        file.digest()  # which says what is wrong


def _tasks_of(recipe: Recipe, objective: str) -> tuple[str, ...]:
    """Return the tasks whose training sentences an objective reads."""
    settings = recipe.objectives[objective]
    return settings.sentences_of or (() if settings.files else tuple(recipe.tasks))


def _files_of(recipe: Recipe, objective: str) -> list[Place]:
    files = recipe.objectives[objective].files
    return text_files(recipe, objective, files) if files else []


def text_files(recipe: Recipe, objective: str, names: Sequence[str]) -> list[Place]:
    """Return the text files that some names of an objective stand for.

    Raises:
        InputError: a pattern or folder has none.
    """
    folder = data_folder(recipe) if reads_data_folder(recipe) else Path()
    return shards(names, folder, f"objectives.{objective}.files", _TEXT)
