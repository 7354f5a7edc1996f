"""The walkthrough takes from the README what a new user would type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import readme_walkthrough
from bench.readme_walkthrough import commands, fill_in
from tests.conftest import REPOSITORY


def test_the_readme_leads_through_everything() -> None:
    found = list(commands((REPOSITORY / "README.md").read_text()))
    programs = ["train", "evaluate", "predict", "export", "report"]
    order = [
        "make train",
        "make setup-dev",
        ". .venv/bin/activate",
        *(f"python -m engine.{program} " for program in programs),
        "python -m examples.score_exported ",
        "python -m examples.five_tasks ",
        "python -m engine.train ",
        "python -m examples.finetune_transformers",
    ]
    places = []
    for beginning in order:
        after = places[-1] + 1 if places else 0
        places.append(
            next(
                i for i, command in enumerate(found) if i >= after and command.startswith(beginning)
            )
        )
    assert places == sorted(places)


def test_placeholders_are_filled_in() -> None:
    command = "python -m engine.train cgs --data DIR --init MODEL --max-steps 1330"
    filled = "python -m engine.train cgs --data /data --init bert --max-steps 7"
    assert fill_in(command, Path("/data"), "bert", 7) == filled
    assert fill_in(command, Path("/data"), "bert", None) == filled.replace(" 7", " 1330")


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
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    record = tmp_path / "results" / "record.json"
    monkeypatch.setattr(readme_walkthrough, "REPOSITORY", repository)
    options = ["--data", str(tmp_path), "--init", "bert", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", ["readme_walkthrough", *options])
    assert readme_walkthrough.main() == 1
    first, second = json.loads(record.read_text())["commands"]
    assert (first["command"], first["status"], first["tail"]) == ("make train", 0, ["trained"])
    assert second["status"] != 0
    assert "engine" in second["tail"][-1]
