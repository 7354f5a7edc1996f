"""Old names of fields: they work, and whoever gives them is told the new ones."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tomli_w

from engine.config import recipe as recipes
from engine.config.messages import close, names_of
from engine.config.recipe import OF_A_PHASE, Recipe
from engine.config.renamed import RENAMED
from engine.reporting.outcomes import read_outcomes
from engine.runs.run import open_run
from engine.sweep import main as sweep
from engine.train import main as train
from engine.utils.errors import InputError

from ...conftest import REPOSITORY
from ..conftest import TINY
from ..in_process import workers_in_process
from ..whole_runs import written_scores

FIELDS = {
    "surgery": ("balance_granularity", "layer"),
    "order": ("task_schedule", "cycle"),
    "limit": ("max_train_examples", 7),
    "watch_layers": ("log_layer_cosines_every", 3),
    "sinks": ("loggers", ["wandb_offline"]),
    "tasks.sst.features": ("tasks.sst.head", "bilstm"),
    "tasks.sst.first": ("tasks.sst.first_n", 9),
    "objectives.text.limit": ("objectives.text.max_per_source", 8),
}
"""New name and a value, by old name."""
GRID = pytest.mark.parametrize(("old", "new", "value"), [(o, *f) for o, f in FIELDS.items()])


def fields(**others):
    """Return a recipe of a task and an objective, with others put at their dotted names."""
    found = {
        "train": ["sst"],
        "tasks": {"sst": {"head": "single"}},
        "objectives": {"text": {"kind": "simcse"}},
    }
    for key, value in others.items():
        *tables, last = key.split(".")
        table = found
        for name in tables:
            table = table.setdefault(name, {})
        if last == "features":
            table.pop("head")
        table[last] = value
    return found


@pytest.fixture
def write(tmp_path):
    def write(**others):
        path = tmp_path / "own.toml"
        path.write_text(tomli_w.dumps(fields(**others)))
        return str(path)

    return write


def value_of(recipe, key):
    found = recipe.model_dump(mode="json")
    for name in key.split("."):
        found = found[name]
    return found


def test_the_grid_has_every_renamed_field():
    names = [name.replace(".sst.", ".NAME.").replace(".text.", ".NAME.") for name in FIELDS]
    assert names == list(RENAMED)
    assert set(RENAMED.values()) <= set(names_of(Recipe))
    assert not set(RENAMED) & set(names_of(Recipe))


@GRID
def test_in_a_file(write, old, new, value):
    name = write(**{old: value})
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now") as said:
        recipe = recipes.load(name)
    assert [str(one.message) for one in said] == [f"recipe {name}: {old} is {new} now"]
    assert said[0].filename == __file__
    assert value_of(recipe, new) == value
    assert recipe == recipes.load(write(**{new: value}))


@GRID
def test_in_an_override(write, old, new, value):
    name = write()
    setting = recipes.override(old, value)
    recipe, lines = recipes.read(name, [setting, setting])
    assert lines == [f"--set {old}=…: {old} is {new} now"]
    assert value_of(recipe, new) == value


def test_in_a_table_that_an_override_gives(write):
    recipe, lines = recipes.read(write(), ['tasks={sst={features="bilstm", first=2}}'])
    assert (recipe.tasks["sst"].head, recipe.tasks["sst"].first_n) == ("bilstm", 2)
    assert lines == [
        f"--set tasks=…: tasks.sst.{old} is tasks.sst.{new} now"
        for old, new in (("features", "head"), ("first", "first_n"))
    ]


def test_an_override_takes_the_place_of_what_a_file_gives(write):
    for in_file, setting in (("order", "task_schedule"), ("task_schedule", "order")):
        recipe, _ = recipes.read(write(**{in_file: "cycle"}), [f"{setting}=annealed"])
        assert recipe.task_schedule == "annealed"


@pytest.mark.parametrize("old", [old for old, new in RENAMED.items() if new in OF_A_PHASE])
def test_in_a_phase(write, old):
    new, value = FIELDS[old]
    name = write(**{f"phases.a.{old}": value})
    recipe, lines = recipes.read(name)
    line = f"phases.a.{old} is phases.a.{new} now"
    assert lines == [f"recipe {name}: {line}"]
    recipe, lines = recipes.read(write(), [recipes.override(f"phases.a.{old}", value)])
    assert lines == [f"--set phases.a.{old}=…: {line}"]
    assert value_of(recipe.in_phases["a"], new) == value
    assert value_of(recipe, new) != value


@GRID
def test_both_names(write, old, new, value):
    given = fields(**{old: value})
    *tables, last = new.split(".")
    table = given
    for name in tables:
        table = table[name]
    table[last] = value
    path = Path(write())
    path.write_text(tomli_w.dumps(given))
    with pytest.raises(InputError) as raised:
        recipes.load(str(path))
    expected = f"recipe {path}: {old} is {new} now, and both are given; leave out {old}"
    assert str(raised.value) == expected


def test_both_names_in_a_table_that_an_override_gives(write):
    with pytest.raises(InputError) as raised:
        recipes.read(write(), ['tasks.sst={features="single", head="single"}'])
    line = "tasks.sst.features is tasks.sst.head now, and both are given"
    assert str(raised.value) == f"--set tasks.sst=…: {line}; leave out tasks.sst.features"


@GRID
def test_a_misspelt_old_name_is_led_to_the_new_one(old, new, value):
    known = list(names_of(Recipe))
    table, _, last = old.replace(".sst.", ".NAME.").replace(".text.", ".NAME.").rpartition(".")
    prefix = f"{table}." if table else ""
    expected = [new.replace(".sst.", ".NAME.").replace(".text.", ".NAME.")]
    for spelling in (last.upper(), last.replace("_", "-")):
        assert close(prefix + spelling, known) == expected
    assert not set(RENAMED) & {name for word in RENAMED for name in close(f"{word}s", known)}


def test_built_in_recipes_have_new_names():
    with warnings.catch_warnings(action="error"):
        for name in recipes.names():
            recipes.load(name)


OLD_RUN = (
    *("surgery=layer", "order=together", "limit=64", "watch_layers=1", "sinks=[]"),
    *("tasks.sst.features=single", "tasks.sst.first=60"),
)


def old_toml(text):
    """Return a run's recipe.toml as a version before wrote it."""
    for old, new in RENAMED.items():
        text = text.replace(f"\n{new.rpartition('.')[2]} = ", f"\n{old.rpartition('.')[2]} = ")
    return text


