"""Predictions of large files: written as they are made, whole or not at all."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import evaluate, predict, train
from engine.cli import data_progress
from engine.utils.errors import InputError

from ..conftest import REPOSITORY
from .conftest import TINY
from .data.test_pieces import cut

RECIPE = """
train = ["t"]
batch_size = 4
[tasks.t]
head = "single"
[tasks.t.source]
kind = "classification"
text = ["text"]
id = "key"
classes = ["no", "yes"]
files = { train = "rows.csv", dev = "rows.csv" }
"""
HEADER = "key,text,label\n"


def rows(count: int) -> str:
    words = ("fine", "dull", "long", "short", "thin")
    return "".join(f"k{n},a {words[n % 5]} film {n % 7},{n % 2}\n" for n in range(count))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "recipe.toml").write_text(RECIPE)
    content = HEADER + rows(60).replace(",0\n", ",no\n").replace(",1\n", ",yes\n")
    (folder / "rows.csv").write_text(content)
    options = ["--data", str(folder), "--out", str(folder / "run"), "--max-steps", "2"]
    assert train.main([str(folder / "recipe.toml"), *options, "--set", *TINY, "epochs=1"]) == 0
    return folder / "run"


def command(run: Path, source: Path | str, to: Path | str, *more: str) -> list[str]:
    return [str(run), "--task", "t", "--input", str(source), "--output", str(to), *more]


def answers(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [16, 300, 1 << 20])
def test_the_order_is_that_of_the_input(run: Path, tmp_path, monkeypatch, size: int) -> None:
    source = tmp_path / "in.csv"
    source.write_text(HEADER + rows(150))
    cut(monkeypatch, size)
    assert predict.main(command(run, source, tmp_path / "out.tsv", "--probabilities")) == 0
    header, *found = answers(tmp_path / "out.tsv")
    assert header == ["id", "prediction", "probability.no", "probability.yes"]
    assert [row[0] for row in found] == [f"k{number}" for number in range(150)]
    # A row has the answer that it has by itself.
    (tmp_path / "one.csv").write_text(HEADER + rows(150).splitlines()[77] + "\n")
    assert predict.main(command(run, tmp_path / "one.csv", tmp_path / "one.tsv")) == 0
    assert answers(tmp_path / "one.tsv")[1] == found[77][:2]


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_a_bad_row_far_within_leaves_nothing(run: Path, tmp_path, monkeypatch, form: str) -> None:
    source = tmp_path / "in.csv"
    source.write_text(HEADER + rows(500) + "k500,,0\n" + rows(5))
    cut(monkeypatch, 2000)
    out = tmp_path / f"out.{form}"
    with pytest.raises(InputError, match=r"empty sentence: .*in\.csv:502; "):
        predict.main(command(run, source, out))
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
    out.write_text("before")
    with pytest.raises(InputError, match="empty sentence"):
        predict.main(command(run, source, out, "--force"))
    assert out.read_text() == "before"
    assert predict.main(command(run, source, out, "--force", "--on-bad-row", "skip")) == 0
    assert len(out.read_text().splitlines()) == 506 + (form == "tsv")


@pytest.mark.parametrize("content", ["", "\n\n", HEADER])
def test_an_empty_input_leaves_nothing(run: Path, tmp_path: Path, content: str) -> None:
    source = tmp_path / "in.csv"
    source.write_text(content)
    with pytest.raises(InputError, match=r"empty file|no usable row"):
        predict.main(command(run, source, tmp_path / "out.tsv"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def start(*arguments: str, code: str = "", **how: object) -> subprocess.Popen[bytes]:
    """A process that predicts a block of 4 KiB at a time."""
    program = f"""
