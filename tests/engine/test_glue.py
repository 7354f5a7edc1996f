"""GLUE by name: all nine tasks trained, scored, answered and submitted, from files laid out so."""

import json
import shutil
from pathlib import Path

import pytest

from engine import evaluate, glue, predict, report, train
from engine.config import recipe as recipes
from engine.exporting.glue import GLUE_FILES
from engine.runs.run import open_run
from engine.utils.errors import InputError

from .conftest import TINY
from .data.glue import TESTS, write_glue

CLASSES = {
    **dict.fromkeys(("CoLA", "SST-2", "MRPC", "QQP", "WNLI"), ("0", "1")),
    **dict.fromkeys(("QNLI", "RTE"), ("entailment", "not_entailment")),
    **dict.fromkeys(("MNLI-m", "MNLI-mm", "AX"), ("entailment", "neutral", "contradiction")),
}
ROWS = {"CoLA": 3, "SST-2": 2, "MRPC": 2, "QQP": 3, "STS-B": 1, "QNLI": 1, "RTE": 2, "WNLI": 1}
ROWS |= dict.fromkeys(("MNLI-m", "MNLI-mm", "AX"), 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, its data in the folder beside it."""
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "data")
    options = ["--data", str(folder / "data"), "--out", str(folder / "run"), "--max-steps", "2"]
    assert train.main(["glue", *options, "--set", *TINY]) == 0
    return folder / "run"


@pytest.fixture
def data(run: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be changed."""
    return Path(shutil.copytree(run.parent / "data", tmp_path / "data"))


def submit(run: Path, to: Path, *options: str) -> dict[str, list[list[str]]]:
    """Return the rows of each file of a submission, without its ending."""
    assert glue.main([str(run), "--to", str(to), *options]) == 0
    return {
        path.stem: [line.split("\t") for line in path.read_text().splitlines()]
        for path in to.iterdir()
    }


def refused(message: str, *arguments: str, command=glue) -> None:
    with pytest.raises(InputError, match=message) as error:
        command.main([*arguments])
    assert "\n" not in str(error.value)


def test_scores_are_those_of_glue(run: Path) -> None:
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    two = {"mrpc": ("f1", "accuracy"), "qqp": ("f1", "accuracy"), "stsb": ("pearson", "spearman")}
    assert {name for name in scores if "." in name} == {
        f"{task}.{metric}" for task, metrics in two.items() for metric in metrics
    }
    for task, metrics in two.items():
        mean = sum(scores[f"{task}.{metric}"] for metric in metrics) / 2
        assert scores[task] == pytest.approx(mean)
    of_tasks = [scores[task] for task in recipes.load("glue").tasks]
    assert len(of_tasks) == 9
    assert scores["overall"] == pytest.approx(sum(of_tasks) / 9)
    metrics = {task: settings.metrics for task, settings in recipes.load("glue").tasks.items()}
    assert metrics == {
        "cola": ("matthews",),
        **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), ("accuracy",)),
        **two,
    }


def test_a_further_split_is_scored_by_its_name(run: Path, capsys) -> None:
    written = (run / "metrics.json").read_text()
    capsys.readouterr()
    shown = {}
    for split in ("dev", "dev_mismatched"):
        assert evaluate.main([str(run), "--task", "mnli", "--split", split]) == 0
        lines = capsys.readouterr().out.splitlines()
        (skipped,) = [line for line in lines if "skipped" in line]
        assert skipped.startswith(
            "mnli: 1 rows skipped (label is not among the classes); the first"
        )
        shown[split] = "\n".join(line for line in lines if line != skipped)
        assert f"{split} scores of step" in shown[split]
    # The mismatched rows are the same ones in another order.
    assert shown["dev"] == shown["dev_mismatched"].replace("dev_mismatched", "dev")
    assert (run / "metrics.json").read_text() == written

    for message, *options in (
        ("no dev_mismatched split of cola, .*, wnli; .* by --task: mnli$", "dev_mismatched"),
        ("--split matched: no matched split; cola, .* has train, dev, test, dev_mism", "matched"),
        ("--split diagnostic: no diagnostic split; rte has train, dev, test$", "diagnostic", "rte"),
        ("no column '2' in the header, .*CoLA/test.tsv:1", "test"),
    ):
        split, *task = options
        given = ["--split", split, *(["--task", *task] if task else [])]
        refused(message, str(run), *given, command=evaluate)


