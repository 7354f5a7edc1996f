"""Progress of large files, and the options of how data are read."""

import io
from argparse import Namespace
from pathlib import Path

import pytest
from rich.console import Console

from engine import evaluate, predict, sweep, train
from engine.cli import data_progress
from engine.cli.common import terminal
from engine.cli.data_progress import reading_of
from engine.cli.options import parser
from engine.data import cache as cache_module
from engine.data.cache import Reading, load_split
from engine.data.tokenizer import Tokenizer
from engine.runs import texts

from ..conftest import TINY
from ..data.test_pieces import cut
from ..data.written import source
from ..in_process import workers_in_process

PLAIN = Namespace(workers=0, verify_data=False)


class Clock:
    """Stands for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(data_progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console(*, on_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, force_terminal=on_terminal, force_interactive=on_terminal, width=200
    ), file


def test_a_log_has_a_line_now_and_then(clock: Clock) -> None:
    log, file = console(on_terminal=False)
    with reading_of(PLAIN, log).watch("rows.csv") as show:
        for second in range(1, 100):
            clock.now = 100.0 + second
            show(1000 * second, second / 200)
    lines = file.getvalue().splitlines()
    assert lines[0] == ("reading rows.csv: 2,000 of about 200,000 rows, 1,000 rows/s, 0:03:18 left")
    assert [line.split()[2] for line in lines] == ["2,000", "32,000", "62,000", "92,000"]


def test_small_files_are_not_mentioned(clock: Clock) -> None:
    for on_terminal in (False, True):
        log, file = console(on_terminal=on_terminal)
        with reading_of(PLAIN, log).watch("rows.csv") as show:
            clock.now += 1.9
            show(10, 1.0)
        assert file.getvalue() == ""


def test_a_terminal_has_one_line_that_goes(clock: Clock) -> None:
    log, file = console(on_terminal=True)
    with reading_of(PLAIN, log).watch("[b]rows.csv") as show:
        for _ in range(5):
            clock.now += 3
            show(3000, 0.5)
    said = file.getvalue()
    assert "3,000 of about 6,000 rows" in said
    assert said.count("\x1b[?25l") == 1  # the cursor is hidden once
    assert said.endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or "\x1b[2K" in said


@pytest.mark.parametrize(
    ("rows", "share", "line"),
    [
        (1499, 0.999, "1,499 of about 2,000 rows, 150 rows/s, 0:00:00 left"),
        (1200, 1.0, "1,200 of about 1,200 rows, 120 rows/s, 0:00:00 left"),
        (400, 0.0, "400 rows, 40 rows/s"),
        (0, 0.1, "0 of about 0 rows, 0 rows/s, 0:01:30 left"),
    ],
)
def test_what_a_line_says(clock: Clock, rows: int, share: float, line: str) -> None:
    log, file = console(on_terminal=False)
    with reading_of(PLAIN, log).watch("f") as show:
        clock.now += 10
        show(rows, share)
    assert file.getvalue() == f"reading f: {line}\n"


def test_the_share_of_files(tmp_path: Path, monkeypatch, clock: Clock) -> None:
    """Of several files, compressed or not, it grows to all."""
    for part in range(3):
        (tmp_path / f"{part}.csv").write_text("text,label\n" + "fine film,1\n" * 50)
    cut(monkeypatch, 20)
    found = source(files={"train": "*.csv"}).origin("t", "train", tmp_path)
    shares, rows = [], []

    def show(count: int, share: float) -> None:
        rows.append(count)
        shares.append(share)

    class Watch:
        def __init__(self, name: str) -> None:
            assert name == "0.csv and 2 more"

        def __enter__(self) -> object:
            return show

        def __exit__(self, *_: object) -> None:
            pass

    words = Tokenizer.train(["fine film"] * 3, 60)
    form = source().format("t")
    cache = tmp_path / "cache"
    load_split(found, form, words, 16, cache=cache, reading=Reading(1, watch=Watch))
    assert rows[-1] == 150
    assert sorted(shares) == shares
    assert 0 < shares[0] < 0.4
    assert shares[-1] == 1.0


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "1025", "", "9" * 30])
@pytest.mark.parametrize("program", [train, evaluate, sweep])
def test_bad_numbers_of_workers(program, capsys, value: str) -> None:
    with pytest.raises(SystemExit) as end:
        program.main([f"--workers={value}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --workers:")
    assert error.count("\n") == 1


def test_good_numbers_of_workers() -> None:
    for given, workers in ([], 0), (["--workers", "1"], 1), (["--workers", "64"], 64):
        options = parser().parse_args(["demo", *given, "--verify-data"])
        reading = reading_of(options, terminal())
        assert (reading.workers, reading.verify) == (workers, True)


def test_predict_has_no_such_options(capsys) -> None:
    """It keeps nothing, so there is nothing to verify, and answering takes longer than reading."""
    with pytest.raises(SystemExit):
        predict.main(["run", "--task", "t", "--input", "f", "--output", "g", "--workers", "2"])
    assert "unrecognized arguments: --workers 2" in capsys.readouterr().err


def test_commands_pass_them_on(tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[int, bool]] = []
    split, vocabulary = cache_module.load_split, texts.load_vocabulary

    def load(*given, reading: Reading, **named):
        seen.append((reading.workers, reading.verify))
        return split(*given, reading=reading, **named)

    def learn(*given, **named):
        seen.append((-1, False))
        return vocabulary(*given, **named)

    monkeypatch.setattr("engine.runs.run.load_split", load)
    monkeypatch.setattr(texts, "load_vocabulary", learn)
    monkeypatch.setattr(sweep, "workers_of", workers_in_process)
    how = ["--workers", "3", "--verify-data"]
    settings = ["--max-steps", "1", "--set", *TINY]
    run = tmp_path / "run"
    for program, given in (
        (train, ["demo", "--out", str(run), *settings]),
        (train, ["demo", "--out", str(run), "--resume", *settings]),
        (train, ["demo", "--out", str(tmp_path / "seeds"), "--seeds", "1", *settings]),
        (sweep, ["demo", "--out", str(tmp_path / "sweep"), *settings]),
        (evaluate, [str(run)]),
    ):
        seen.clear()
        assert program.main([*given, *how]) == 0
        assert {(3, True)} == set(seen) - {(-1, False)}, given


def test_a_run_of_a_sweep_shares_the_cores(tmp_path: Path, monkeypatch) -> None:
    seen: list[Reading] = []
    monkeypatch.setattr(sweep, "usable_cpus", lambda: 8)
    monkeypatch.setattr(sweep, "share_cores", lambda _jobs: None)
    monkeypatch.setattr(sweep, "train_job", lambda *given: seen.append(given[-1]))
    for jobs, asked in ((1, 0), (3, 0), (16, 0), (3, 5)):
        sweep.train_one(None, None, jobs, Reading(asked))
    assert [reading.workers for reading in seen] == [8, 2, 1, 5]
