"""The page on sweeps: its commands on tiny runs, and what it says that they write."""

import json
import re
import shlex
from pathlib import Path

import pytest

from engine import report, sweep, train
from engine.utils.errors import InputError

from ..engine.conftest import TINY
from ..engine.in_process import workers_in_process
from .pages import Page

PAGE = Page("sweeps")
STEPS = ["--max-steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which all tests of this file run, as the commands of the page do."""
    path = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("engine.sweep.workers_of", workers_in_process)
        yield path


def run(section: str | None = None, *changes: str) -> None:
    """Run the sweeps and reports of a section."""
    programs = {"sweep": sweep.main, "report": report.main}
    for command in PAGE.commands(section):
        program, *arguments = shlex.split(command.removeprefix("python -m engine."))
        small = [*changes, "--set", *TINY] if program == "sweep" else []
        assert programs[program]([*arguments, *small]) == 0


def table(printed: str) -> list[list[str]]:
    """The lines of the last table of a sweep, their cells."""
    lines = printed.splitlines()
    (first,) = [number for number, line in enumerate(lines) if re.match(r"run +\w", line)][-1:]
    return [re.split(r" {2,}", line.strip()) for line in lines[first:] if "  " in line]


def test_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    first = PAGE.text[: PAGE.text.index("\n## ")]
    (command,) = [found for found in PAGE.commands() if found in first.replace("\\\n", " ")]
    arguments = [*shlex.split(command)[3:], *STEPS, "--set", *TINY]
    assert sweep.main(arguments) == 0
    header, *rows = table(capsys.readouterr().out)
    shown = re.search(r"^    (run .*)\n    (demo .*)$", first, re.MULTILINE)
    assert header == shown[1].split()
    assert [row[:1] + row[2:3] for row in rows] == [["demo", "2"]] * 3
    assert {row[1] for row in rows} == {"3e-4", "1e-3", "3e-3"}
    assert shown[2].split()[0] == "demo"

    results = Path("runs/rates/results.json")
    assert len(json.loads(results.read_text())) == 6
    written = {path: path.stat().st_mtime_ns for path in Path("runs/rates").rglob("metrics.json")}
    assert sweep.main(arguments) == 0  # again: nothing is trained
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(InputError, match="other settings"):
        sweep.main([*arguments, "dropout=0.3"])


def test_every_option_of_the_table() -> None:
    options = {
        option
        for line in re.findall(r"^\| .* \| (`.*) \|$", PAGE.text, re.M)
        for option in re.findall(r"--[a-z-]+", line)
    }
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert options == {
        *("--grid", "--seeds", "--tune", "--random", "--draw", "--halving", "--min-steps"),
        *("--jobs", "--prune", "--minutes", "--compare-to"),
    }


def test_a_learning_rate_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    run("A learning rate for each method", *STEPS)
    out = Path("runs/methods")
    # 9 runs of the first seed, and 6 of the others.
    assert len([*out.rglob("metrics.json")]) == 9 + 6
    _, *rows = table(capsys.readouterr().out)
    assert {row[1] for row in rows[:3]} == {"sum", "pcgrad", "cagrad"}
    assert len(json.loads((out / "tuned.json").read_text())) == 3
    assert not [*out.rglob("model.safetensors")]  # --prune
    assert (out / "demo/balance=sum,lr=1e-3/seed-0").is_dir()


def test_random_draws() -> None:
    run("Random draws", "--random", "5", *STEPS)
    names = [*json.loads(Path("runs/random/results.json").read_text())]
    assert len(names) == 5
    rates = [float(re.search(r"lr=([\d.e-]+)", name)[1]) for name in names]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


def test_halving() -> None:
    (command,) = PAGE.commands("Stop bad settings early")
    assert "--random 27" in command
    assert "--min-steps 150 --eta 3 --max-steps 1350" in command
    small = command.replace("--min-steps 150", "--min-steps 1").replace("1350", "9")
    arguments = [*shlex.split(small)[3:], "--random", "9", "--set", *TINY, "epochs=9"]
    assert sweep.main(arguments) == 0
    assert len(json.loads(Path("runs/halving/results.json").read_text())) == 1
    # As the page adds it up.
    assert (27 * 150 + 9 * 300 + 3 * 900, 27 * 1350) == (9450, 36450)


def test_two_runs() -> None:
    for name, rate in (("a", "1e-3"), ("b", "1e-2")):
        arguments = ["demo", "--out", f"runs/{name}", *STEPS]
        assert train.main([*arguments, "--set", *TINY, f"lr={rate}"]) == 0
    (command,) = PAGE.commands("Compare two runs")
    pages = Path("two")
    assert report.main(shlex.split(command.replace("--out pages", "--out two"))[3:]) == 0
    assert {path.name for path in pages.iterdir()} == {"a.html", "b.html", "comparison.html"}
    text = (pages / "comparison.html").read_text()
    for shown in ("<td>lr</td>", "<td>0.001</td>", "<td>0.01</td>", 'alt="Conflict rate"'):
        assert shown in text


def test_groups(capsys: pytest.CaptureFixture[str]) -> None:
    run("Compare groups of runs", *STEPS)
    assert "overall against balance=sum" in capsys.readouterr().out
    found = {path.name for path in Path("pages").iterdir()}
    assert found == {"series.md", "differences.png", "conflict.png", "series.json"}
    named = set(re.findall(r"^- `([\w.]+)`: ", PAGE.section("Compare groups of runs"), re.M))
    assert named == found
    text = Path("pages/series.md").read_text()
    assert "95 %" in text
    assert "conflict rate" in text
