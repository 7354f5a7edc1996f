"""The report on a series of runs: a table, pictures, and what they are made from."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..utils.files import explained
from ..utils.output_files import write_output
from . import series_table
from .series_conflict import conflict
from .series_forest import differences
from .series_groups import Study
from .series_record import SeriesRecord, to_json

RECORD, TABLE = "series.json", "series.md"
DIFFERENCES, CONFLICT = "differences.png", "conflict.png"


def possible_files(out: Path) -> list[Path]:
    """Return the files that :func:`write_series` writes, and those that it might."""
    return [out / name for name in (RECORD, TABLE, DIFFERENCES, CONFLICT)]


def write_series(
    records: Sequence[SeriesRecord], study: Study, out: Path, *, replace: bool = False
) -> Iterator[Path]:
    """Write the report on some series; yield each file when it is there.

    Args:
        records: of the series.
        study: of them.
        out: the folder, made if missing.
        replace: whether files that are there are replaced.

    Raises:
        InputError: a file is there, or cannot be written.
    """
    with explained("write", out):
        out.mkdir(parents=True, exist_ok=True)
    write = partial(write_output, replace=replace)
    write(out / RECORD, to_json(records))
    yield out / RECORD
    write(out / TABLE, series_table.markdown(study, records))
    yield out / TABLE
    if has_differences(study):
        write(out / DIFFERENCES, differences(study))
        yield out / DIFFERENCES
    picture = conflict(study)
    if picture is not None:
        write(out / CONFLICT, picture)
        yield out / CONFLICT


def has_differences(study: Study) -> bool:
    """Return whether a group shares a seed and a score with its baseline."""
    return any(
        found is not None
        for comparisons in study.compared.values()
        for comparison in comparisons.values()
        for found in comparison.differences.values()
    )


def left_out(records: Sequence[SeriesRecord], study: Study) -> Iterator[str]:
    """Yield a line for each thing that a report on some series does not have."""
    unfinished = sum(len(record.unfinished) for record in records)
    if unfinished:
        yield f"runs without a result: {unfinished}, named in {TABLE}"
    if study.asked and not has_differences(study):
        yield f"no {DIFFERENCES}: no group shares a seed and a score with its baseline"
    if not any(group.conflict_rates for group in study.groups):
        yield f"no {CONFLICT}: no log has a step of two tasks"
