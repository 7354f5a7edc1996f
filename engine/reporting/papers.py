"""Tables of the five papers' systems: their figures beside those of runs.

A run belongs to a system when it was made by the system's recipe, whatever settings were replaced;
those that differ stand in its row.  Runs of one recipe under several seeds are averaged.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from .. import recipe as recipes
from ..many import mean_and_deviation
from ..recipe import Recipe
from ..run import Run
from ..scoring import read_scores

TASKS = ("sst", "quora", "sts", "cfimdb", "overall")
_NOT_SETTINGS = {
    *("description", "paper", "data", "init", "seed", "encoder", "log_every", "checkpoint_every"),
    *("keep_checkpoints", "on_bad_row", "precision"),
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
    """A system, and the runs that were made by its recipe."""

    system: System
    runs: list[Run]

    def ours(self, task: str) -> list[float]:
        """Return the runs' dev scores of a task; nothing where it was not scored."""
        found = (read_scores(run.folder).scores for run in self.runs)
        return [scores[task] for scores in found if task in scores]


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


def rows_of(paper: Paper, runs: Sequence[Run]) -> list[Row]:
    """Return a row for each of the paper's systems; one that nobody has run has no runs."""
    made_by: dict[str, list[Run]] = {}
    for run in runs:
        made_by.setdefault(run.recipe.paper, []).append(run)
    return [
        Row(system, made_by.get(recipes.load(system.recipe).paper, [])) for system in paper.systems
    ]


def markdown(paper: Paper, rows: Sequence[Row]) -> str:
    """Return a paper's table as Markdown."""
    tasks = [task for task in TASKS if any(task in row.system.scores for row in rows)]
    lines = [
        f"## {paper.title}",
        "",
        "Each score: the paper's on its split, then ours on dev (the difference).",
        "",
        _line(["system", "recipe", "split", *tasks, "settings that differ"]),
        _line(["---"] * (len(tasks) + 4)),
    ]
    for row in rows:
        system = row.system
        cells = [_cell(system.scores.get(task), row.ours(task)) for task in tasks]
        settings = "; ".join(_differences(row.runs)) if row.runs else "not run"
        lines.append(_line([system.name, f"`{system.recipe}`", system.split, *cells, settings]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(theirs: float | None, ours: Sequence[float]) -> str:
    if theirs is None:
        return ""
    if not ours:
        return f"{theirs:.3f}"
    difference = sum(ours) / len(ours) - theirs
    return f"{theirs:.3f}, {mean_and_deviation(ours)} ({difference:+.3f})"


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what the runs did otherwise than the paper, a phrase each."""
    first = runs[0]
    layers, width = first.config.num_hidden_layers, first.config.hidden_size
    if (layers, width) != _BERT_BASE:
        yield f"encoder {layers} layers of {width} ({_BERT_BASE[0]} of {_BERT_BASE[1]})"
    if not first.recipe.init:
        yield "encoder from scratch"
    most = first.recipe.limit or max(_TRAINING_EXAMPLES.values())
    for task in first.recipe.tasks:
        theirs, ours = _TRAINING_EXAMPLES[task], len(first.split(task, "train"))
        if min(theirs, most) != min(ours, most):
            yield f"{task} {ours:,} training examples ({theirs:,})"
    if len(runs) > 1:
        yield f"{len(runs)} seeds"
    known = {recipes.load(name).paper: recipes.load(name) for name in recipes.of_papers()}
    built_in = known[first.recipe.paper]
    yield from dict.fromkeys(change for run in runs for change in _changes(run.recipe, built_in))


def _changes(recipe: Recipe, built_in: Recipe) -> Iterator[str]:
    theirs, ours = _flat(built_in.model_dump()), _flat(recipe.model_dump())
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
