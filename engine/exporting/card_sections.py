"""Sections that the model cards of all exports share.

A card goes where the export goes, so it names files and folders without their paths.
"""

import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from .. import __version__
from ..checkpoints.manifest import Progress
from ..config.local_names import file_name, local_name, toml_without_paths
from ..config.recipe import Recipe
from ..data.source import TaskSource
from ..data.task_schema import TaskSchema
from ..models.heads import HALF
from ..models.registry import spec_of
from ..runs.run import Run
from ..runs.scoring import score_names
from ..utils.quoting import fence, markdown_text, printable

WIDTH = 100
"""Columns of a card."""
_LIBRARIES = ("torch", "tokenizers", "safetensors", "numpy")
_FEW_CLASSES = 30
"""Names of classes that a card lists; the other files have all."""
_OPTIMISTIC = "Thresholds of {} were chosen on the same data, so that these scores are optimistic."

_SHORT_CARD = """\
---
{header}
---

# {title}

{summary}

## Use

{use}

```python
{example}```

{answers}

## Scores

{scores}

## Data

{data}

## Recipe

Files and folders are named without their paths.

{recipe}

## Versions

{versions}
"""

Scores = Mapping[str, float | None]


def short_card(
    run: Run,
    progress: Progress,
    scores: Scores | None,
    *,
    only: str | None,
    header: str,
    what: str,
    use: str,
    example: str,
    answers: str,
) -> str:
    """Return the card of an export that answers one thing, as Markdown.

    Args:
        run: what was trained.
        progress: of the exported checkpoint.
        scores: its dev scores by task, or None where they are not known.
        only: the exported task; None for sentence vectors.
        header: its lines of YAML.
        what: the beginning of the sentence about the encoder.
        use: how the model is loaded.
        example: Python that does so.
        answers: what its outputs are.
    """
    title = run.folder.resolve().name if only is None else f"{run.folder.resolve().name}: {only}"
    return _SHORT_CARD.format(
        header=header,
        title=markdown_text(title),
        summary=filled(
            f"{what} {spec_of(run.config).name} encoder trained on {listed(run.recipe.trained)}"
            f"{together(run.recipe)}. Trained with superbert-engine {__version__}; the weights are "
            f"those of step {progress.step}."
        ),
        use=use,
        example=example,
        answers=answers,
        scores=scores_table(run, scores, only),
        data=data_list(run),
        recipe=recipe_block(run.recipe),
        versions=versions(),
    )


def filled(text: str) -> str:
    """Return text in lines of the card's width."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def together(recipe: Recipe) -> str:
    """Return how tasks were trained together."""
    if len(recipe.phases) > 1:
        return f" in {len(recipe.phases)} phases"
    count = len(recipe.trained)
    if count == 1:
        return ""
    return f" together ({markdown_text(recipe.balance)} on {count} task gradients)"


def scores_table(run: Run, scores: Scores | None, only: str | None = None) -> str:
    """Return the table of dev scores, of all tasks or of one."""
    if scores is None:
        return "None were measured."
    rows = [
        f"| {markdown_text(task)} | {metric} | {_figure(scores[name])} |"
        for name, (task, metric) in score_names(run.recipe).items()
        if name in scores and only in (None, task)
    ]
    if not rows:
        return "None were measured."
    head = ["On the dev data, at the exported step:", "", "| task | metric | score |"]
    chosen = [
        name
        for name, task in run.recipe.tasks.items()
        if task.threshold != HALF and only in (None, name)
    ]
    notes = [] if not chosen else ["", _OPTIMISTIC.format(listed(chosen))]
    return "\n".join([*head, "| --- | --- | --- |", *rows, *notes])


def _figure(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.4f}"


def data_list(run: Run) -> str:
    """Return a list of what each task was trained on."""
    folder = run.recipe.data
    origin = (
        f"Folder: {markdown_text(local_name(folder))}." if folder else "A generated demo corpus."
    )
    lines = [origin, ""]
    for name, form in run.recipe.formats.items():
        source = run.recipe.tasks[name].source
        origin = "" if source is None else f" from {markdown_text(_origin(source))}"
        trained = "" if name in run.recipe.trained else " (not trained)"
        columns = " and ".join(map(markdown_text, form.sentences))
        lines.append(f"- {markdown_text(name)}{trained}{origin}: {columns} -> {_labels(form)}")
    for name, objective in run.recipe.objectives.items():
        if name in run.recipe.trained and objective.files:
            files = ", ".join(markdown_text(file_name(file)) for file in objective.files)
            lines.append(f"- {markdown_text(name)}: text, from {files}")
    return "\n".join(lines)


def _origin(source: TaskSource) -> str:
    """Return where a task's examples come from, its training set if it has one."""
    if source.dataset:
        return local_name(source.dataset)
    split = "train" if "train" in source.files else next(iter(source.files))
    return ", ".join(map(file_name, source.of(split).file_names))


def recipe_block(recipe: Recipe) -> str:
    """Return every setting of a recipe as a block of TOML, paths by their last names."""
    text = printable(toml_without_paths(recipe))
    marks = fence(text)
    return f"{marks}toml\n{text}{marks}"


def _labels(form: TaskSchema) -> str:
    if form.labels == "spans":
        none = ", or none" if form.unanswerable else ""
        return f"spans of {markdown_text(form.sentences[1])}{none}"
    if not form.classes:
        return f"{form.low:g} to {form.high:g}"
    listed = ", ".join(map(markdown_text, form.classes[:_FEW_CLASSES]))
    more = len(form.classes) - _FEW_CLASSES
    return f"{listed} and {more:,} more" if more > 0 else listed


def versions() -> str:
    """Return a list of what made the export."""
    lines = [f"superbert-engine {__version__}", f"Python {platform.python_version()}"]
    lines += [f"{library} {version(library)}" for library in _LIBRARIES]
    return "\n".join(f"- {line}" for line in lines)


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    names = [*map(markdown_text, names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
