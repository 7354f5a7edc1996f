"""The model card of an exported run."""

import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from .. import __version__
from ..checkpoints.manifest import Progress
from ..config.recipe import Recipe
from ..data.source import TaskSource
from ..data.task_schema import TaskSchema
from ..models.heads import HALF, HEADS
from ..models.registry import spec_of
from ..runs.run import Run
from ..runs.scoring import score_names
from ..utils.quoting import fence, markdown_text, printable

_LIBRARIES = ("torch", "tokenizers", "safetensors", "numpy")

_CARD = """\
---
library_name: sentence-transformers
tags: [{model_type}, multi-task, sentence-transformers, sentence-similarity]
---

# {title}

One {model} encoder trained on {tasks}{together}, with a head for
each task.  Trained with superbert-engine {version}; the weights are those of step {step}.

## Use

{libraries}

    model = transformers.AutoModel.from_pretrained(folder)
    model = sentence_transformers.SentenceTransformer(folder)

{other_heads}

The task heads lie in `heads.safetensors`.  Its metadata has for each task a JSON object:

- `features`: what is read off the sentence vectors, u (and v of a pair): `single` u, `mean`
  (u + v) / 2, `concat` [u; v], `distance` |u - v|, `difference` [u; v; |u - v|], `shared`
  relu(W [u; v] + b) with `pair.weight` and `pair.bias`; the similarities `cosine` cos(u, v),
  `cosine_shifted` (cos(u, v) + 1) / 2, `pearson` sigmoid(r(u, v)), `dot` u v; `cross`, the vector
  of both sentences in one sequence, [CLS] A [SEP] B [SEP], as the tokenizer frames it; `bilstm`,
  relu(W [u; f; g] + b) with `TASK.joint.weight` and `TASK.joint.bias`, where f is the last output
  of the torch.nn.LSTM `TASK.lstm.forwards` over the states of the tokens behind [CLS], and g that
  of `TASK.lstm.backwards` over the same from the last to the first; `tokens`, the state of the
  first token of each word, or of `span` of every token.
- `answers`: what the output layer (`TASK.output.weight`, `TASK.output.bias`) makes of them:
{answers}
- `low`, `high`: the range of the labels; `classes`: their names, if they have any.
- `threshold`, of `binary` and `labels`: logits, one for all or one for each label; of a head
  without an output layer a similarity.

What a task answers, for all features but `bilstm` and `tokens`:

```python
{example}```

## Scores

{scores}

## Data

{data}

## Recipe

{fence}toml
{recipe}{fence}

## Versions

{versions}
"""

_EXAMPLE = """\
import json, sys
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch import cat, cosine_similarity as cosine, tensor

folder, task, *text = sys.argv[1:]  # one sentence, or the two of a pair
with safe_open(f"{folder}/heads.safetensors", "pt") as file:
    head, weights = json.loads(file.metadata()[task]), {n: file.get_tensor(n) for n in file.keys()}
text = [tuple(text)] if head["features"] == "cross" else text
u, v = SentenceTransformer(folder, device="cpu").encode(text, convert_to_tensor=True)[[0, -1], None]
low, span, names = head["low"], head["high"] - head["low"], head["classes"]
linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
read = dict(single=lambda: u, cross=lambda: u, mean=lambda: (u + v) / 2, dot=lambda: (u * v).sum(1),
            concat=lambda: cat([u, v], 1), difference=lambda: cat([u, v, abs(u - v)], 1),
            shared=lambda: linear("pair", cat([u, v], 1)).relu(), distance=lambda: abs(u - v),
            cosine=lambda: cosine(u, v), cosine_shifted=lambda: (cosine(u, v) + 1) / 2,
            pearson=lambda: cosine(u - u.mean(), v - v.mean()).sigmoid())[head["features"]]()
x = linear(f"{task}.output", read) if f"{task}.output.weight" in weights else read
x = x - tensor(head.get("threshold", 0.0))  # yes is above 0 from here on
ANSWERS[head["answers"]].view(-1).tolist()
print(*[names[i] if names else i for i in answer])
"""

_OPTIMISTIC = "Thresholds of {} were chosen on the same data, so that these scores are optimistic."

_WIDTH = 100
"""Columns of the card."""
_FEW_CLASSES = 30
"""Names of classes that the card lists; ``heads.safetensors`` has all."""

Scores = Mapping[str, float | None]


def example() -> str:
    """Return a script that uses a head; its arguments: the folder, a task, its sentences."""
    by_answers = {name: code for head in HEADS.values() for name, code in head.answers_code.items()}
    entries = [f'"{name}": {code}' for name, code in by_answers.items()]
    lines = [f"answer = {{{entries[0]}"]
    for entry in entries[1:]:
        if len(f"{lines[-1]}, {entry},") <= _WIDTH:
            lines[-1] += f", {entry}"
        else:
            lines[-1] += ","
            lines.append(f"          {entry}")
    return _EXAMPLE.replace("ANSWERS", "\n".join(lines) + "}", 1)


