"""The nine tasks of GLUE as their files are written, read by the sources of the recipe ``glue``."""

from pathlib import Path

import pytest

from engine.config import recipe as recipes
from engine.data.origins import DataFile
from engine.runs.data_paths import origin, splits_of
from engine.utils.errors import InputError

from .glue import FILES, write_glue
from .written import read

FIRST = {
    "cola": ('The "cat sat on the mat.', 1),
    "sst2": ('a " fine film ', 1),
    "mrpc": ('"The rates rose, he said.', 1),
    "qqp": ('What is "this?', 0),
    "stsb": ('"A man plays.', 5),
    "mnli": ('He said "yes.', 1),
    "qnli": ('Who wrote "it?', 0),
    "rte": ('The "Oak fell in May.', 0),
    "wnli": ("The cup broke as it fell on the stone.", 1),
}
"""First sentence and label of each training set."""
ROWS = {"cola": 4, "qqp": 2, "mnli": 3}
"""Of each training set; of others two."""
TEST_ROWS = {"cola": 3, "qqp": 3, "stsb": 1, "qnli": 1, "wnli": 1}
RECIPE = recipes.load("glue")
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP"}
"""Of the tasks in whose files a quote begins a field and never closes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data") / "glue"
    write_glue(made)
    return made


@pytest.mark.parametrize("task", FIRST)
def test_every_file_of_a_task(task: str, folder: Path) -> None:
    recipe = RECIPE.model_copy(update={"data": str(folder)})
    for split in splits_of(recipe, task):
        labelled = split.startswith(("train", "dev"))
        table = origin(recipe, task, split).table(
            recipe.split_schema(task, split), labelled=labelled, on_bad_row="skip"
        )
        bad = {"number of fields": 1} if task == "qqp" and labelled else {}
        if task == "mnli" and split.startswith("dev"):
            bad = {"label is not among the classes": 1}
        assert (table.bad_rows, table.notes) == (bad, ())
        if split == "train":
            assert (table.sentences[0][0], table.labels[0]) == FIRST[task]
            assert len(table) == ROWS.get(task, 2)
            if task == "cola":
                assert table.sentences[0][3] == '"Whole sentences may be quoted"'
        elif not labelled:
            assert len(table) == TEST_ROWS.get(task, 2)
            assert table.ids == [str(number) for number in range(len(table))]


def test_every_file_is_named(folder: Path) -> None:
    recipe = RECIPE.model_copy(update={"data": str(folder)})
    named = set[Path]()
    for task in recipe.tasks:
        for split in splits_of(recipe, task):
            file = origin(recipe, task, split)
            assert isinstance(file, DataFile)
            named.add(file.path)
    assert named == set(folder.rglob("*.tsv"))


@pytest.mark.parametrize("task", FOLDERS)
def test_quotes_begin_no_field(task: str) -> None:
    """Read as CSV has them they are an error that names the field to set."""
    source = RECIPE.tasks[task].source
    assert source is not None
    content = FILES[FOLDERS[task]].replace(b"1\t3\t4\tHow do I\n", b"")
    fields = source.model_dump(exclude={"quoting", "files", "of_split"}, exclude_unset=True)
    with pytest.raises(InputError, match='quoting = "none"'):
        read(content, "train.tsv", **fields)
