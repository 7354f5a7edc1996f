"""Conditions on which a setting has an effect: a field, and the phase of a run that it is in."""

import math
from typing import NamedTuple

import torch

from ..config.objective import ObjectiveRecipe
from ..config.recipe import Recipe
from ..data.raw_text import Found
from ..data.source import TaskSource
from ..distributed.ranks import Ranks
from ..models.config import EncoderConfig
from ..training.build import execution_kind
from .phase_facts import PhaseFacts


class Case(NamedTuple):
    """A field within a phase of a run, and where that is trained.

    Attributes:
        recipe: of the phase.
        config: of the encoder.
        device: where it is trained.
        ranks: the processes that train together.
        field: the field, without its tables.
        owner: the task or objective that it belongs to, if any.
        known: what its data decide; None before they are read.
        run_steps: steps of all phases; None before they are known.
        split: the split that the field is of alone, if any.
        is_last: whether the phase is the last one.
    """

    recipe: Recipe
    config: EncoderConfig
    device: torch.device
    ranks: Ranks
    field: str
    owner: str
    known: PhaseFacts | None = None
    run_steps: int | None = None
    split: str = ""
    is_last: bool = True

    @property
    def facts(self) -> PhaseFacts:
        """What its data decide."""
        assert self.known is not None
        return self.known

    @property
    def examples(self) -> int:
        """Examples of the training set of the task that the field belongs to."""
        return self.facts.examples[self.owner]

    @property
    def most_examples(self) -> int:
        """Examples of the largest training set, after ``first_n``."""
        return max(
            min(count, self.recipe.tasks[task].first_n or count)
            for task, count in self.facts.examples.items()
        )

    @property
    def evaluations(self) -> int:
        """How often the phase scores the dev sets: within epochs, at their ends, at its own."""
        last, of_epoch = self.facts.steps - 1, self.facts.epoch_steps // self.recipe.epochs
        every = self.recipe.eval_every or of_epoch
        return last // every + last // of_epoch - last // math.lcm(every, of_epoch) + 1

    @property
    def texts(self) -> Found:
        """Where the text of the objective that the field belongs to comes from."""
        return self.facts.texts[self.owner]

    @property
    def execution(self) -> str:
        """How steps are run."""
        return execution_kind(self.recipe, self.device, self.ranks)

    @property
    def objective(self) -> ObjectiveRecipe:
        """The objective that the field belongs to."""
        return self.recipe.objectives[self.owner]

    @property
    def source(self) -> TaskSource:
        """The source that the field belongs to."""
        source = self.recipe.tasks[self.owner].source
        assert source is not None
        return source
