"""``python -m engine.report RUN [RUN …] --out DIR``: what runs tell, as pages and pictures."""

from collections.abc import Sequence
from os.path import realpath
from pathlib import Path

from .cli.common import Parser, run_cli, terminal
from .cli.options import add_device, add_force
from .reporting.outcomes import collect
from .reporting.page import write_page
from .reporting.systems import possible_files, without_answers, write_systems
from .runs.run import open_run
from .runtime.precision import pick_device
from .utils.errors import InputError
from .utils.file_names import distinct_names
from .utils.files import explained, resolved
from .utils.output_files import check_outputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(
        prog=f"python -m {__package__}.report",
        description="Write a self-contained HTML page for each run: curves, task gradients, "
        "conflict by layer, answers on the dev data, examples that went wrong.",
    )
    what, where = parser.add_argument_group("what to report"), parser.add_argument_group("where")
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
    options = parser.parse_args(arguments)

    if options.no_texts and not options.papers:
        raise InputError("--no-texts: a page quotes its examples; give it with --papers")
    console, device = terminal(), pick_device(options.device)
    out = resolved(options.out)
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
    pages = _pages(options.runs, out)
    replace = check_outputs(pages, force=options.force)
    for page, folder in pages.items():
        run = open_run(folder)
        if options.data is not None:
            run = run.with_data(options.data)
        with explained("write", out):
            out.mkdir(parents=True, exist_ok=True)
        write_page(run, page, device, replace=replace)
        console.print(f"wrote {page}", soft_wrap=True, highlight=False)
    return 0


def _pages(folders: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the folders of runs, each once, by their pages, whose names tell them apart."""
    with explained("look at", folders[0]):
        runs = {Path(realpath(folder)): folder for folder in reversed(folders)}
    names = distinct_names(list(runs))
    pages = {out / f"{name}.html": run for name, run in zip(names, runs.values(), strict=True)}
    return dict(reversed(pages.items()))


if __name__ == "__main__":
    run_cli(main)