def test_a_run_of_an_earlier_version_goes_on_in_silence(tiny_run, capfd):
    objective = ("objectives.text.kind=simcse", "objectives.text.max_per_source=16")
    settings = ("train=['sst','sts']", "schedule=constant", "warmup=0", *objective)
    folder = tiny_run("run", "--max-steps", "1", settings=settings)
    whole = tiny_run("whole", settings=settings)
    file = folder / "recipe.toml"
    new = file.read_text()
    file.write_text(old_toml(new))
    assert all(f"\n{old.rpartition('.')[2]} = " in file.read_text() for old in RENAMED)
    capfd.readouterr()
    with warnings.catch_warnings(action="error"):
        assert open_run(folder).recipe.to_toml() == new
        assert tiny_run("run", "--resume", settings=settings) == folder
    assert " now" not in capfd.readouterr().err
    assert file.read_text() == (whole / "recipe.toml").read_text()
    assert written_scores(folder) == written_scores(whole)


def test_the_command_says_each_old_name_once():
    """Python hides these warnings outside ``__main__``, and ``-W error`` raises them."""
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "engine.train"]
    command += ["demo", "--dry-run", "--set", *TINY, *OLD_RUN, "limit=32"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"warning: --set {old}=…: {old} is {FIELDS[old][0]} now"
        for old in (setting.partition("=")[0] for setting in OLD_RUN)
    ]


def test_a_grid_and_seeds_over_an_old_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.sweep.workers_of", workers_in_process)
    small = ["--set", *TINY, "epochs=1", "max_steps=1"]
    out = tmp_path / "runs"
    grid = ["--grid", "order=together,cycle"]
    assert sweep(["demo", *grid, "--out", str(out), *small]) == 0
    said = "warning: --set order=…: order is task_schedule now\n"
    assert capsys.readouterr().err == said
    for value in ("together", "cycle"):
        run = open_run(out / "demo" / f"order={value}" / "seed-0")
        assert run.recipe.task_schedule == value
    seeds = ["--seeds", "2", "--out", str(tmp_path / "seeds")]
    assert train(["demo", *seeds, *small, "order=cycle"]) == 0
    assert capsys.readouterr().err == said


def test_records_of_papers_are_read_under_new_names():
    outcomes = read_outcomes(REPOSITORY / "bench" / "results" / "papers" / "papers.json")
    assert 6016 in {outcome.recipe.max_train_examples for outcome in outcomes}
    for outcome in outcomes:
        assert not set(RENAMED) & outcome.settings.keys()
        assert all("head" in task for task in outcome.settings["tasks"].values())
