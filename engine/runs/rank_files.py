"""Deal the files of a training set to the ranks of a run, so that each reads its own alone."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..checkpoints.manifest import read_manifest
from ..config.recipe import Recipe
from ..data.addresses import Address, size_of
from ..data.origins import DataFile, DataFiles
from ..distributed.ranks import Ranks
from ..utils.errors import InputError
from ..utils.files import explained
from ..utils.fingerprint import digest, sample_digest
from .data_paths import data_folder
from .run import Run
from .texts import is_dealt, text_files

_OUT = "or leave split_by_rank out"

Key = TypeVar("Key", str, tuple[str, int, str])


class Dealt(NamedTuple):
    """The training files of a task or an objective that are a rank's own.

    Attributes:
        own: those of this rank.
        of_all: how many files all ranks have.
    """

    own: tuple[DataFile, ...]
    of_all: int

    @property
    def origin(self) -> DataFile | DataFiles:
        """The examples of a task in them."""
        return self.own[0] if len(self.own) == 1 else DataFiles(self.own)


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


def dealt_names(recipe: Recipe, ranks: int) -> list[str]:
    """Return the trained tasks and objectives whose files are dealt to several ranks."""
    return [name for name in recipe.trained if is_dealt(recipe, name, ranks)]


def deal_files(run: Run, ranks: Ranks) -> dict[str, Dealt]:
    """Deal the training files of all tasks and objectives that say so; all ranks must call.

    Nothing of a file is read, unless ranks see files of one name and size that may be different.

    Returns:
        Those of each task and objective; none where one rank trains.

    Raises:
        InputError: the same on all ranks: some rank has no file, a file is on none of them, or
            they have not learnt the same vocabulary.
    """
    names = dealt_names(run.recipe, ranks.size)
    if names:
        _check_vocabulary(run, ranks)
    return {name: _deal_files_of(run, name, ranks) for name in names}


def line_on_other_ranks(run: Run, ranks: Ranks) -> str:
    """Return a line where a resumed run, whose ranks read their own data, had another number.

    It is empty elsewhere.
    """
    if not any(phase.divided for phase in run.recipe.in_phases.values()):
        return ""  # without a look at the checkpoint, which takes time
    newest = run.checkpoints.find("step")
    before = 0 if newest is None else read_manifest(newest).ranks
    if before in (0, ranks.size):
        return ""
    return (
        f"warning: trained by {_count(before, 'rank')} so far, now by {ranks.size}, which read "
        "other examples each, so the batches from now on are not those that it would have had"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _check_vocabulary(run: Run, ranks: Ranks) -> None:
    own = hashlib.sha256(repr(run.tokenizer.definition).encode()).hexdigest()
    if len(set(ranks.gather_values(own))) > 1:
        raise InputError(
            "split_by_rank: the ranks have learnt different vocabularies, since their machines see "
            "different files; give a model by --init"
        )


def _deal_files_of(run: Run, name: str, ranks: Ranks) -> Dealt:
    is_task = name in run.recipe.tasks
    field = f"tasks.{name}.source.files.train" if is_task else f"objectives.{name}.files"
    with ranks.failing_together():
        files, problems = _look(run.recipe, name)
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
    return Dealt(tuple(named[file] for file, *_ in sorted(dealt[ranks.rank])), count)


def _look(recipe: Recipe, owner: str) -> tuple[dict[_Seen, DataFile], dict[str, str]]:
    """Return the files of a task or an objective that this rank sees.

    Returns:
        The files, and by the names in the recipe why others are not seen.
    """
    folder = data_folder(recipe) if recipe.data else None
    seen, problems = dict[_Seen, DataFile](), dict[str, str]()
    for name in _names_of(recipe, owner):
        try:
            for file in _files_called(recipe, owner, name, folder):
                seen[_see(file, folder)] = file
        except InputError as error:
            problems[name] = str(error)
    return seen, problems


def _names_of(recipe: Recipe, owner: str) -> tuple[str, ...]:
    if owner in recipe.objectives:
        return recipe.objectives[owner].files
    source = recipe.tasks[owner].source
    assert source is not None, "files are dealt of a source"
    given = source.files["train"]
    return (given,) if isinstance(given, str) else given


def _files_called(
    recipe: Recipe, owner: str, name: str, folder: Path | None
) -> tuple[DataFile, ...]:
    """Return the files that one name stands for; there may be none of them.

    Raises:
        InputError: a pattern or folder has none.
    """
    if owner in recipe.objectives:
        return tuple(map(DataFile, text_files(recipe, owner, [name])))
    source = recipe.tasks[owner].source
    assert source is not None, "files are dealt of a source"
    one = source.model_copy(update={"files": {"train": name}})
    found = one.origin(owner, "train", folder)
    assert isinstance(found, DataFile | DataFiles), "the source has files"
    return found.files


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
