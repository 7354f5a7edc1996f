"""Data of a recipe's file, looked for beside it."""

from pathlib import Path

import pytest

from engine.config import recipe as recipes
from engine.data.hf_datasets import load_split
from engine.utils.errors import InputError

FILES = """
train = ["moods"]
[tasks.moods]
head = "single"
[tasks.moods.source]
kind = "classification"
text = ["text"]
classes = 2
files = { train = "NAME", dev = "dev.csv" }
"""
DATASET = FILES.replace('files = { train = "NAME", dev = "dev.csv" }', 'dataset = "moods"')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a recipe, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def load(folder: Path, text: str, *overrides: str) -> recipes.Recipe:
    """Read a recipe from a file in a folder."""
    (folder / "recipe.toml").write_text(text)
    return recipes.load("mine/recipe.toml", overrides)


@pytest.mark.parametrize("name", ["train.csv", "part-*.csv", "parts"])
def test_files_beside_the_recipe_are_found_without_data(folder: Path, name: str) -> None:
    text = FILES.replace("NAME", name)
    assert load(folder, text).data == ""
    for file in ("train.csv", "part-1.csv"):
        (folder / file).touch()
    (folder / "parts").mkdir()
    recipe = load(folder, text)
    assert recipe.data == str(folder)
    assert load(folder, text, "data=elsewhere").data == "elsewhere"


def test_tasks_with_built_in_files_keep_the_demo_corpus(folder: Path) -> None:
    (folder / "train.csv").touch()
    text = FILES.replace("NAME", "train.csv") + '[tasks.sst]\nhead = "single"\n'
    assert load(folder, text).data == ""


@pytest.mark.parametrize("place", ["mine/data", "mine"])
def test_a_data_set_is_looked_for_in_data_and_beside_the_recipe(folder: Path, place: str) -> None:
    (folder / "data").mkdir()
    assert load(folder, DATASET).tasks["moods"].source.dataset == "moods"
    (folder.parent / place / "moods").mkdir()
    found = load(folder, DATASET, "data=mine/data").tasks["moods"].source.dataset
    assert found == str(folder.parent / place / "moods")
    Path("moods").mkdir()  # as before: one of the working folder comes first
    assert load(folder, DATASET).tasks["moods"].source.dataset == "moods"


def test_a_data_set_that_is_nowhere_is_said_to_be_looked_for(folder: Path) -> None:
    with pytest.raises(InputError) as error:
        load_split("no/such/set", "", "train")
    assert "beside the recipe: check dataset, subset and splits" in str(error.value)
    with pytest.raises(InputError) as error:
        load_split(str(folder), "", "train")
    assert "beside the recipe" not in str(error.value)
