"""Facts about a phase once its data are read and its model is built: sizes, steps, sharing."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from ..data.masked_text import MaskedText
from ..data.rank_examples import RankExamples
from ..data.raw_text import Found
from ..data.sentences_twice import SentencesTwice
from ..data.split import TokenizedSplit
from ..optim.lr_schedule import Schedule
from ..training.trainer import Trainer


class PhaseFacts(NamedTuple):
    """Facts besides the recipe that decide whether a setting has an effect.

    Attributes:
        examples: of the training set of each trained task, before the recipe cuts it.
        texts: of each trained objective.
        schedule: the learning rate, and with it the steps of the phase.
        epoch_steps: steps of all epochs, which ``max_steps`` may cut.
        equal_classes: tasks whose classes all weigh the same.
        separate: whether every trained parameter is reached by one task alone.
        trains_heads: whether a parameter outside the encoder is trained.
    """

    examples: Mapping[str, int]
    texts: Mapping[str, Found]
    schedule: Schedule
    epoch_steps: int
    equal_classes: frozenset[str]
    separate: bool
    trains_heads: bool

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Return the facts about a phase that is about to be trained."""
        sets, parameters = trainer.train_sets, trainer.parameters
        dealt = [each for each in sets if isinstance(each, RankExamples)]
        stages = {stage.name for stage in trainer.model.encoder_stages()}
        return cls(
            {split.task: len(split) for split in sets if isinstance(split, TokenizedSplit)}
            | {each.task: each.report.rows for each in dealt if each.report.found is None},
            {
                text.task: text.found
                for text in sets
                if isinstance(text, MaskedText | SentencesTwice)
            }
            | {each.task: found for each in dealt if (found := each.report.found) is not None},
            trainer.lr_schedule,
            trainer.task_schedule.total_steps,
            frozenset(
                name
                for name in trainer.recipe.train
                if (loss := trainer.model.head(name).class_loss) is None or loss.weights is None
            ),
            all(len(parameters.tasks_using(name)) == 1 for name in parameters.slots),
            any(parameters.specs[name].stage.name not in stages for name in parameters.slots),
        )

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return self.schedule.total_steps
