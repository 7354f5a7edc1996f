"""Predictions: tables, JSON lines, plain text, probabilities, and the object loaded once."""

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest

from engine import predict, train
from engine.cli.common import run_cli
from engine.predict import Prediction, Predictor
from engine.utils import untrusted_io
from engine.utils.errors import UNPRINTABLE, InputError
from engine.utils.quoting import from_table_cell

from .conftest import TINY

VERDICTS = ["=1+1", "a\tb", 'so "so"']
TOPICS = ["film", "music", "-x"]
RECIPE = f"""
train = ["verdict", "stars", "same", "joint", "topics", "names", "finds"]
batch_size = 4
[tasks.verdict]
head = "single"
[tasks.verdict.source]
kind = "classification"
text = ["text"]
id = "key"
label = "verdict"
classes = {json.dumps(VERDICTS)}
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.stars]
head = "single"
[tasks.stars.source]
kind = "regression"
text = ["text"]
label = "stars"
range = [1, 5]
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.same]
head = "difference"
[tasks.same.source]
kind = "pair_classification"
text = ["text", "other"]
label = "same"
classes = 2
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.joint]
head = "cross"
[tasks.joint.source]
kind = "pair_classification"
text = ["text", "other"]
label = "same"
classes = 2
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.finds]
head = "cosine"
[tasks.finds.source]
kind = "retrieval"
text = ["text", "other", "text2"]
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.topics]
head = "single"
[tasks.topics.source]
kind = "multi_label_classification"
text = ["text"]
label = "topics"
classes = {json.dumps(TOPICS)}
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
[tasks.names]
head = "tokens"
[tasks.names.source]
kind = "token_classification"
text = ["words"]
label = "tags"
classes = ["O", "B-PER", "I-PER"]
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
"""
SENTENCES = ["a fine film by ada lee", "dull music", "the plot of ada was thin and long"]
OTHERS = ["a good film", "dull music", "it rained"]
TASKS = ("verdict", "stars", "same", "joint", "finds", "topics", "names")
WITHOUT_SHARES = ("stars", "finds")


def rows() -> list[dict]:
    return [
        {
            "key": f"={number}+1",
            "text": text,
            "other": other,
            "text2": "it snowed",
            "words": text.split(),
            "verdict": VERDICTS[number],
            "stars": 1.5 + number,
            "same": number % 2,
            "topics": TOPICS[:number],
            "tags": ["B-PER" if word == "ada" else "O" for word in text.split()],
        }
        for number, (text, other) in enumerate(zip(SENTENCES, OTHERS, strict=True))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a task of each kind."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows() * 4))
    options = ["--data", str(folder), "--out", str(folder / "run"), "--max-steps", "2"]
    settings = [*TINY, "epochs=1", "max_length=9"]
    assert train.main([str(folder / "recipe.toml"), *options, "--set", *settings]) == 0
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder / "run"


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run, device="cpu")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def examples(task: str) -> list:
    pairs = list(zip(SENTENCES, OTHERS, strict=True))
    return pairs if task in ("same", "joint", "finds") else SENTENCES


def command(run: Path, task: str, output: Path, *options: str, input_: str = "") -> str:
    source = input_ or str(run.parent / "in.jsonl")
    where = ["--input", source, "--output", str(output)]
    assert predict.main([str(run), "--task", task, *where, *options]) == 0
    return output.read_text(encoding="utf-8") if output.is_file() else ""


