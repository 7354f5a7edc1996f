"""Deal the files of a training set to the ranks of a run, so that each reads its own alone."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..checkpoints.manifest import read_manifest
from ..config.recipe import Recipe
from ..data.addresses import Address, size_of
from ..data.source import DataFile, DataFiles, HubSplit
from ..distributed.ranks import Ranks
from ..utils.errors import InputError
from ..utils.files import explained
from ..utils.fingerprint import digest, sample_digest
from .data_paths import data_folder
from .run import Run

_OUT = "or leave split_by_rank out"

Key = TypeVar("Key", str, tuple[str, int, str])


class Dealt(NamedTuple):
    """The training files of a task that are a rank's own.

    Attributes:
        own: those of this rank.
        files: how many all ranks have.
    """

    own: DataFile | DataFiles
    files: int


class _Seen(NamedTuple):
    """A file that a rank sees.

    Attributes:
        name: relative to the data folder, if it is within.
        size: in bytes.
        stamp: equal for one file on a common disk.
    """

    name: str
    size: int
    stamp: str


def deal(seen: Sequence[Mapping[Key, int]]) -> list[list[Key]]:
    """Deal files to ranks that can see them, so that each has about as many bytes.

    The files that the fewest ranks see come first, of these the largest; each goes to the rank
    with the fewest bytes so far, of several the lowest.

    Args:
        seen: the files that each rank sees, and their bytes.

    Returns:
        The files of each rank, each file once.
    """
    sizes = {file: size for files in seen for file, size in files.items()}
    seeing = {file: [rank for rank, own in enumerate(seen) if file in own] for file in sizes}
    dealt: list[list[Key]] = [[] for _ in seen]
    held = [0] * len(seen)
    for file in sorted(sizes, key=lambda file: (len(seeing[file]), -sizes[file], file)):
        rank = min(seeing[file], key=lambda rank: (held[rank], len(dealt[rank]), rank))
        dealt[rank].append(file)
        held[rank] += sizes[file]
    return dealt


def dealt_tasks(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Return the trained tasks whose files are dealt to several ranks."""
    if ranks.size == 1:
        return []
    sources = {name: recipe.tasks[name].source for name in recipe.trained if name in recipe.tasks}
    return [name for name, source in sources.items() if source and source.split_by_rank]


def deal_files(run: Run, ranks: Ranks) -> dict[str, Dealt]:
    """Deal the training files of all tasks whose sources say so; all ranks must call.

    Nothing of a file is read, unless ranks see files of one name and size that may be different.

    Returns:
        Those of each task; none where one rank trains.

    Raises:
        InputError: the same on all ranks: some rank has no file, a file is on none of them, or
            they have not learnt the same vocabulary.
    """
    tasks = dealt_tasks(run.recipe, ranks)
    if tasks:
        _check_vocabulary(run, ranks)
    return {task: _deal_task(run, task, ranks) for task in tasks}


