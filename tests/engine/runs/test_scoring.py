"""The score of a task, by the first of its metrics or the mean of all, and what it decides."""

import numpy as np
import pytest

from engine.config import recipe as recipes
from engine.config.recipe import Recipe
from engine.models.heads import METRICS, Results
from engine.runs.scoring import deciding_score, score_names, task_scores
from engine.utils.errors import InputError

LABELS = [0, 1, 1, 0, 1, 1, 0]
PREDICTIONS = [0, 1, 0, 1, 1, 0, 0]


def recipe(*settings: str) -> Recipe:
    return recipes.load("cgs", settings)


def results(predictions: list[float], labels: list[float]) -> Results:
    return Results(
        predictions=np.array(predictions, dtype=np.float64),
        labels=np.array(labels, dtype=np.float64),
        probabilities=None,
        offsets=np.arange(len(labels) + 1),
    )


TWO = "tasks.quora.metrics=['f1','accuracy']"
MEAN = "tasks.quora.decided_by=mean"


def test_the_mean_is_the_tasks_own_score() -> None:
    """As GLUE scores paraphrases; of 7 answers 2 are true and 1 is a false positive, 2 negative."""
    found = task_scores(recipe(TWO, MEAN), "quora", results(PREDICTIONS, LABELS))
    assert [*found] == ["quora", "quora.f1", "quora.accuracy"]
    assert found["quora.f1"] == pytest.approx(4 / 7)
    assert found["quora.accuracy"] == pytest.approx(4 / 7)
    other = task_scores(recipe(TWO, MEAN), "quora", results([1, 1, 1, 1], [1, 1, 0, 0]))
    assert other == pytest.approx(
        {"quora": (2 / 3 + 1 / 2) / 2, "quora.f1": 2 / 3, "quora.accuracy": 1 / 2}
    )


def test_the_first_metric_decides_otherwise() -> None:
    answers = results([1, 1, 1, 1], [1, 1, 0, 0])
    for settings in ((TWO,), (TWO, "tasks.quora.decided_by=first")):
        found = task_scores(recipe(*settings), "quora", answers)
        assert found == pytest.approx({"quora": 2 / 3, "quora.accuracy": 1 / 2})
    assert [*task_scores(recipe(MEAN), "quora", answers)] == ["quora"]  # of one metric


def test_names_are_those_of_the_scores() -> None:
    for settings in ((), (TWO,), (MEAN,), (TWO, MEAN)):
        made = recipe(*settings)
        of_quora = {name: key for name, key in score_names(made).items() if "quora" in name}
        assert [*of_quora] == [*task_scores(made, "quora", results(PREDICTIONS, LABELS))]
    assert of_quora["quora"] == ("quora", "mean")
    assert of_quora["quora.accuracy"] == ("quora", "accuracy")


def test_a_metric_that_is_not_finite_makes_the_mean_so() -> None:
    found = task_scores(recipe(TWO, MEAN), "quora", results([1, float("nan")], [1, 0]))
    assert all(np.isnan(value) for value in found.values())


def test_a_mean_decides_which_weights_are_best() -> None:
    """Higher is better of it, where the first metric alone may be an error."""
    scores = {"sst": 0.1, "quora": 0.6, "quora.f1": 0.7, "sts": 0.2, "overall": 0.3}
    assert deciding_score(recipe(TWO, MEAN, "best_of=quora"), scores) == 0.6
    error = ("tasks.sts.metrics=['mse','pearson']", "best_of=sts")
    assert deciding_score(recipe(*error), scores) == -0.2


def test_scores_and_errors_have_no_mean() -> None:
    assert METRICS["mse"].sign == -1
    with pytest.raises(InputError, match=r"tasks\.sts\.decided_by: mse is an error"):
        recipe("tasks.sts.metrics=['pearson','mse']", "tasks.sts.decided_by=mean")
    recipe("tasks.sts.metrics=['mse']", "tasks.sts.decided_by=mean")  # one is no mean
    with pytest.raises(InputError, match=r"decided_by.*'first' or 'mean'"):
        recipe("tasks.sts.decided_by=median")
