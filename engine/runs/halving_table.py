"""The table of a successive halving: all candidates by the rung that they reached."""

from collections.abc import Sequence

from rich.console import Console

from .experiments import differing_settings, mean_and_deviation, print_rows
from .halving import FAILED, Place, Plan, Rung, names_of_scores, order


def print_rungs(console: Console, plan: Plan, found: Sequence[Rung]) -> None:
    """Print a table of all candidates: those that came farthest first, failed ones last."""
    names, settings = differing_settings(plan.specs)
    tasks = names_of_scores(plan)
    rows = [["run", *names, "rank", "steps", *tasks, "outcome"]]
    for rank, (steps, place) in enumerate(standings(plan, found), start=1):
        scores = [
            mean_and_deviation([own[task] for own in place.scores]) if place.scores else ""
            for task in tasks
        ]
        reached = str(steps) if place.scores else ""
        rows.append([*settings[place.group], str(rank), reached, *scores, place.outcome])
    if plan.criterion.score != "overall":
        console.print(f"ranked by {plan.criterion}", soft_wrap=True, highlight=False)
    print_rows(console, rows)


def standings(plan: Plan, found: Sequence[Rung]) -> list[tuple[int, Place]]:
    """Return the last rung of every candidate and its place there, the best first.

    A candidate that is open at a rung stands with its place at the one before.
    """
    latest: dict[str, tuple[int, Place]] = {}
    for rung in found:
        for place in rung.places:
            if place.outcome or place.group not in latest:
                latest[place.group] = (rung.steps if place.outcome else 0, place)
    return sorted(
        latest.values(),
        key=lambda item: (item[1].outcome == FAILED, -item[0], order(plan, item[1])),
    )