def _answers() -> str:
    """Return the card's sentences about the answers of each kind of head."""
    known = dict.fromkeys(head.answers_text for head in HEADS.values() if head.answers_text)
    text = f"{'; '.join(known)}."
    return textwrap.fill(
        text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def model_card(run: Run, progress: Progress, scores: Scores | None) -> str:
    """Return the card as Markdown.

    Args:
        run: what was trained.
        progress: of the exported checkpoint.
        scores: its dev scores by task, or None where they are not known.
    """
    recipe, trained = run.recipe, run.recipe.trained
    settings = printable(recipe.to_toml())
    return _CARD.format(
        title=markdown_text(run.folder.resolve().name),
        tasks=_listed(trained),
        together=_together(recipe),
        version=__version__,
        step=progress.step,
        model_type=run.config.model_type,
        model=spec_of(run.config).name,
        libraries=_libraries(run),
        other_heads=_other_heads(run),
        answers=_answers(),
        example=example(),
        scores=_scores(run, scores),
        data=_data(run),
        recipe=settings,
        fence=fence(settings),
        versions=_versions(),
    )


def _libraries(run: Run) -> str:
    """Return how other libraries load the encoder."""
    note = spec_of(run.config).untrained_note
    text = (
        f"The encoder, by transformers (`last_hidden_state`{note and f'; {note}'}) or by "
        f"sentence-transformers (sentence vectors, {run.recipe.pooling} pooling):"
    )
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _other_heads(run: Run) -> str:
    """Return what other libraries answer from."""
    source = (
        "a head of random weights"
        if run.masked_lm is None
        else f"the head of objective {markdown_text(run.masked_lm)}"
    )
    text = (
        'There is no head for `pipeline("text-classification")` and `CrossEncoder`, which '
        f'therefore raise an error; `pipeline("fill-mask")` answers from {source}.  To train a '
        "new head on this encoder, give `num_labels=`, and to `CrossEncoder` also `activation_fn=`."
    )
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, fix_sentence_endings=True)


def _together(recipe: Recipe) -> str:
    """Return how tasks were trained together."""
    if len(recipe.phases) > 1:
        return f" in {len(recipe.phases)} phases"
    count = len(recipe.trained)
    if count == 1:
        return ""
    return f" together ({markdown_text(recipe.balance)} on {count} task gradients)"


def _scores(run: Run, scores: Scores | None) -> str:
    if scores is None:
        return "None were measured."
    rows = [
        f"| {markdown_text(task)} | {metric} | {_figure(scores[name])} |"
        for name, (task, metric) in score_names(run.recipe).items()
        if name in scores
    ]
    head = ["On the dev data, at the exported step:", "", "| task | metric | score |"]
    chosen = [name for name, task in run.recipe.tasks.items() if task.threshold != HALF]
    notes = [] if not chosen else ["", _OPTIMISTIC.format(_listed(chosen))]
    return "\n".join([*head, "| --- | --- | --- |", *rows, *notes])


def _figure(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.4f}"


def _data(run: Run) -> str:
    folder = run.recipe.data
    lines = [f"Folder: {markdown_text(folder)}." if folder else "A generated demo corpus."]
    lines.append("")
    for name, form in run.recipe.formats.items():
        source = run.recipe.tasks[name].source
        origin = "" if source is None else f" from {markdown_text(_origin(source))}"
        trained = "" if name in run.recipe.trained else " (not trained)"
        columns = " and ".join(map(markdown_text, form.sentences))
        lines.append(f"- {markdown_text(name)}{trained}{origin}: {columns} -> {_labels(form)}")
    return "\n".join(lines)


def _origin(source: TaskSource) -> str:
    """Return where a task's examples come from, its training set if it has one."""
    return source.dataset or source.files.get("train") or next(iter(source.files.values()))


def _labels(form: TaskSchema) -> str:
    if form.labels == "spans":
        none = ", or none" if form.unanswerable else ""
        return f"spans of {markdown_text(form.sentences[1])}{none}"
    if not form.classes:
        return f"{form.low:g} to {form.high:g}"
    listed = ", ".join(map(markdown_text, form.classes[:_FEW_CLASSES]))
    more = len(form.classes) - _FEW_CLASSES
    return f"{listed} and {more:,} more" if more > 0 else listed


def _versions() -> str:
    lines = [f"superbert-engine {__version__}", f"Python {platform.python_version()}"]
    lines += [f"{library} {version(library)}" for library in _LIBRARIES]
    return "\n".join(f"- {line}" for line in lines)


def _listed(names: Sequence[str]) -> str:
    names = [*map(markdown_text, names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
