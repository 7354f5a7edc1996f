"""Tables of balancing methods in ``docs/results.md`` say what the records of the runs say."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.reporting.series_groups import Group, Study, make_study, settings_of
from engine.reporting.series_record import read_records
from engine.reporting.series_table import difference_cell
from engine.runs.experiments import mean_and_deviation
from tests.conftest import REPOSITORY

RECORDS = REPOSITORY / "bench/results/balancing"
SECTION = (
    (REPOSITORY / "docs/results.md")
    .read_text(encoding="utf-8")
    .partition("## Which balancing method")[2]
    .partition("\n## ")[0]
)
# What a table follows, or has in its head: its record, and what was tuned.
TABLES = {
    "Three tasks:": ("three_tasks", ["lr", "balancing.fixed"]),
    "Five tasks:": ("five_tasks", ["lr", "balancing.fixed"]),
    "eight further seeds": ("three_tasks-fresh", []),
    "`best`, five seeds": ("best", []),
    "generated sentences": ("demo", ["lr"]),
}


def rows_after(text: str) -> list[dict[str, str]]:
    """Return the rows of the first table that has a text in its head, or follows it, by column."""
    table = re.search(rf"{re.escape(text)}.*?(?=\n\n|\Z)", SECTION.replace(":\n\n|", ":\n|"), re.S)
    assert table is not None, text
    lines = [line for line in f"| {table[0]}".splitlines() if line.startswith("| ")]
    cells = [
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        for line in lines
        if line != f"| {text}"
    ]
    head = ["method", *cells[0][1:]]
    return [dict(zip(head, row, strict=True)) for row in cells[2:]]


def study_of(record: str, tuned: list[str]) -> Study:
    return make_study(read_records(RECORDS / f"{record}.json"), "balance=sum", tuned)


def name_of(group: Group, record: str) -> str | None:
    """Return what the docs call a group; None of a task alone, which is in the text."""
    settings = settings_of(group)
    if group.series == f"{record}-weights" or settings.get("balance") == "fixed":
        return f"weights `{settings['balancing.fixed'].strip('{}').replace(',', ', ')}`"
    if "balance" not in settings:
        return None
    name = f"`{settings['balance']}`"
    if record == "demo":
        name = f"`{group.recipe}`, {name}"
    parts = settings.get("balance_granularity")
    return f"{name}, by {parts}" if parts else name


def cells_of(study: Study, group: Group) -> Iterator[tuple[str, str]]:
    """Yield the columns of a group, as the docs spell them."""
    yield "lr", settings_of(group).get("lr", "")
    for score in study.main_scores:
        values = list(group.scores(score).values())
        if score == "overall":
            yield score, mean_and_deviation(values)
        else:
            mean = f"{statistics.mean(values):.3f}" if values else ""
            yield {"quora": "Quora"}.get(score, score.upper()), mean
    yield "from the sum", "" if study.is_baseline(group) else difference_cell(study, group)
    cosines = group.sum_cosines
    yield "cosine", f"{statistics.mean(cosines):.2f}" if cosines else ""


@pytest.mark.parametrize("text", TABLES)
def test_the_figures_are_those_of_the_record(text: str) -> None:
    record, tuned = TABLES[text]
    study = study_of(record, tuned)
    ordered = sorted(study.groups, key=lambda group: group.recipe)
    groups = {name: group for group in ordered if (name := name_of(group, record))}
    rows = rows_after(text)
    assert [row["method"].strip("*") for row in rows] == list(groups)
    for row, group in zip(rows, groups.values(), strict=True):
        expected = dict(cells_of(study, group))
        shown = {column: cell for column, cell in row.items() if column != "method"}
        assert shown == {column: expected[column] for column in shown}, row["method"]


def test_every_record_has_a_table() -> None:
    """But large batches, of which the text has single figures, and noise, which has no scores."""
    records = {Path(file).stem for file in RECORDS.glob("*.json")}
    assert records - {"large_batches", "noise"} == {record for record, _ in TABLES.values()}
