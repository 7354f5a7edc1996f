"""Run the commands of the first pages as a newcomer would.

    python3 -m bench.readme_walkthrough --data DIR --init MODEL --json FILE

Clones the repository into a fresh folder and runs the commands of the README (those of the section
Install first) and of the page on the course's files, those and no others, in their order, with DIR
and MODEL filled in; each gets its seconds and what it printed last.  It needs nothing but Python.
"""

import argparse
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from engine.cli.standard_output import exit_with
from engine.utils.json_text import dump_json

REPOSITORY = Path(__file__).parents[1]
_TRIED = (
    *("make train", "make setup-dev", ". .venv", "pip install", "mkdir"),
    *("python -m engine.", "python -m examples.", "superbert "),
)
_TAIL = 12
_PAGES = ("README.md", "docs/course-files.md")
_INSTALL = re.compile(r"^## Install\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_OF_THE_CALLER = ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""Variables of an environment or a make that this process was called from."""


def commands(page: str) -> Iterator[str]:
    """Yield the commands of a page's indented blocks, continued lines joined, comments off.

    Those of a section Install come first.
    """
    install = "".join(_INSTALL.findall(page))
    for line in re.sub(r" \\\n +", " ", install + _INSTALL.sub("", page)).splitlines():
        command = line.strip().split("  #")[0].strip()
        if line.startswith("    ") and command.startswith(_TRIED):
            yield command


def fill_in(given: str, data: Path, init: str, steps: int | None) -> str:
    """Put a folder, a model and, if asked for, a shorter run into a command."""
    command = re.sub(r"\bDIR\b", str(data), re.sub(r"\bMODEL\b", init, given))
    if steps is None or "--init MODEL" not in given:
        return command
    return f"{command} --max-steps {steps}"


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line; the engine's needs torch, to be installed."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {message}\n")


def _count(text: str) -> int:
    """Read a number of steps.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.strip().isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def main() -> int:
    """Try everything; return 1 if a command failed."""
    parser = _Parser(prog="python3 -m bench.readme_walkthrough", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CS224N files")
    parser.add_argument("--init", required=True, help="a BERT: folder or hub name")
    parser.add_argument("--steps", type=_count, help="of the real run (default: the recipe's)")
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    parser.add_argument("--force", action="store_true", help="replace a record that is there")
    options = parser.parse_args()
    if os.path.lexists(options.json) and not (options.force and options.json.is_file()):
        parser.error(f"{options.json}: is there already; give another name, or --force")

    records = []
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "superbert-engine"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        home = {"SUPERBERT_CACHE": f"{name}/cache"}
        activation = "true"
        texts = [(clone / page).read_text(encoding="utf-8") for page in _PAGES]
        for command in (command for text in texts for command in commands(text)):
            filled = fill_in(command, options.data.resolve(), options.init, options.steps)
            if command.startswith(". "):
                activation = command
                continue
            records.append(_try(f"{activation} && {filled}", command, clone, home))
            print(
                f"{records[-1]['seconds']:8.1f} s  {records[-1]['status']}  {command}", flush=True
            )
    record = {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "machine": {"cores": os.cpu_count(), "processor": _processor()},
        "python": platform.python_version(),
        "steps_of_the_real_run": options.steps or "as the page says",
        "commands": records,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(dump_json(record, indent=2) + "\n", encoding="utf-8")
    return int(any(record["status"] for record in records))


def _try(line: str, command: str, folder: Path, extra: dict[str, str]) -> dict[str, object]:
    """Run a line of bash; return the command's record."""
    inherited = {k: v for k, v in os.environ.items() if k not in _OF_THE_CALLER}
    start = time.perf_counter()
    process = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=inherited | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = round(time.perf_counter() - start, 1)
    lines = process.stdout.replace(str(folder), ".").splitlines()
    # pip's warnings name places of the machine.
    tail = [line for line in lines if not line.startswith("WARNING: ")][-_TAIL:]
    return {"command": command, "seconds": seconds, "status": process.returncode, "tail": tail}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    exit_with(main)
