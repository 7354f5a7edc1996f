"""The promises of SECURITY.md about files from elsewhere, through whole commands."""

import csv
import json
import re
from pathlib import Path

import pytest

from engine import export, predict, report, train
from engine.cli.common import run_cli
from engine.data.tokenizer import Tokenizer
from engine.runs.run import open_run
from engine.utils.errors import UNPRINTABLE
from engine.utils.quoting import from_table_cell

IDS = ["=1+1", "+1", "-2", "@x", "'a", "a\tb", "\x1b[2J", 'q"', "\u202ex", "plain", "-x"]


def test_ids_of_predictions_do_nothing_and_are_read_back(tiny_run, tmp_path: Path, capsys) -> None:
    with (tmp_path / "rows.tsv").open("w") as file:
        rows = [["id", "sentence"], *([name, "a fine film"] for name in IDS)]
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    output = tmp_path / "out.tsv"
    options = ["--input", str(tmp_path / "rows.tsv"), "--output", str(output)]
    assert predict.main([str(tiny_run("source")), "--task", "sst", *options]) == 0
    text = output.read_text()
    assert not UNPRINTABLE.search(text.replace("\n", "").replace("\t", ""))
    lines = text.splitlines()
    assert len(lines) == 1 + len(IDS)
    cells = [row[0] for row in csv.reader(lines[1:], delimiter="\t")]
    assert [from_table_cell(cell) for cell in cells] == IDS
    evaluated = [c for c in cells if c.startswith(("=", "+", "-", "@")) and not c[1:].isdecimal()]
    assert evaluated == []
    assert not UNPRINTABLE.search(capsys.readouterr().out.replace("\n", ""))


def test_a_card_and_a_page_quote_what_a_recipe_says(tiny_run, tmp_path: Path) -> None:
    """A run from elsewhere: its recipe's texts are shown, and mean nothing."""
    text = "```\\n<script>alert(1)</script>\\n```` [a](http://b) \\u009b2J"
    run = tiny_run("quoting", "--set", f'description="{text}"')
    assert export.main([str(run), "--to", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert not UNPRINTABLE.search(card.replace("\n", ""))
    fences = [line for line in card.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "`````toml", "`````", *fences[4:]]
    assert report.main([str(run), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / f"{run.name}.html").read_text()
    assert "<script>alert" not in page
    assert not UNPRINTABLE.search(re.sub(r"[\n\t]", "", page))


def test_a_tokenizer_that_crashes_the_library_ends_no_command(
    tiny_run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tiny_run("source"))
    folder = tmp_path / "model"
    assert export.main([str(run.folder), "--to", str(folder)]) == 0
    capfd.readouterr()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train.main(["demo", "--init", str(folder), "--out", str(tmp_path / "r")]))
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: not a tokenizer: ")
    assert err.count("\n") == 1
    assert isinstance(run.tokenizer, Tokenizer)
