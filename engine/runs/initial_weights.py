"""Initial weights of a run from another run of this engine: ``--init RUN``.

The encoder, its shape and the tokenizer are the other run's.  A head, of a task or an objective, is
taken over if the other run has one by that name that means the same; so are the adapters of a task.
The rest begins anew.  A folder of a run is told from a model folder by its recipe.
"""

from collections.abc import Collection
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from ..config.recipe import Recipe
from ..models.hf_weights import has_weights


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, not a model's."""
    return isfile(folder / "recipe.toml") and not has_weights(folder)


class TakenOver(NamedTuple):
    """Heads and adapters that a run takes from another one.

    Attributes:
        heads: of tasks and objectives, by name.
        adapters: the tasks whose adapters are.
        anew: what begins anew, and why, by name.
        left: what stays behind and was trained with the encoder; empty if nothing is.
    """

    heads: list[str]
    adapters: list[str]
    anew: dict[str, str]
    left: str

    def line(self, init: str, source: str, without_weights: Collection[str] = ()) -> str:
        """Return what is taken and what begins anew, in one line.

        Args:
            init: as it was given.
            source: which weights of that run.
            without_weights: heads that have none, such as a cosine's, which are not named.
        """
        named = [name for name in self.heads if name not in without_weights]
        heads = f", heads of {', '.join(named)}" if named else ""
        adapters = f", adapters of {', '.join(self.adapters)}" if self.adapters else ""
        anew = ", ".join(
            f"{name} ({why})" for name, why in self.anew.items() if name not in without_weights
        )
        return (
            f"--init {init}: taken from {source}: tokenizer, encoder{heads}{adapters}"
            + (f"; begin anew: {anew}" if anew else "")
            + (f"; left there: {self.left}" if self.left else "")
        )


def compare(own: Recipe, other: Recipe) -> TakenOver:
    """Return what a run takes from another one.

    Args:
        own: of the run that begins.
        other: of the one that it begins from.
    """
    anew, heads = dict[str, str](), list[str]()
    for name in (*own.tasks, *own.objectives):
        is_there = name in (other.tasks if name in own.tasks else other.objectives)
        why = _difference(own, other, name) if is_there else "not there"
        if why:
            anew[name] = why
        else:
            heads.append(name)
    adapters, left = list[str](), ""
    if own.adapter_width and own.adapter_width == other.adapter_width:
        adapters = [name for name in own.tasks if name in other.tasks]
    elif own.adapter_width:
        there = f"width {other.adapter_width}" if other.adapter_width else "none"
        anew["adapters"] = f"{there} there"
    if other.adapter_width and other.adapter_width != own.adapter_width:
        left = "adapters, with which its encoder was trained"
    return TakenOver(heads, adapters, anew, left)


def _difference(own: Recipe, other: Recipe, name: str) -> str:
    """Return in what a head there differs, so that its weights mean something else; or nothing."""
    if name in own.objectives:
        kind = other.objectives[name].kind
        return "" if kind == own.objectives[name].kind else f"kind {kind} there"
    here, there = own.formats[name], other.formats[name]
    mine, theirs = own.tasks[name], other.tasks[name]
    # Of retrieval an example may have any number of passages.
    as_many = here.labels == "none" or len(here.sentences) == len(there.sentences)
    if here.kind != there.kind or not as_many:
        return "another kind of task there"
    if (here.classes, here.low, here.high) != (there.classes, there.low, there.high):
        return "other labels there" if here.kind != "score" else "another range there"
    if mine.head != theirs.head:
        return f"head {theirs.head} there"
    if mine.loss != theirs.loss:
        return f"loss {theirs.loss} there"
    if own.pooling != other.pooling:
        return f"pooling {other.pooling} there"
    return ""