def test_a_split_is_predicted_by_its_name(run: Path, tmp_path: Path) -> None:
    """CoLA's test file has a header and other columns than the files that it was trained on."""
    options = [str(run), "--output", str(tmp_path / "out.tsv"), "--force", "--task"]
    for task, split, rows in (("cola", "test", 3), ("mnli", "test_mismatched", 2)):
        assert predict.main([*options, task, "--split", split]) == 0
        lines = (tmp_path / "out.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["id", *map(str, range(rows))]
    assert predict.main([*options, "cola", "--split", "dev"]) == 0  # its labels are not read
    assert len((tmp_path / "out.tsv").read_text().splitlines()) == 5

    test = str(run.parent / "data" / "CoLA" / "test.tsv")
    for message, *given in (
        ("--input, --split: give one of the two", "cola"),
        ("--input, --split: give one of the two", "cola", "--split", "dev", "--input", test),
        ("--split none: no none split; cola has train, dev, test$", "cola", "--split", "none"),
        ("--data: has no effect on the file", "cola", "--input", test, "--data", str(tmp_path)),
        ("--input-format: ", "cola", "--split", "test", "--input-format", "tsv"),
        ("cannot read a file: .*CoLA/dev", "cola", "--split", "dev", "--data", str(tmp_path)),
        ("no column '4' in the first row", "cola", "--input", test),
    ):
        refused(message, *options, *given, command=predict)
    refused(
        "is the file that is read",
        *[str(run), "--task", "cola", "--split", "test", "--force", "--output", test],
        command=predict,
    )


def test_a_submission_has_a_line_for_every_row(run: Path, tmp_path: Path, capsys) -> None:
    found = submit(run, tmp_path / "new" / "to")
    assert found.keys() == ROWS.keys()
    for name, (header, *rows) in found.items():
        assert header == ["index", "prediction"]
        assert [index for index, _ in rows] == [str(number) for number in range(ROWS[name])]
        for _, prediction in rows:
            if name == "STS-B":
                assert 0 <= float(prediction) <= 5
            else:
                assert prediction in CLASSES[name]
    shown = capsys.readouterr().out
    assert f"wrote {sum(ROWS.values())} predictions to {tmp_path / 'new' / 'to'}: CoLA.tsv" in shown
    assert "without" not in shown
    assert {file.name for file in GLUE_FILES} == {f"{name}.tsv" for name in ROWS}

    predictions = tmp_path / "mnli.tsv"
    options = ["--task", "mnli", "--split", "test_mismatched", "--output", str(predictions)]
    assert predict.main([str(run), *options]) == 0
    assert predictions.read_text().splitlines()[1:] == [
        "\t".join(row) for row in found["MNLI-mm"][1:]
    ]


def test_what_is_left_out_is_said(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    (data / "diagnostic" / "diagnostic.tsv").unlink()
    made = open_run(run)
    left = {task: settings for task, settings in made.recipe.tasks.items() if task != "rte"}
    mnli = left["mnli"].source
    files = {name: file for name, file in mnli.files.items() if name != "test_mismatched"}
    left["mnli"] = left["mnli"].model_copy(
        update={"source": mnli.model_copy(update={"files": files})}
    )
    recipe = made.recipe.model_copy(update={"tasks": left, "train": tuple(left)})
    folder = tmp_path / "run"
    options = ["--data", str(data), "--out", str(folder), "--max-steps", "1"]
    (tmp_path / "eight.toml").write_text(recipe.to_toml())
    assert train.main([str(tmp_path / "eight.toml"), *options]) == 0
    capsys.readouterr()
    found = submit(folder, tmp_path / "to")
    assert found.keys() == ROWS.keys() - {"RTE", "AX", "MNLI-mm"}
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == [
        "without MNLI-mm.tsv: the recipe names no test_mismatched split of mnli",
        "without RTE.tsv: the run has no task rte",
        f"without AX.tsv: {data / 'diagnostic' / 'diagnostic.tsv'} is not there",
    ]


def test_a_bad_row_is_refused_or_answered_all_the_same(
    run: Path, data: Path, tmp_path: Path, capsys
) -> None:
    test, to = data / "QQP" / "test.tsv", tmp_path / "to"
    test.write_text(TESTS["QQP"] + "3\tWhat is\n4\t\tIs it?\n5\tIs it?\tIs it?\n")
    refused("number of fields: 2, .*QQP/test.tsv:5", str(run), "--to", str(to), "--data", str(data))
    assert not to.exists()
    found = submit(run, to, "--data", str(data), "--on-bad-row", "skip")
    assert [index for index, _ in found["QQP"][1:]] == [str(number) for number in range(6)]
    assert {prediction for _, prediction in found["QQP"][1:]} <= {*CLASSES["QQP"]}
    shown = capsys.readouterr().out
    for reason in ("number of fields", "empty sentence"):
        assert f"QQP.tsv: 1 rows answered as empty texts ({reason})" in shown


def test_nothing_is_written_where_something_is_wrong(run: Path, data: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    (data / "WNLI" / "test.tsv").unlink()
    refused("cannot read a file: .*WNLI/test.tsv", str(run), "--to", str(to), "--data", str(data))
    empty = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(empty / "checkpoints")
    refused("no checkpoint yet", str(empty), "--to", str(to))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    refused("holds something already", str(run), "--to", str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_other_tasks_are_none_of_glues(run: Path, tiny_run, tmp_path: Path) -> None:
    demo = tiny_run("demo", "--max-steps", "1")
    refused("has no test file of a GLUE task", str(demo), "--to", str(tmp_path / "to"))
    other = shutil.copytree(run, tmp_path / "run")
    recipe = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(recipe.replace('"not_entailment"', '"other"'))
    refused("GLUE wants the classes entailment, not_ent.* of qnli", str(other), "--to", "to")


def test_a_report_has_all_tasks(run: Path, tmp_path: Path) -> None:
    assert report.main([str(run), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "run.html").read_text()
    for label in ("mrpc: mean", "stsb: mean", "cola: matthews"):
        assert label in page


def test_without_data_one_line_says_so(tmp_path: Path) -> None:
    for given, message in (
        (
            [],
            "CoLA/train.tsv is relative to the folder of the data files, and not beside the "
            "recipe; name that folder with --data",
        ),
        (["--data", str(tmp_path)], "cannot read a file: .*CoLA/train.tsv"),
        (["--data", str(tmp_path / "none")], "no such folder"),
    ):
        refused(message, "glue", "--out", str(tmp_path / "run"), *given, command=train)
        assert not (tmp_path / "run").exists()
