"""What the page says of failures: its record's figures, and its commands."""

import json
import re
import shlex

import pytest

from engine.cli.options import overrides, parser
from engine.config import recipe as recipes
from tests.robustness import __main__ as robustness

from ..conftest import REPOSITORY
from .pages import Page

PAGE = Page("failure-recovery")
RESULTS = REPOSITORY / "bench" / "results"
FAULTS = json.loads((RESULTS / "cpu-bf16" / "faults.json").read_text())["results"]


def test_the_commands_are_ones_that_are_taken() -> None:
    resume, *_ = PAGE.commands()
    options = parser().parse_args(shlex.split(resume)[3:])
    assert options.resume
    recipes.load(options.recipe, overrides(options))
    parts = set(re.findall(r"--only ([a-z]+)", PAGE.text))
    assert parts <= robustness.PARTS.keys()


def test_each_field_that_is_named_exists() -> None:
    fields = recipes.load("demo").model_dump()
    named = {"log_every", "keep_checkpoints", "checkpoint_every", "max_skipped", "timeout"}
    named |= {"log_mib", "keep_logs"}
    for name in named:
        assert f"`{name}`" in PAGE.text
        assert name in fields


@pytest.mark.parametrize(
    ("row", "part", "outcomes"),
    [
        ("700 commands", "outputs", ("done", "refused")),
        ("2,000 settings", "settings", ("done", "refused", "status 3")),
        ("300 command lines", "options", ("done", "refused", "status 141")),
        ("500 tokenizers", "files", ("done", "refused")),
    ],
)
def test_the_table_has_the_records_outcomes(row: str, part: str, outcomes: tuple[str, ...]) -> None:
    cases, _, shown = numbers_of(row).partition(" ")
    assert FAULTS[part]["cases"] == int(cases)
    assert shown.split() == [str(FAULTS[part]["outcomes"][name]) for name in outcomes]
    assert sum(map(int, shown.split())) == int(cases)
    assert not FAULTS[part]["problems"]


def test_the_table_has_the_other_figures_of_the_record() -> None:
    kinds = FAULTS["fuzz"]["by_kind"].values()
    refused, read = (sum(kind.get(name, 0) for kind in kinds) for name in ("refused", "read"))
    assert numbers_of("10,000 spoilt") == f"{FAULTS['fuzz']['inputs']} {refused} {read}"
    kills = FAULTS["kills"]
    assert numbers_of("50 kills") == f"{kills['kills']} 9 2 {kills['under_torchrun']}"
    assert (
        numbers_of("50 runs on disks") == f"{FAULTS['disk']['times']} {FAULTS['disk']['stopped']} 1"
    )
    assert numbers_of("10,000 calls").startswith(str(FAULTS["operators"]["calls"]))
    for row, part in (("100 sequences", "sequences"), ("40 pairs", "concurrent")):
        assert numbers_of(row).split()[0] == str(FAULTS[part]["cases"])
        assert not FAULTS[part]["problems"]


@pytest.mark.parametrize("pages", ["", "-small-pages"])
def test_the_long_run_is_the_later_record(pages: str) -> None:
    record = json.loads((RESULTS / "cpu-bf16" / f"faults-endurance{pages}.json").read_text())
    run = record["results"]["endurance"]
    assert run["steps"] == 10_000
    (line,) = re.findall(r"^\| 10,000 steps.*$", PAGE.text, re.MULTILINE)
    for when in ("after_a_tenth", "at_the_end"):
        assert f"{run['resident_mib'][when]:.0f}" in re.findall(r"\d+", line)
    for name in ("open_files", "threads"):
        assert run[name]["at_the_end"] <= run[name]["after_a_tenth"]


def numbers_of(row: str) -> str:
    """Return the whole numbers of a row of the table, with blanks between."""
    (line,) = re.findall(rf"^\| {row}.*$", PAGE.text, re.MULTILINE)
    return " ".join(number.replace(",", "") for number in re.findall(r"\d[\d,]*", line))