def table(text: str) -> list[list[str]]:
    cells = list(csv.reader(io.StringIO(text), delimiter="\t"))
    return [[from_table_cell(cell) for cell in row] for row in cells]


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> str:
    """The one line by which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: predict.main([str(run), *options]))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("task", TASKS)
def test_all_forms_of_an_answer_agree(run, predictor, tmp_path, stdin, capsys, task):
    """The table, JSON lines, plain text from standard input to standard output, the object."""
    answers = predictor(task, examples(task))
    shares = [] if task in WITHOUT_SHARES else ["--probabilities"]
    (header, *found) = table(command(run, task, tmp_path / "out.tsv", *shares))
    plain = table(command(run, task, tmp_path / "plain.tsv"))
    assert plain == [row[:2] for row in (header, *found)]
    for cell in (tmp_path / "out.tsv").read_text().replace("\n", "\t").split("\t"):
        assert not cell.startswith(("=", "+", "@", "-"))
        assert not UNPRINTABLE.search(cell)
    lines = command(run, task, tmp_path / "out.jsonl", *shares).splitlines()
    records = [json.loads(line) for line in lines]
    ids = ["=0+1", "=1+1", "=2+1"] if task == "verdict" else ["0", "1", "2"]
    assert [row[0] for row in found] == [record["id"] for record in records] == ids

    given = examples(task)
    text = "\n".join("\t".join(each) if isinstance(each, tuple) else each for each in given)
    stdin(text.encode())
    capsys.readouterr()
    command(run, task, Path("-"), *shares, input_="-")
    shown = capsys.readouterr()
    assert [row[1:] for row in table(shown.out)] == [row[1:] for row in (header, *found)]
    assert "wrote 3 predictions to standard output" in shown.err

    for answer, row, record in zip(answers, found, records, strict=True):
        assert row[1] == spelt(task, answer)
        if task in WITHOUT_SHARES:
            assert record["prediction"] == pytest.approx(answer.prediction, rel=1e-6)
            assert answer.probabilities is None
            assert "probabilities" not in record
            continue
        assert record["prediction"] == answer.prediction
        if task == "names":
            assert record["words"] == answer.words
            cut_off = [share is None for share in answer.probabilities]
            assert [share is None for share in record["probabilities"]] == cut_off
            assert [each == "_" for each in row[2].split()] == cut_off
            known = [share for share in answer.probabilities if share is not None]
            assert [s for s in record["probabilities"] if s is not None] == pytest.approx(known)
            written = [float(each) for each in row[2].split() if each != "_"]
            assert written == pytest.approx(known, abs=1e-6)
        else:
            assert record["probabilities"] == pytest.approx(answer.probabilities, rel=1e-6)
            assert header[2:] == [f"probability.{name}" for name in answer.probabilities]
            written = [float(cell) for cell in row[2:]]
            assert written == pytest.approx([*answer.probabilities.values()], abs=1e-6)


def spelt(task: str, answer: Prediction) -> str:
    if task in WITHOUT_SHARES:
        return f"{answer.prediction:.4f}"
    if task == "topics":
        return ",".join(answer.prediction) or "[]"
    if task == "names":
        return " ".join(answer.prediction)
    return str(answer.prediction)


def test_answers_are_of_their_kinds(predictor):
    assert predictor.tasks == TASKS
    (verdict, *_) = predictor("verdict", SENTENCES)
    assert verdict.prediction in VERDICTS
    assert list(verdict.probabilities) == VERDICTS
    assert sum(verdict.probabilities.values()) == pytest.approx(1)
    assert verdict.prediction == max(verdict.probabilities, key=verdict.probabilities.get)
    (same, *_) = predictor("same", examples("same"))
    assert same.prediction in (0, 1)
    assert list(same.probabilities) == ["0", "1"]
    (topics, *_) = predictor("topics", SENTENCES)
    assert topics.prediction == [n for n, share in topics.probabilities.items() if share > 0.5]
    assert 1 <= predictor("stars", SENTENCES)[0].prediction <= 5


def test_a_word_that_is_cut_off_has_a_tag_and_no_probability(predictor):
    words = ["ada"] * 20
    (answer,) = predictor("names", [words])
    assert answer.words == words
    assert len(answer.prediction) == len(answer.probabilities) == 20
    assert answer.prediction[-1] == "O"
    assert answer.probabilities[-1] is None
    assert 0 < answer.probabilities[0] <= 1
    assert predictor("names", [" ".join(words)]) == [answer]


def test_nothing_is_read_after_loading_and_threads_share(run, predictor, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    loaded = Predictor(str(tmp_path / "run"), device="cpu")
    shutil.rmtree(tmp_path / "run")
    expected = {task: predictor(task, examples(task)) for task in TASKS}
    found: dict[str, list[Prediction]] = {}

    def work(task: str) -> None:
        found[task] = loaded(task, examples(task))

    threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert loaded("verdict", []) == []


def test_vectors_do_not_depend_on_their_neighbours(predictor):
    vectors = predictor.embed([*SENTENCES, ""])
    assert vectors.shape == (4, 32)
    assert vectors.dtype == np.float32
    for sentence, vector in zip(SENTENCES, vectors, strict=False):
        np.testing.assert_allclose(predictor.embed([sentence])[0], vector, atol=1e-5)
    assert predictor.embed([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("cfimdb", ["x"], "task 'cfimdb': .* has verdict, stars"),
        ("verdict", "a film", "expected a list of them, got one str"),
        ("verdict", iter(["x"]), "expected a list"),
        ("verdict", ["x", " "], "example 1: an empty text"),
        ("verdict", [("x", "y")], "example 0: expected a text, got tuple"),
        ("verdict", ["\ud800"], "half of a character"),
        ("same", ["x"], "example 0: expected a pair"),
        ("same", [("x", "y", "z")], "expected a pair"),
        ("same", [("x", None)], "expected a text, got NoneType"),
        ("names", [[]], "no words"),
        ("names", [["a", ""]], "an empty text"),
        ("names", [3], "expected texts, got int"),
    ],
)
def test_bad_examples_are_refused_in_one_line(predictor, task, given, message):
    with pytest.raises(InputError, match=message) as raised:
        predictor(task, given)
    assert "\n" not in str(raised.value)


def test_bad_settings_of_the_object_are_refused(run, predictor, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Predictor(tmp_path)
    with pytest.raises(InputError, match="precision 'fp64'"):
        Predictor(run, precision="fp64")
    with pytest.raises(InputError, match="device nowhere"):
        Predictor(run, device="nowhere")
    with pytest.raises(InputError, match="sentences: expected a list"):
        predictor.embed("a film")


@pytest.mark.parametrize(
    ("task", "content", "options", "message"),
    [
        ("verdict", b"", [], "empty, standard input; give a sentence a line"),
        ("verdict", b"\n \n", [], "empty, standard input"),
        ("verdict", b"", ["--input-format", "csv"], "empty, standard input; give rows"),
        ("verdict", b"\x89PNG\xff\xfe", [], "not UTF-8: byte 0x89 at 1, standard input:1"),
        ("verdict", b"a\0b\n", ["--input-format", "text"], "NUL character"),
        ("verdict", b"a\n\nb\n", [], "empty line: nothing in it, standard input:2"),
        ("verdict", b"key\ttext\n1\tx\n", [], "its first line names the columns of a table"),
        ("verdict", b'{"key": 1, "text": "x"}\n', [], "its first line is a JSON object"),
        ("verdict", b"x\n", ["--input-format", "tsv"], "no column 'key'"),
        ("same", b"a\tb\tc\n", [], "number of sentences: 3, expected 2 with a tab between"),
        ("names", b"a b", ["--input-format", "conll"], "columns of this file are called 1, 2"),
        ("stars", b"x\n", ["--probabilities"], r"--probabilities: stars has none"),
        ("cfimdb", b"x\n", [], "--task 'cfimdb'"),
        ("finds", b"x\n", ["--top", "3"], "--top 3: has no effect without --passages"),
        ("same", b"x\n", ["--passages", "p.tsv"], "--passages: same finds none, its kind is"),
        ("finds", b"x\n", ["--passages", "p.tsv"], "no such file or directory, p.tsv"),
    ],
)
def test_bad_standard_input_is_refused(run, stdin, capsys, task, content, options, message):
    stdin(content)
    given = ["--task", task, "--input", "-", "--output", "-", *options]
    assert message in refusal(capsys, run, *given)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", "standard input: more than 20 bytes, half of what is free in "),
        ("refused", "cannot read standard input: no space left on device; give a file"),
        ("no folder", "cannot read standard input: no usable temporary directory found"),
        ("closed", "cannot read standard input: it is closed; give a file"),
    ],
)
def test_standard_input_that_cannot_be_kept(run, stdin, capsys, monkeypatch, fault, message):
    stdin(b"a film\n" * 4)
    monkeypatch.setattr(untrusted_io, "_IN_MEMORY", 16)
    monkeypatch.setattr(untrusted_io, "_PIECE", 7)
    if fault == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40))
    elif fault == "closed":
        monkeypatch.setattr(sys, "stdin", None)
    else:
        code, text = {
            "refused": (errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "no folder": (errno.ENOENT, "No usable temporary directory found"),
        }[fault]

        def fail(*_: object, **__: object) -> NoReturn:
            raise OSError(code, text)

        monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert message in refusal(capsys, run, "--task", "verdict", "--input", "-", "--output", "-")


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_standard_input_in_other_formats(run, predictor, tmp_path, stdin, monkeypatch, kept):
    if kept == "in a file":
        monkeypatch.setattr(untrusted_io, "_IN_MEMORY", 16)
        monkeypatch.setattr(untrusted_io, "_PIECE", 7)
    expected = [answer.prediction for answer in predictor("verdict", SENTENCES)]
    contents = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows()),
        "json": json.dumps(rows()),
        "tsv": "key\ttext\n" + "".join(f"{row['key']}\t{row['text']}\n" for row in rows()),
        "csv": "text,key\n" + "".join(f"{row['text']},{row['key']}\n" for row in rows()),
    }
    for name, content in contents.items():
        stdin(content.encode())
        options = ["--input-format", name, "--output-format", "jsonl", "--force"]
        text = command(run, "verdict", tmp_path / "out", *options, input_="-")
        found = [json.loads(line) for line in text.splitlines()]
        assert [record["prediction"] for record in found] == expected
        assert [record["id"] for record in found] == [row["key"] for row in rows()]
        assert found[0].keys() == {"id", "prediction"}


def test_a_text_file_with_odd_lines(run, tmp_path, capsys):
    """Brackets are words like others, a header is a sentence, skipped lines keep their places."""
    (tmp_path / "in.txt").write_text('text\n["ada"]\n\n=1+1\n')
    options = ["--input-format", "text", "--on-bad-row", "skip", "--probabilities"]
    source = str(tmp_path / "in.txt")
    for task in ("verdict", "names"):
        tsv = table(command(run, task, tmp_path / f"{task}.tsv", *options, input_=source))
        assert [row[0] for row in tsv] == ["id", "0", "1", "2", "3"]
        assert set(tsv[3][1:]) == {""}
        assert len(tsv[3]) == len(tsv[0])
        text = command(run, task, tmp_path / f"{task}.jsonl", *options, input_=source)
        records = [json.loads(line) for line in text.splitlines()]
        assert records[2]["prediction"] is records[2]["probabilities"] is None
        if task == "names":
            words = [record["words"] for record in records]
            assert words == [["text"], ['["ada"]'], None, ["=1+1"]]
    assert "1 rows without a prediction (empty line)" in capsys.readouterr().out


def test_an_unknown_ending_names_the_option(run, tmp_path, capsys):
    source = tmp_path / "texts.txt"
    source.write_text("a film\n")
    given = ["--task", "verdict", "--input", str(source), "--output", str(tmp_path / "o.tsv")]
    assert "texts.txt: unknown ending; name its format by --input-format" in refusal(
        capsys, run, *given
    )
    assert command(run, "verdict", tmp_path / "o.tsv", "--input-format", "text", input_=str(source))


@pytest.mark.parametrize("name", ["out.json", "out.parquet", "out.jsonl.gz", "out.xlsx"])
def test_endings_of_other_formats_are_refused(run, tmp_path, capsys, name):
    source = str(run.parent / "in.jsonl")
    given = ["--task", "verdict", "--input", source, "--output", str(tmp_path / name)]
    assert "files are not written" in refusal(capsys, run, *given)
    assert list(tmp_path.iterdir()) == []


def test_the_command_imports_nothing_that_takes_long(run, tmp_path):
    """What other commands plot, score, compile or load with."""
    slow = "{'torch._dynamo', 'torch.distributed.checkpoint', 'sklearn', 'scipy', 'matplotlib',"
    slow += "'datasets', 'pyarrow', 'transformers', 'pandas', 'sympy', 'triton'}"
    code = "import sys; from engine import predict; status = predict.main(sys.argv[1:])"
    code += f"; print(status, sorted({slow} & sys.modules.keys()))"
    source = str(run.parent / "in.jsonl")
    options = ["--task", "verdict", "--input", source, "--output", str(tmp_path / "out.tsv")]
    command = [sys.executable, "-c", code, str(run), *options]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("\n0 []\n")
