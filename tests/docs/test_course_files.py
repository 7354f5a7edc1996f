"""The course's files, read by the commands of the page and written in the course's format."""

import re
import shlex
from pathlib import Path

import pytest

from engine import evaluate, predict, train
from engine.data.task_schema import FORMATS
from tests.docs.pages import DOCS, Page

PAGE = Page("course-files")
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}
ROWS = {"sst": (1101, 2210), "quora": (2021, 4043), "sts": (863, 1725)}
HEADERS = {
    "sst": ("sst", "id \t Predicted_Sentiment \n", r"[0-4]"),
    "quora": ("para", "id \t Predicted_Is_Paraphrase \n", r"[01]"),
    "sts": ("sts", "id \t Predicted_Similiary \n", r"\d\.\d+"),
}
SMALL = ["--set", "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=64"]


def run(command: str, data: Path) -> None:
    _, _, program, *arguments = shlex.split(command.replace("DIR", str(data)))
    small = [*SMALL, "max_steps=2"] if program == "engine.train" else []
    at = arguments.index("--init") if small else 0
    kept = arguments[:at] + arguments[at + 2 :] if small else arguments  # a BERT from scratch
    assert PROGRAMS[program.removeprefix("engine.")]([*kept, *small]) == 0


def test_from_the_files_to_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made, scored, *predicted = PAGE.commands()
    run(made, real_data)
    run(scored, real_data)
    Path("outputs").mkdir()
    for command in predicted:
        run(command, real_data)
    PAGE.run_python()
    for task, (name, header, label) in HEADERS.items():
        for split, count in zip(("dev", "test"), ROWS[task], strict=True):
            with open(f"predictions/{name}-{split}-output.csv") as file:
                first, *lines = file
            assert first == header
            assert len(lines) == count
            assert all(re.fullmatch(rf"[0-9a-f]{{25}} , {label} \n", line) for line in lines)
    shown = PAGE.blocks("text")[0].splitlines(keepends=True)
    assert shown[0] == HEADERS["sst"][1]
    first_id = Path("predictions/sst-test-output.csv").read_text().splitlines()[1].split()[0]
    assert shown[1].split()[0] == first_id


def test_the_names_of_files_and_columns() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`.*?) \| (`.*?) \| ", PAGE.text, re.M)
    assert [task for task, *_ in rows] == ["sst", "quora", "sts", "cfimdb"]
    for task, files, columns in rows:
        form = FORMATS[task]
        names = [f"{form.stem}-{part}.csv" for part in ("train", "dev", "test-student")]
        assert re.findall(r"`(.*?)`", files) == names
        assert re.findall(r"`(.*?)`", columns) == [form.id, *form.sentences, form.label]


def test_the_scores_are_those_of_the_results() -> None:
    results = (DOCS / "results.md").read_text()
    (row,) = re.findall(r"^\| `best`, the seed .*? \| (.*) \|$", PAGE.text, re.M)
    *scores, overall = row.split(" | ")
    assert f"| `best`, our own | | {', '.join(scores)} | **{overall}** |" in results
    assert ".720 on average under [five others](#what-the-scores-show)" in results
