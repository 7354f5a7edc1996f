"""What the trial takes out of the README is what a new user would type."""

from pathlib import Path

from bench.new_user import commands, fill_in
from tests.conftest import REPOSITORY


def test_the_readme_leads_through_everything() -> None:
    found = list(commands((REPOSITORY / "README.md").read_text()))
    doors = ["train", "evaluate", "predict", "export", "report"]
    order = [
        "make train",
        "make setup-dev",
        ". .venv/bin/activate",
        *(f"python -m engine.{door} " for door in doors),
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
