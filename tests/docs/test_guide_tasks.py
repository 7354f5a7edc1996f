"""The guide's five tasks, trained by the commands that it gives."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from engine import evaluate, predict, train
from engine.data import demo
from engine.data.formats import FORMATS
from engine.data.read import Table, read_table
from tests.conftest import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "guide-tasks.md").read_text(encoding="utf-8")
DOORS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}
VERDICTS = ("bad", "bad", "fair", "good", "good")
SMALL = ["--set", "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "limit=64"]


def delimited(path: Path, header: list[str], rows: list[tuple], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *rows])


def write_split(folder: Path, split: str, tables: dict[str, Table]) -> None:
    """Write the files of four tasks, in four layouts, from the demo corpus."""
    reviews, grades = tables["sst"].sentences[0], tables["sst"].labels.astype(int)
    verdicts = [VERDICTS[grade] for grade in grades]
    delimited(
        folder / f"reviews-{split}.csv",
        ["review", "verdict"],
        list(zip(reviews, verdicts, strict=True)),
        ",",
    )
    stars = list(zip(reviews, (grades + 1).tolist(), strict=True))
    delimited(folder / f"stars-{split}.tsv", ["review", "stars"], stars, "\t")
    same = tables["quora"].labels.astype(int).tolist()
    pairs = zip(*tables["quora"].sentences, same, strict=True)
    lines = (json.dumps({"first": a, "second": b, "same": label}) for a, b, label in pairs)
    (folder / f"duplicates-{split}.jsonl").write_text("\n".join(lines) + "\n")
    left, right = tables["sts"].sentences
    columns = {"left": left, "right": right, "score": tables["sts"].labels / 5}
    parquet.write_table(pa.table(columns), folder / f"similarity-{split}.parquet")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who follows the guide."""
    monkeypatch.chdir(tmp_path)
    source, folder = tmp_path / "demo", tmp_path / "corpus"
    demo.write_demo(source)
    folder.mkdir()
    for split in ("train", "dev"):
        forms = {task: FORMATS[task] for task in ("sst", "quora", "sts")}
        tables = {task: read_table(form.file(source, split), form) for task, form in forms.items()}
        write_split(folder, split, tables)
    names = ["people", "animals", "things", "places"]
    words = ["doctors sailors farmers", "dogs cats hounds", "cars boats cups", "town forest hills"]
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    texts = [" ".join(rng.choice(words[label].split(), 5)) for label in labels]
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    data = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    (tmp_path / "topics").mkdir()
    data.to_parquet(tmp_path / "topics" / "train.parquet")
    return folder


def test_the_guide_can_be_followed(corpus: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    Path("five.toml").write_text(recipe)
    commands = re.findall(r"^    python -m engine\.(\w+) (.*)$", GUIDE, re.MULTILINE)
    assert [door for door, _ in commands] == ["train", "evaluate", "predict"]
    for door, arguments in commands:
        small = SMALL if door == "train" else []
        assert DOORS[door]([*shlex.split(arguments), *small]) == 0

    tasks = {"reviews", "stars", "duplicates", "similarity", "topics"}
    assert json.loads(Path("five/metrics.json").read_text())["scores"].keys() == tasks | {"overall"}
    header, *rows = Path("verdicts.tsv").read_text().splitlines()
    assert header == "id\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(len(rows))]
    assert {row.split("\t")[1] for row in rows} <= {"bad", "fair", "good"}


def test_the_heads_of_the_files_are_as_shown(corpus: Path) -> None:
    assert (corpus / "reviews-train.csv").read_text().splitlines()[0] in GUIDE
    shown = re.search(r'^    (\{"first".*\})$', GUIDE, re.MULTILINE)
    first = json.loads((corpus / "duplicates-train.jsonl").read_text().splitlines()[0])
    assert json.loads(shown[1]).keys() == first.keys()
