"""Cases that repeat by themselves: what is drawn in one depends on part, seed and number alone."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .progress import say

T = TypeVar("T")


class Tried(NamedTuple):
    """What came of one case.

    Attributes:
        what: was tried, in a line.
        outcome: a word to count.
        problems: what is not as it must be, a line each.
        said: the last line on stderr.
    """

    what: str
    outcome: str
    problems: Sequence[str] = ()
    said: str = ""


class Case(NamedTuple):
    """One case.

    Attributes:
        number: of the case.
        folder: of its own, empty, gone afterwards.
        draw: decides all.
    """

    number: int
    folder: Path
    draw: random.Random

    def pick(self, grid: Sequence[T], seed: int = 0) -> T | None:
        """Return one of a grid, another for each number, in mixed order; None beyond its end."""
        order = random.Random(seed).sample(range(len(grid)), len(grid))
        return grid[order[self.number]] if self.number < len(grid) else None


def try_cases(
    part: str,
    folder: Path,
    attempt: Callable[[Case], Tried],
    count: int,
    seed: int,
    only: int | None = None,
) -> dict[str, Any]:
    """Try ``count`` cases of a part of the report, or one of them.

    Returns:
        Their number, the ``outcomes`` counted, and the ``problems``: a line each, which begins with
        the part and the number of its case.
    """
    outcomes, problems = Counter[str](), list[str]()
    numbers = range(count) if only is None else [only]
    for number in numbers:
        if number % 100 == 0:
            say(f"{part}: {number:,} of {count:,} cases, {len(problems)} problems")
        trial = folder / "trial"
        trial.mkdir()
        tried = attempt(Case(number, trial, random.Random(f"{seed}/{part}/{number}")))
        shutil.rmtree(trial)
        outcomes[tried.outcome] += 1
        if only is not None:
            say(f"{part} {number}: {tried.what}: {tried.outcome}: {tried.said}")
        for problem in tried.problems:
            problems.append(f"{part} {number}: {one_line(tried.what)}: {one_line(problem)}")
            say(problems[-1])
    return {"cases": len(numbers), "outcomes": dict(outcomes), "problems": problems}


def one_line(text: str) -> str:
    """Return a text as a line that a terminal can show, cut when it is very long."""
    shown = " | ".join(text.splitlines()).encode("unicode_escape").decode()
    return shown if len(shown) < 600 else f"{shown[:400]} … {shown[-180:]}"
