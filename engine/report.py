"""``python -m engine.report RUN [RUN …] --out DIR``: what runs tell, as pages and pictures."""

import argparse
from collections.abc import Sequence
from os.path import realpath
from pathlib import Path

import torch
from rich.console import Console

from .cli.common import Parser, print_warnings, run_cli, terminal
from .cli.options import add_device, add_force
from .reporting.comparison import write_comparison
from .reporting.outcomes import collect
from .reporting.page import write_page
from .reporting.series import left_out, write_series
from .reporting.series import possible_files as possible_series_files
from .reporting.series_groups import make_study
from .reporting.series_read import collect as collect_series
from .reporting.systems import possible_files, without_answers, write_systems
from .runs.run import Run, open_run
from .runtime.precision import pick_device
from .utils.errors import InputError
from .utils.file_names import distinct_names
from .utils.files import explained, resolved
from .utils.output_files import check_outputs

COMPARISON = "comparison.html"
"""The page about several runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)

    _check_options(options)
    console, device = terminal(), pick_device(options.device)
    out = resolved(options.out)
    if options.series:
        return _report_series(options, console, device, out)
    if options.papers:
        replace = check_outputs(possible_files(out), force=options.force)
        outcomes = collect(options.runs, device, options.data)
        if options.no_texts:
            outcomes = [outcome.without_texts() for outcome in outcomes]
        for path in write_systems(outcomes, out, replace=replace):
            console.print(f"wrote {path}", soft_wrap=True, highlight=False)
        if missing := without_answers(outcomes):
            console.print(
                f"no heatmap and no mistakes, for want of a checkpoint: {', '.join(missing)}",
                soft_wrap=True,
                highlight=False,
            )
        return 0
    return _report_runs(options, console, device, out)


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.report",
        description="Write a self-contained HTML page for each run: curves, task gradients, "
        "conflict by layer, answers on the dev data, examples that went wrong.  Of several runs "
        "comparison.html has scores, differing settings and curves beside each other.",
    )
    what, where = made.add_argument_group("what to report"), made.add_argument_group("where")
    what.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    what.add_argument(
        "--papers",
        action="store_true",
        help="instead of pages: a table for each paper whose systems were run, its figures beside "
        "ours, and the mistakes of each system (Markdown and PNG); what these are made from is "
        "kept in papers.json; RUN may hold many runs, or be such a file (default: a page "
        "for each run)",
    )
    what.add_argument(
        "--series",
        action="store_true",
        help="instead of pages: a table of the groups of a sweep, and pictures of differences and "
        "of conflict (Markdown and PNG); what these are made from is kept in series.json; RUN is "
        "the folder of a sweep, or such a file (default: a page for each run)",
    )
    what.add_argument(
        "--compare-to",
        metavar="KEY=VALUE,…",
        help="with --series: show paired differences, seed by seed, from the group with these "
        "settings, such as balance=sum (default: no differences)",
    )
    what.add_argument(
        "--tuned",
        metavar="KEY,…",
        help="with --series: of the groups that differ in these settings alone, show the one that "
        "is best at the first seed (default: show all)",
    )
    what.add_argument(
        "--no-texts",
        action="store_true",
        help="with --papers: name the worst examples by their ids alone, where the data are not to "
        "be passed on (default: quote them)",
    )
    where.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where pages go; needed"
    )
    where.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data files (default: each run's own)",
    )
    add_force(where)
    add_device(where)
    return made


def _check_options(options: argparse.Namespace) -> None:
    """Check that options are given with those that they need.

    Raises:
        InputError: one would have no effect.
    """
    if options.no_texts and not options.papers:
        raise InputError("--no-texts: a page quotes its examples; give it with --papers")
    if options.series and options.papers:
        raise InputError("--series: give either it or --papers")
    for name in ("compare_to", "tuned"):
        if getattr(options, name) is not None and not options.series:
            raise InputError(f"--{name.replace('_', '-')}: has no effect without --series")
    if options.tuned is not None and not _keys(options.tuned):
        raise InputError(f"--tuned {options.tuned}: expected KEY,…, such as lr")
    if options.series and options.data is not None:
        raise InputError("--data: has no effect with --series, which reads no data")


def _report_runs(
    options: argparse.Namespace, console: Console, device: torch.device, out: Path
) -> int:
    """Write a page for each run, and one that compares them; return the exit status."""
    pages = _pages(options.runs, out)
    comparison, several = out / COMPARISON, len(pages) > 1
    if several and comparison in pages:
        raise InputError(f"{pages[comparison]}: its page would be {COMPARISON}; rename the folder")
    replace = check_outputs([*pages, *[comparison] * several], force=options.force)
    runs: dict[str, Run] = {}
    for page, folder in pages.items():
        run = open_run(folder)
        if options.data is not None:
            run = run.with_data(options.data)
        with explained("write", out):
            out.mkdir(parents=True, exist_ok=True)
        write_page(run, page, device, replace=replace)
        console.print(f"wrote {page}", soft_wrap=True, highlight=False)
        runs[page.stem] = run
    if several:
        write_comparison(runs, comparison, replace=replace)
        console.print(f"wrote {comparison}", soft_wrap=True, highlight=False)
    return 0


def _report_series(
    options: argparse.Namespace, console: Console, device: torch.device, out: Path
) -> int:
    """Report on the groups of one or several series; return the exit status."""
    replace = check_outputs(possible_series_files(out), force=options.force)
    records = collect_series(options.runs, device)
    print_warnings(
        f"{record.name}: {line}; its steps and conflicts are left out"
        for record in records
        for line in record.without_log
    )
    study = make_study(records, options.compare_to or "", _keys(options.tuned or ""))
    written = set[Path]()
    for path in write_series(records, study, out, replace=replace):
        written.add(path)
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    stale = [path for path in possible_series_files(out) if path not in written and path.exists()]
    for path in stale:
        console.print(
            f"left {path}, of an earlier report: this one has none; remove it",
            soft_wrap=True,
            highlight=False,
        )
    for line in left_out(records, study):
        console.print(line, soft_wrap=True, highlight=False)
    return 0


def _keys(text: str) -> list[str]:
    """Return the keys of ``KEY,KEY``."""
    return [key.strip() for key in text.split(",") if key.strip()]


def _pages(folders: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the folders of runs, each once, by their pages, whose names tell them apart."""
    with explained("look at", folders[0]):
        runs = {Path(realpath(folder)): folder for folder in reversed(folders)}
    names = distinct_names(list(runs))
    pages = {out / f"{name}.html": run for name, run in zip(names, runs.values(), strict=True)}
    return dict(reversed(pages.items()))


if __name__ == "__main__":
    run_cli(main)
