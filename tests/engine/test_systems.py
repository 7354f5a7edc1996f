"""Every built-in recipe, from start to end on the demo corpus."""

import json

import pytest

from engine import recipe as recipes

from .runs import metrics

NAMES = recipes.names()


@pytest.mark.parametrize("recipe", NAMES)
def test_every_recipe_runs_on_the_demo_corpus(tiny_run, recipe):
    folder = tiny_run("run", "--max-steps", "20", recipe=recipe)
    settings = recipes.load(str(folder / "recipe.toml"))
    trained = [set(phase.train) for phase in settings.in_phases.values()]
    seen = {name for line in metrics(folder) for name in line["losses"]}
    assert seen == set().union(*trained)
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert scores.keys() == {*settings.tasks, "overall"}


@pytest.mark.parametrize("recipe", ["superbert", "mtb-cosine-simcse-pals", "three-phase-lstm"])
def test_another_balance_works_in_phases_too(tiny_run, recipe):
    lines = metrics(
        tiny_run("run", "--max-steps", "2", recipe=recipe, settings=("balance=cagrad",))
    )
    assert all(not line["skipped"] for line in lines)
