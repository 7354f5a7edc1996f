"""Every built-in recipe, from start to end on the demo corpus."""

import json

import pytest

from engine.config import recipe as recipes
from engine.gradients.balancing import METHODS
from engine.runs.scoring import score_names
from engine.train import main

from ..whole_runs import metrics

NAMES = [
    name
    for name in recipes.names()
    if all(task.source is None for task in recipes.load(name).tasks.values())
]
"""Those of the CS224N files and the demo corpus; GLUE's: tests/engine/test_glue.py."""
STEPS = 6  # every task of every recipe has its turn

pytestmark = pytest.mark.long


@pytest.mark.parametrize("recipe", NAMES)
def test_every_recipe_runs_on_the_demo_corpus(recipe, tmp_path):
    folder = tmp_path / "run"
    # In fp32, as on most processors: bf16 products are compiled anew for each number of tokens.
    options = ["--out", str(folder), "--max-steps", str(STEPS), "--set", "precision=fp32"]
    assert main([recipe, *options]) == 0
    settings = recipes.load(str(folder / "recipe.toml"))
    trained = [set(phase.train) for phase in settings.in_phases.values()]
    seen = {name for line in metrics(folder) for name in line["losses"]}
    assert seen == set().union(*trained)
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert scores.keys() == {*score_names(settings), "overall"}


@pytest.mark.parametrize(
    ("recipe", "balance"),
    [(name, list(METHODS)[number % len(METHODS)]) for number, name in enumerate(NAMES)],
)
def test_every_recipe_takes_every_balance(tiny_run, recipe, balance):
    """A method for each recipe, by turns; tests/engine/gradients has every method by itself."""
    folder = tiny_run("run", "--max-steps", "2", recipe=recipe, settings=(f"balance={balance}",))
    assert all(not line["skipped"] for line in metrics(folder))
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert all(abs(score) <= 1 for score in scores.values())


@pytest.mark.parametrize("balance", ["krum", "main_aux"])
def test_where_one_gradient_is_there_is_nothing_to_balance(tiny_run, balance):
    """Methods that need several tasks, or one by name, rest while there is only an objective."""
    settings = (f"balance={balance}", "balancing.main=sst")
    lines = metrics(tiny_run("run", "--max-steps", "1", recipe="superbert", settings=settings))
    assert [line["weights"].keys() for line in lines] == [{"masked_lm"}, {"sst", "quora", "sts"}]
    assert list(lines[0]["weights"].values()) == [1]
