"""Tables of the five papers' systems, with their figures and those of runs.

A run belongs to a system when it was made by the system's recipe, whatever settings were replaced;
its row names those that differ.  Runs that differ in the seed alone are averaged.
"""

import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from statistics import mean
from typing import Any, NamedTuple

from ..config import recipe as recipes
from ..runs.experiments import mean_and_deviation
from ..utils.quoting import markdown_text
from .outcomes import Outcome

THREE = ("sst", "quora", "sts")
TASKS = ("sst", "quora", "sts", "cfimdb", "overall")
_NOT_SETTINGS = {
    *("description", "paper", "data", "init", "seed", "encoder", "log_every", "checkpoint_every"),
    *("keep_checkpoints", "on_bad_row", "precision", "execution", "max_graphs", "distribute"),
    *("timeout", "check_ranks_every", "loggers", "log_layer_cosines_every", "max_skipped"),
}
_BERT_BASE = (12, 768)
"""Layers and width of the encoder that all five papers start from."""
_TRAINING_EXAMPLES = {"sst": 8_544, "quora": 141_506, "sts": 6_041, "cfimdb": 1_701}
"""In the papers' data."""


class System(NamedTuple):
    """A system as a paper reports it.

    Attributes:
        name: what the paper calls it.
        recipe: the built-in recipe that stands for it.
        split: of the data that the scores are of.
        scores: by task; ``overall`` where the paper gives it, else the mean of the three.
    """

    name: str
    recipe: str
    split: str
    scores: dict[str, float]


class Paper(NamedTuple):
    """A paper: a letter for file names, its title, its systems."""

    key: str
    title: str
    systems: list[System]


class Row(NamedTuple):
    """Runs of one recipe that differ in the seed alone.

    Attributes:
        outcomes: of these runs.
        differences: what they did otherwise than their recipe says and its paper did, a phrase
            each.
    """

    outcomes: list[Outcome]
    differences: tuple[str, ...]

    @property
    def recipe(self) -> str:
        """The built-in recipe's name."""
        return self.outcomes[0].system

    @property
    def settings(self) -> str:
        """The differences, and how many seeds there are."""
        seeds = len(self.outcomes)
        return "; ".join([*self.differences, *([f"{seeds} seeds"] if seeds > 1 else [])])

    def scores(self, task: str) -> list[float]:
        """Return the runs' dev scores of a task; nothing where it was not scored."""
        return [outcome.scores[task] for outcome in self.outcomes if task in outcome.scores]


def read_papers() -> list[Paper]:
    """Return what the papers report."""
    text = files(__package__).joinpath("papers.toml").read_text(encoding="utf-8")
    return [
        Paper(paper["key"], paper["title"], [_system(fields) for fields in paper["systems"]])
        for paper in tomllib.loads(text)["papers"]
    ]


def _system(fields: Mapping[str, Any]) -> System:
    scores = {task: fields[task] for task in TASKS if task in fields}
    if "overall" not in scores and len(scores) == 3:
        scores["overall"] = sum(scores.values()) / 3
    return System(fields["name"], fields["recipe"], fields.get("split", "dev"), scores)


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Put runs that differ in the seed alone together, in the order in which they come."""
    rows: dict[tuple[str, tuple[str, ...]], list[Outcome]] = {}
    for outcome in outcomes:
        differences = (*_from_paper(outcome), *_from_recipe(outcome))
        rows.setdefault((outcome.system, differences), []).append(outcome)
    return [Row(found, differences) for (_, differences), found in rows.items()]


def paired(paper: Paper, rows: Sequence[Row]) -> Iterator[tuple[System, Row | None]]:
    """Yield each of the paper's systems with each of its rows, or with None if it was not run."""
    for system in paper.systems:
        own: list[Row | None] = [row for row in rows if row.recipe == system.recipe]
        yield from ((system, row) for row in own or [None])


def markdown(paper: Paper, rows: Sequence[Row]) -> str:
    """Return a paper's table as Markdown; a system has a line for each of its rows."""
    tasks = [task for task in TASKS if any(task in system.scores for system in paper.systems)]
    lines = [
        f"## {paper.title}",
        "",
        "Each score: the paper's on its split, then ours on dev (the difference).",
        "",
        _line(["system", "recipe", "split", *tasks, "settings that differ"]),
        _line(["---"] * (len(tasks) + 4)),
    ]
    for system, row in paired(paper, rows):
        cells = [
            _cell(system.scores.get(task), row.scores(task) if row is not None else [])
            for task in tasks
        ]
        settings = "not run" if row is None else markdown_text(row.settings)
        lines.append(_line([system.name, f"`{system.recipe}`", system.split, *cells, settings]))
    return "\n".join(lines) + "\n"


def ranking(rows: Sequence[Row]) -> str:
    """Return a Markdown table of all rows scored on the three tasks, the best overall first."""
    scored = [row for row in rows if all(row.scores(task) for task in THREE)]
    scored.sort(key=lambda row: -mean(row.scores("overall")))
    tasks = (*THREE, "overall")
    lines = [
        "## All of ours, the best overall first",
        "",
        "Scores on dev.",
        "",
        _line(["recipe", *tasks, "settings that differ"]),
        _line(["---"] * (len(tasks) + 2)),
    ]
    for row in scored:
        cells = [mean_and_deviation(row.scores(task)) for task in tasks]
        lines.append(_line([f"`{row.recipe}`", *cells, markdown_text(row.settings)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(theirs: float | None, ours: Sequence[float]) -> str:
    if theirs is None:
        return ""
    if not ours:
        return f"{theirs:.3f}"
    return f"{theirs:.3f}, {mean_and_deviation(ours)} ({mean(ours) - theirs:+.3f})"


def _from_paper(outcome: Outcome) -> Iterator[str]:
    """Yield in what a run of a paper's recipe differed from the paper all the same."""
    recipe = outcome.recipe
    if not recipe.paper:
        return
    layers, width = _BERT_BASE
    if (outcome.layers, outcome.width) != _BERT_BASE:
        yield f"encoder {outcome.layers} layers of {outcome.width} ({layers} of {width})"
    if not outcome.pretrained:
        yield "encoder from scratch"
    for task in (task for task in _TRAINING_EXAMPLES if task in outcome.examples):
        most = min(
            cut
            for cut in (recipe.max_train_examples, recipe.tasks[task].first_n, sys.maxsize)
            if cut
        )
        ours, theirs = (min(of[task], most) for of in (outcome.examples, _TRAINING_EXAMPLES))
        if ours != theirs:
            yield f"{task} {ours:,} training examples ({theirs:,})"


def _from_recipe(outcome: Outcome) -> Iterator[str]:
    """Yield the settings of a run that were replaced."""
    theirs = _flat(recipes.load(outcome.system).model_dump())
    ours = _flat(outcome.recipe.model_dump())
    for key in dict.fromkeys([*ours, *theirs]):
        if key.split(".")[0] not in _NOT_SETTINGS and ours.get(key) != theirs.get(key):
            yield f"{key} {_value(ours, key)} ({_value(theirs, key)})"


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _value(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "unset")
    return f"{value:g}" if isinstance(value, float) else str(value)
