"""The walkthrough takes from the README what a new user would type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import readme_walkthrough
from bench.readme_walkthrough import commands, fill_in
from tests.conftest import REPOSITORY


def test_the_readme_installs_first_and_leads_through_its_ways() -> None:
    found = list(commands((REPOSITORY / "README.md").read_text()))
    order = [
        "make train",
        "make setup-dev",
        ". .venv/bin/activate",
        "pip install ",
        "superbert train demo ",
        "python -m examples.five_tasks ",
        "python -m engine.train ",
        "python -m examples.finetune_transformers",
    ]
    assert len(found) == len(order)
    assert all(map(str.startswith, found, order))


def test_the_page_on_the_courses_files_leads_through_a_run() -> None:
    found = list(commands((REPOSITORY / "docs" / "course-files.md").read_text()))
    programs = [command.split()[2] for command in found if command.startswith("python")]
    assert programs == ["engine.train", "engine.evaluate", *["engine.predict"] * 6]


def test_placeholders_are_filled_in() -> None:
    command = "python -m engine.train best --data DIR --init MODEL --out runs/best"
    filled = "python -m engine.train best --data /data --init bert --out runs/best"
    assert fill_in(command, Path("/data"), "bert", None) == filled
    assert fill_in(command, Path("/data"), "bert", 7) == f"{filled} --max-steps 7"
    assert fill_in("python -m engine.train five.toml", Path("/data"), "bert", 7).endswith("toml")


def test_a_trial_is_recorded_whatever_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "README.md").write_text(
        "    make train   # the demo\n    . .venv/activate\n    python -m engine.none DIR MODEL\n"
    )
    (repository / "Makefile").write_text(
        "train:\n\t@mkdir .venv && echo export HELLO=1 > .venv/activate && echo trained\n"
    )
    (repository / "docs").mkdir()
    (repository / "docs" / "course-files.md").write_text("    python -m engine.last\n")
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    record = tmp_path / "results" / "record.json"
    monkeypatch.setattr(readme_walkthrough, "REPOSITORY", repository)
    options = ["--data", str(tmp_path), "--init", "bert", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", ["readme_walkthrough", *options])
    assert readme_walkthrough.main() == 1
    first, second, last = json.loads(record.read_text())["commands"]
    assert (first["command"], first["status"], first["tail"]) == ("make train", 0, ["trained"])
    assert second["status"] != 0
    assert "engine" in second["tail"][-1]
    assert last["command"] == "python -m engine.last"