def line_on_other_ranks(run: Run, ranks: Ranks) -> str:
    """Return a line where a resumed run had another number of ranks, which were dealt files.

    It is empty elsewhere.
    """
    newest, recipe = run.checkpoints.find("step"), run.recipe
    if newest is None:
        return ""
    before = read_manifest(newest).ranks
    sources = [recipe.tasks[name].source for name in recipe.trained if name in recipe.tasks]
    if before in (0, ranks.size) or not any(each and each.split_by_rank for each in sources):
        return ""
    return (
        f"warning: trained by {_count(before, 'rank')} so far, now by {ranks.size}: files are "
        "dealt otherwise, so the batches from now on are not those that it would have had"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _check_vocabulary(run: Run, ranks: Ranks) -> None:
    own = hashlib.sha256(run.tokenizer.to_json().encode()).hexdigest()
    if len(set(ranks.gather_values(own))) > 1:
        raise InputError(
            "split_by_rank: the ranks have learnt different vocabularies, since their machines see "
            "different files; give a model by --init"
        )


def _deal_task(run: Run, task: str, ranks: Ranks) -> Dealt:
    field = f"tasks.{task}.source.files.train"
    with ranks.failing_together():
        files, problems = _look(run.recipe, task)
    of_ranks = [[_Seen(*each) for each in own] for own in ranks.gather_values([*files])]
    _check_names(ranks.gather_values(problems))
    unclear = _unclear(of_ranks)
    with ranks.failing_together():
        own_contents = {
            seen.name: _content(file, verify=run.reading.verify)
            for seen, file in files.items()
            if (seen.name, seen.size) in unclear
        }
    contents = ranks.gather_values(own_contents)
    keys = [
        {(seen.name, seen.size, content.get(seen.name, "")): seen.size for seen in own}
        for own, content in zip(of_ranks, contents, strict=True)
    ]
    dealt = deal(keys)
    count = sum(map(len, dealt))
    if count < ranks.size:
        raise InputError(
            f"{field}: {_count(count, 'file')} for {ranks.size} ranks; give at least one file a "
            f"rank, {_OUT}"
        )
    for rank, own in enumerate(dealt):
        if not own:
            raise InputError(
                f"{field}: rank {rank} of {ranks.size} sees {len(keys[rank])} of {count} files, "
                f"which are too few for the ranks that see them; give it a file of its own, {_OUT}"
            )
    named = {seen.name: file for seen, file in files.items()}
    own_files = tuple(named[name] for name, *_ in sorted(dealt[ranks.rank]))
    return Dealt(own_files[0] if len(own_files) == 1 else DataFiles(own_files), count)


def _look(recipe: Recipe, task: str) -> tuple[dict[_Seen, DataFile], dict[str, str]]:
    """Return the files of a task that this rank sees, and why others are not seen, by names."""
    source = recipe.tasks[task].source
    assert source is not None, "files are dealt of a source"
    folder = data_folder(recipe) if recipe.data else None
    given = source.files["train"]
    seen, problems = dict[_Seen, DataFile](), dict[str, str]()
    for name in (given,) if isinstance(given, str) else given:
        own = source.model_copy(update={"files": {"train": name}})
        try:
            found = own.origin(task, "train", folder)
            assert not isinstance(found, HubSplit), "the source has files"
            for file in found.files:
                seen[_see(file, folder)] = file
        except InputError as error:
            problems[name] = str(error)
    return seen, problems


def _see(file: DataFile, folder: Path | None) -> _Seen:
    """Return what tells a file from others, without reading it.

    Raises:
        InputError: it is not there.
    """
    path = file.path
    if isinstance(path, Address):
        return _Seen(str(path), size_of(path), file.digest())
    if file.is_missing:
        file.digest()  # which says what is wrong
    found = path.stat()
    within = folder is not None and path.is_relative_to(folder)
    name = str(path.relative_to(folder)) if within and folder is not None else str(path)
    return _Seen(name, found.st_size, f"{found.st_ino}:{found.st_mtime_ns}")


def _check_names(problems: Sequence[Mapping[str, str]]) -> None:
    """Refuse names that no rank sees a file for."""
    for name, problem in problems[0].items():
        if all(name in own for own in problems):
            raise InputError(problem)


def _unclear(of_ranks: Sequence[Sequence[_Seen]]) -> set[tuple[str, int]]:
    """Return names and sizes of files that may be one or several."""
    stamps: dict[tuple[str, int], set[str]] = {}
    for own in of_ranks:
        for seen in own:
            stamps.setdefault((seen.name, seen.size), set()).add(seen.stamp)
    return {file for file, found in stamps.items() if len(found) > 1}


def _content(file: DataFile, *, verify: bool) -> str:
    """Return a hash of a file that any copy of it has too.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(file.path, Address):
        return file.digest()
    with explained("read", file.path):
        return digest(file.path) if verify else sample_digest(file.path)
