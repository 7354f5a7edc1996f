"""Define the command line of ``engine.train`` and the options that other commands share."""

import argparse
import itertools
from os.path import isdir
from pathlib import Path

from ..config import recipe as recipes
from ..runs.data_paths import reads_data_folder
from ..runs.run import Run
from ..utils.errors import InputError
from .common import Parser, positive
from .data_progress import add_reading

PROGRAM = f"python -m {__package__.rpartition('.')[0]}.train"


def parser() -> Parser:
    """Return the parser of ``engine.train``."""
    made = Parser(
        prog=PROGRAM,
        description="Train one BERT on several tasks.",
        epilog="A recipe's fields, with their defaults: --fields.",
    )
    _add_training(made.add_argument_group("what to train"))
    _add_place(made.add_argument_group("where"))
    _add_looking(made.add_argument_group("to look around; nothing is trained"))
    return made


def overrides(options: argparse.Namespace) -> list[str]:
    """Turn the options that are recipe fields into overrides; ``--set`` comes last and wins."""
    # Folders by their full names, so that the run can be resumed and scored from anywhere.
    init = options.init
    if init is not None and isdir(init):
        init = str(Path(init).absolute())
    fields = {
        "data": options.data and str(options.data.absolute()),
        "init": init,
        "max_steps": options.max_steps,
        "seed": getattr(options, "seed", None),
        "on_bad_row": options.on_bad_row,
    }
    named = [recipes.override(key, value) for key, value in fields.items() if value is not None]
    return [*named, *itertools.chain.from_iterable(options.set)]


def add_settings(group: argparse._ActionsContainer) -> None:
    """Add the options that are recipe fields, but for the seed, and ``--set``."""
    add = group.add_argument
    add(
        "--data", type=Path, metavar="DIR", help="folder of the data files (default: a demo corpus)"
    )
    add(
        "--init",
        metavar="MODEL",
        help="pretrained encoder of BERT's family: a folder in the Hugging Face layout or a hub "
        "name; or a run's folder, whose encoder, heads and adapters are taken (default: train from "
        "scratch)",
    )
    add(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop after N steps, of each phase (default: after the epochs)",
    )
    add(
        "--on-bad-row",
        choices=["error", "skip"],
        help="what a malformed data row does: end the run, or be counted (default: error)",
    )
    add(
        "--set",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace any field of the recipe, such as lr=1e-4 tasks.sts.head=cosine "
        "(default: the recipe's own)",
    )


def add_force(group: argparse._ActionsContainer) -> None:
    """Add ``--force``."""
    group.add_argument(
        "--force",
        action="store_true",
        help="replace files that are there already (default: refuse to, or ask on a terminal)",
    )


def add_run_data(group: argparse._ActionsContainer) -> None:
    """Add ``--data`` of a command on a run."""
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data files (default: the run's own)"
    )


def with_run_data(run: Run, folder: Path | None) -> Run:
    """Return a run with the data folder that ``--data`` names, if it names one.

    Raises:
        InputError: no file of the run is looked for there.
    """
    if folder is None:
        return run
    if not reads_data_folder(run.recipe):
        raise InputError(
            f"--data {folder}: no file of the tasks of {run.folder} is looked for there; leave it "
            "out"
        )
    return run.with_data(folder)


def add_device(group: argparse._ActionsContainer) -> None:
    """Add ``--device``."""
    group.add_argument(
        "--device", metavar="D", help="cpu or cuda (default: the GPU if there is one)"
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a built-in recipe's name or a TOML file")
    add("--seed", type=int, metavar="N", help="decides weights, batches, dropout (default: 0)")
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="train N runs, under the seed and those that follow (default: one run)",
    )
    add_settings(group)


def _add_place(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE-N)")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, if any (default: begin a run)",
    )
    add_device(group)
    add_reading(group)


def _add_looking(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--list", action="store_true", help="show the built-in recipes, a line each")
    add("--fields", action="store_true", help="show every field of a recipe and its default")
    add(
        "--dry-run",
        action="store_true",
        help="show the resolved recipe and what it needs: memory, and time by a few trial steps",
    )
    add(
        "--completion",
        choices=["bash"],
        help=f'print a script that completes options and --set: eval "$({PROGRAM} --completion '
        'bash)"',
    )
