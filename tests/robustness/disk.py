"""A disk that fills up at random moments: one line, nothing half written, the same bits later."""

import contextlib
import io
import random
import shutil
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import verify
from engine.runs.run import open_run
from engine.train import main
from engine.utils.errors import InputError

from ..engine.disk import file_size_limit
from .fuzz import TINY
from .outcome import outcome
from .progress import say


def fill_disk(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """Train ``times`` runs under random limits, then resume each without.

    Returns:
        How many of them the full disk ``stopped``, and ``problems``: a line each.
    """
    draw = random.Random(seed)
    expected = _train(folder / "whole")
    largest = max(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    stopped, problems = 0, []
    for number in range(times):
        run = folder / f"run-{number}"
        if number % 10 == 0:
            say(f"disk: {number} of {times}")
        size = int(largest ** draw.uniform(0.3, 1.02))
        try:
            with file_size_limit(size):
                _train(run)
        except InputError:
            stopped += 1
        except Exception as error:
            problems.append(f"files of {size} bytes at most: {error!r}")
        problems += [f"{path} was left" for path in run.rglob("*.partial")]
        for path in (run / "checkpoints").glob("*"):
            verify(path)
        if _train(run) != expected:
            problems.append(f"files of {size} bytes at most, then resumed: ended otherwise")
        shutil.rmtree(run)
    return {"times": times, "stopped": stopped, "problems": problems}


def _train(folder: Path) -> list[Any]:
    options = ["--out", str(folder), "--resume", "--device", "cpu", "--max-steps", "3"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["demo", *options, "--set", *TINY, "epochs=3"]) == 0
    assert open_run(folder).checkpoints.find("best") is not None
    return outcome(folder)
