"""The settings of an objective: ``[objectives.NAME]`` of a recipe.

An objective is trained like a task: it has examples (:class:`~engine.data.task_batch.Examples`), a
head, and a row of gradients, but it predicts nothing and is not scored.
"""

from typing import Annotated, Literal

from pydantic import Field

from ..utils.field_types import Count, FileName, Positive, PositiveReal, Settings


class ObjectiveRecipe(Settings):
    """What is trained without labels, and from which text."""

    kind: Literal["masked_lm", "masked_lm_next", "simcse"]
    """masked_lm: tell the tokens behind masks; masked_lm_next: and whether the second segment
    follows the first in the text; simcse: know a sentence again under another dropout mask."""
    sentences_of: tuple[str, ...] = ()
    """Tasks whose training sentences are the text; without these and files, all of the recipe."""
    files: tuple[FileName, ...] = ()
    """Text files, a sentence or a document a line, plain or compressed (.gz, .bz2, .xz, .zst);
    relative to the data folder.  Folders (their .txt files), patterns and addresses, as of a
    source."""
    split_by_rank: bool = False
    """With several ranks: deal the files to them, so that each reads and keeps its own alone, as of
    a task's source."""
    batch_size: Count = 0
    """Examples of the objective in a step; 0: as the recipe's batch_size and sampling_alpha say."""
    tokens_per_batch: Count = 0
    """masked_lm, masked_lm_next: tokens of a step, on average, in as many sequences as they are;
    0: batch_size sequences."""
    max_per_source: Count = 0
    """Examples of each task (the label distribution is kept) or lines of each file; 0: all."""
    max_texts: Count = 0
    """The most texts in all, taken at even distances from those found; 0: all."""
    join: Annotated[int, Field(ge=1, le=64)] = 1
    """masked_lm: so many short texts that follow one another become one sequence."""
    short: Positive = 96
    """join: a text of up to so many tokens is short; a longer one is a sequence by itself."""
    divide: bool = False
    """masked_lm: a text that is longer than a sequence becomes several; it loses its end otherwise.
    """
    whole_words: bool = False
    """masked_lm, masked_lm_next: mask all tokens of a word, or none (whole word masking)."""
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are to be told."""
    temperature: PositiveReal = 0.05
    """simcse: what cosines are divided by."""
    weight: PositiveReal = 1.0
    """Multiplies the loss."""


def check_objective(name: str, objective: ObjectiveRecipe) -> None:
    """Check settings that objectives of some kinds alone have.

    Args:
        name: the objective's.
        objective: its settings.

    Raises:
        ValueError: the message names the recipe's key.
    """
    table, kind = f"objectives.{name}", objective.kind
    if objective.tokens_per_batch and kind == "simcse":
        raise ValueError(
            f"{table}.tokens_per_batch: sentences are told apart within a batch, so that their "
            "number matters; give batch_size"
        )
    if objective.tokens_per_batch and objective.batch_size:
        raise ValueError(
            f"{table}.tokens_per_batch: batch_size is given too; leave one of them out"
        )
    if objective.split_by_rank:
        _check_split(table, objective)
    if objective.divide and kind != "masked_lm":
        raise ValueError(f"{table}.divide: has no effect on {kind}; leave it out")
    if objective.whole_words and kind == "simcse":
        raise ValueError(f"{table}.whole_words: simcse masks nothing; leave it out")


def _check_split(table: str, objective: ObjectiveRecipe) -> None:
    """Check settings that files dealt to ranks cannot have.

    Raises:
        ValueError: the message names the recipe's key.
    """
    if not objective.files:
        raise ValueError(f"{table}.split_by_rank: has no effect without files; leave it out")
    for field, instead in {
        "sentences_of": "give files alone",
        "max_texts": "give max_per_source",
        "tokens_per_batch": "give batch_size",
    }.items():
        if getattr(objective, field):
            raise ValueError(f"{table}.{field}: split_by_rank deals files to ranks; {instead}")
