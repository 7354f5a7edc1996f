"""The folder that an example writes its data into."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def new_folder(arguments: Sequence[str] | None) -> Path:
    """Return the folder that a command line names, made; it must not be there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="a new folder")
    folder: Path = parser.parse_args(arguments).folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{folder}: is there already; give a new folder")
    return folder