import sys
from functools import partial
from engine.data import table
from engine.data.blocks import blocks_of
table.blocks_of = partial(blocks_of, size=1 << 12)
from engine.cli.common import run_cli
from engine.predict import main
{code}
run_cli(main)
"""
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=settings, **how)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_one_leaves_no_half_file(run: Path, tmp_path: Path, number: int) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.tsv"
    source.write_text(HEADER + rows(300_000))
    out.write_text("before")
    with start(*command(run, source, out, "--force"), stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob(".out.tsv-*.partial")):
            assert time.monotonic() < until
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(timeout=30)
        process.stderr.read()
    assert out.read_text() == "before"
    if number != signal.SIGKILL:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.tsv"]


def test_what_a_reader_of_a_pipe_gets(run: Path, tmp_path: Path) -> None:
    """As they are made, and the error after them."""
    source = tmp_path / "in.csv"
    source.write_text(HEADER + rows(20_000) + "k500,,0\n")
    with start(*command(run, source, "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        out, error = one.communicate(timeout=60)
    assert one.returncode == 2
    assert out.startswith(b"id\tprediction\nk0\t")
    assert 5000 < out.count(b"\n") <= 20_001
    (line,) = error.decode().splitlines()
    assert line.startswith("error: empty sentence")
    with start(*command(run, source, "-", "--on-bad-row", "skip"), stdout=subprocess.PIPE) as one:
        assert one.stdout.readline() == b"id\tprediction\n"
        one.stdout.close()  # as `head -1` does
    assert one.returncode == 141


def test_memory_does_not_grow_with_the_file(run: Path, tmp_path: Path) -> None:
    peaks = []
    code = (
        "import atexit, resource\n"
        "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"
    )
    for count in (10_000, 110_000):
        source, out = tmp_path / f"{count}.csv", tmp_path / f"{count}.tsv"
        source.write_text(HEADER + rows(count))
        with start(*command(run, source, out), code=code, stdout=subprocess.PIPE) as process:
            said, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert f"wrote {count} predictions" in said.decode()
        peaks.append(int(said.split()[-1]))
        with out.open() as file:
            assert sum(1 for _ in file) == count + 1
    assert peaks[1] - peaks[0] < 40_000, peaks  # KiB


def test_a_file_at_an_address(run: Path, tmp_path: Path, capsys) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(HEADER + rows(30))
    assert predict.main(command(run, source, tmp_path / "by-path.tsv")) == 0
    assert predict.main(command(run, source.as_uri(), tmp_path / "by-address.tsv")) == 0
    assert (tmp_path / "by-address.tsv").read_bytes() == (tmp_path / "by-path.tsv").read_bytes()
    labelled = tmp_path / "labelled.csv"
    labelled.write_text(source.read_text().replace(",0\n", ",no\n").replace(",1\n", ",yes\n"))
    scores = []
    for one in (str(labelled), labelled.as_uri()):
        capsys.readouterr()
        assert evaluate.main([str(run), "--task", "t", "--input", one]) == 0
        scores.append(capsys.readouterr().out.replace(one, ""))
    assert scores[0].splitlines()[-3:] == scores[1].splitlines()[-3:]
    with pytest.raises(InputError, match="no such file, file:///nowhere"):
        predict.main(command(run, "file:///nowhere.csv", tmp_path / "out.tsv"))


@pytest.mark.parametrize("name", [".", "part-*.csv"])
@pytest.mark.parametrize("of", [predict, evaluate])
def test_several_files(of, name: str, run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "part-0.csv").write_text(HEADER + rows(3))
    arguments = command(run, tmp_path / name, tmp_path / "out.tsv")
    with pytest.raises(SystemExit) as ended:
        of.main(arguments if of is predict else arguments[:5])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not one file; give one, or name a folder or pattern as a split" in said


def test_it_says_how_far_it_is(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(data_progress, "_SILENT", 0.0)
    monkeypatch.setattr(data_progress, "_BETWEEN", 0.0)
    cut(monkeypatch, 100)
    (tmp_path / "in.csv").write_text(HEADER + rows(500))
    assert predict.main(command(run, tmp_path / "in.csv", tmp_path / "out.tsv")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reading")]
    assert len(lines) > 2
    assert re.fullmatch(r"reading in\.csv: \d+ of about [\d,]+ rows, .* left", lines[1])
    assert lines[-1].startswith("reading in.csv: 500 of about 500 rows, ")
    assert predict.main(command(run, tmp_path / "in.csv", "-")) == 0
    assert "reading" not in capsys.readouterr().out
