"""Read the training files that are dealt to a rank, and tell all ranks the sizes of what it has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..config.recipe import Recipe
from ..data.masked_text import MaskedText
from ..data.rank_examples import RankExamples, Report, word_counts
from ..data.raw_text import Found
from ..data.sampler import stratified_subset
from ..data.sentences_twice import SentencesTwice
from ..data.split import TokenizedSplit
from ..distributed.ranks import Ranks
from ..runs.rank_files import Dealt
from ..runs.run import Run
from ..runtime.execution import RECORDED
from ..utils.arrays import Indices
from ..utils.cpus import usable_cpus
from ..utils.errors import InputError
from .build import execution_kind, labelled

_Own = TokenizedSplit | MaskedText | SentencesTwice


def read_dealt(
    run: Run, device: torch.device, ranks: Ranks, dealt: Mapping[str, Dealt], phase: int = 0
) -> dict[str, RankExamples]:
    """Read the files of a phase that are dealt to ranks; all ranks must call.

    All ranks read at the same time, each its own files, whatever the machine that it is on.

    Args:
        run: the run.
        device: of the model.
        ranks: the processes that train it.
        dealt: the files of each task and objective.
        phase: whose tasks and objectives.

    Raises:
        InputError: a rank cannot use its files; all ranks raise the same.
    """
    recipe = list(run.recipe.in_phases.values())[phase]
    run = run._replace(reading=run.reading._replace(workers=_workers(run, ranks)))
    own = dict[str, _Own]()
    names = [name for name in recipe.train if name in dealt]
    if not names:
        return {}
    with ranks.failing_together():
        for name in names:
            own[name] = _read(run, name, dealt[name], ranks.rank)
    plans_shapes = execution_kind(recipe, device, ranks) in RECORDED
    return {
        name: _examples(recipe, found, ranks, dealt[name].of_all, plans_shapes=plans_shapes)
        if isinstance(found, TokenizedSplit)
        else _texts(found, ranks, dealt[name].of_all)
        for name, found in own.items()
    }


def _read(run: Run, name: str, dealt: Dealt, rank: int) -> _Own:
    """Return what this rank has of a task or an objective."""
    if name in run.recipe.tasks:
        return labelled(run, name, run.read(run.recipe.split_schema(name, "train"), dealt.origin))
    texts = run.objective(name, [file.path for file in dealt.own])
    # Ranks that mask the same places of their texts would learn less from them.
    return replace(texts, seed=texts.seed + rank) if isinstance(texts, MaskedText) else texts


def _workers(run: Run, ranks: Ranks) -> int:
    """Return the processes that tokenize for this rank: its share of its machine's cores."""
    return run.reading.workers or max(1, usable_cpus() // ranks.local_size)


def _examples(
    recipe: Recipe, own: TokenizedSplit, ranks: Ranks, files: int, *, plans_shapes: bool
) -> RankExamples:
    task, form = recipe.tasks[own.task], recipe.formats[own.task]
    rows = [count for (count,) in ranks.gather([len(own)])]
    sizes = shares(rows, recipe.max_train_examples, own.task)
    chosen: Indices | None = None
    if sizes[ranks.rank] < len(own):
        # Each rank's own name, or ranks would choose examples at the same places.
        name = f"{own.task}/rank {ranks.rank}"
        chosen = stratified_subset(own.strata, sizes[ranks.rank], name, recipe.seed)
    trained = np.arange(len(own)) if chosen is None else chosen
    lengths = class_counts = counts = None
    if plans_shapes:
        lengths = _gathered(ranks, _lengths(own, trained, ranks))
    if own.word_offsets is not None:
        counts = _gathered(ranks, word_counts(own)[trained])
    if task.class_loss.given:
        found = own.label_counts(trained, int(form.high) + 1)
        class_counts = np.sum(ranks.gather_array(found), axis=0).reshape(found.shape)
    return RankExamples(
        own=own,
        rank=ranks.rank,
        sizes=tuple(sizes),
        chosen=chosen,
        lengths=lengths,
        word_counts=counts,
        class_counts=class_counts,
        texts=None if own.text_ids is None else own,
        report=_report(own, ranks, files, sum(rows)),
    )


def _texts(own: MaskedText | SentencesTwice, ranks: Ranks, files: int) -> RankExamples:
    """Return the text of an objective with the numbers of all ranks."""
    sizes = [count for (count,) in ranks.gather([len(own)])]
    found = [Found(*each) for each in ranks.gather_values(own.found)]
    notes = tuple(dict.fromkeys(note for each in found for note in each.notes))
    return RankExamples(
        own=own,
        rank=ranks.rank,
        sizes=tuple(sizes),
        chosen=None,
        lengths=None,
        word_counts=None,
        class_counts=None,
        texts=None,
        report=Report(
            files=files,
            rows=sum(sizes),
            truncated=0,
            bad_rows={},
            first_bad="",
            notes=notes,
            found=Found(
                max(each.largest for each in found), sum(each.texts for each in found), notes
            ),
        ),
    )


def shares(rows: Sequence[int], limit: int, task: str) -> list[int]:
    """Return how many examples each rank trains on: in all ``limit``, in proportion to its rows.

    Args:
        rows: of each rank, at least one.
        limit: of ``max_train_examples``; 0 for all.
        task: the task's name, for error messages.

    Raises:
        InputError: there are more ranks than examples.
    """
    whole = sum(rows)
    if not 0 < limit < whole:
        return list(rows)
    if limit < len(rows):
        raise InputError(
            f"max_train_examples = {limit}: too few for the {len(rows)} ranks that the files of "
            f"{task} are dealt to; raise it"
        )
    # One for each rank, and of the others a share in proportion, by the largest remainder.
    exact = [(limit - len(rows)) * (count - 1) / (whole - len(rows)) for count in rows]
    found = [1 + int(share) for share in exact]
    by_rest = sorted(range(len(rows)), key=lambda rank: (int(exact[rank]) - exact[rank], rank))
    for rank in by_rest[: limit - sum(found)]:
        found[rank] += 1
    return found


def _lengths(split: TokenizedSplit, chosen: Indices, ranks: Ranks) -> npt.NDArray[Any]:
    """Return the tokens of each sequence of chosen examples, ``[n, c]``."""
    lengths = split.lengths.reshape(len(split), split.columns)[chosen]
    is_short = not ranks.any(bool(lengths.max(initial=0) > np.iinfo(np.uint16).max))
    return lengths.astype(np.uint16 if is_short else np.int32)


def _gathered(ranks: Ranks, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of all ranks, one rank after the other."""
    return np.concatenate(ranks.gather_array(own))


def _report(own: TokenizedSplit, ranks: Ranks, files: int, rows: int) -> Report:
    said = ranks.gather_values([own.truncated, own.bad_rows, own.first_bad, own.notes])
    bad_rows = Counter[str]()
    for _, own_bad_rows, *_ in said:
        bad_rows.update(own_bad_rows)
    return Report(
        files=files,
        rows=rows,
        truncated=sum(truncated for truncated, *_ in said),
        bad_rows=dict(bad_rows),
        first_bad=next((first for *_, first, _ in said if first), ""),
        notes=tuple(dict.fromkeys(note for *_, notes in said for note in notes)),
    )
