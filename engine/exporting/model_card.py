"""The model card of an exported run."""

import textwrap

from .. import __version__
from ..checkpoints.manifest import Progress
from ..models.heads import HEADS
from ..models.registry import spec_of
from ..runs.run import Run
from ..utils.quoting import markdown_text
from .card_sections import (
    WIDTH,
    Scores,
    data_list,
    listed,
    recipe_block,
    scores_table,
    together,
    versions,
)

_CARD = """\
---
library_name: sentence-transformers
tags: [{model_type}, multi-task, sentence-transformers, sentence-similarity]
---

# {title}

One {model} encoder trained on {tasks}{together}{with_heads}.
Trained with superbert-engine {version}; the weights are those of {source}.

## Use

{libraries}

    model = transformers.AutoModel.from_pretrained(folder)
    model = sentence_transformers.SentenceTransformer(folder)

{other_heads}
{heads}
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

_HEADS = """
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


def example() -> str:
    """Return a script that uses a head; its arguments: the folder, a task, its sentences."""
    by_answers = {name: code for head in HEADS.values() for name, code in head.answers_code.items()}
    entries = [f'"{name}": {code}' for name, code in by_answers.items()]
    lines = [f"answer = {{{entries[0]}"]
    for entry in entries[1:]:
        if len(f"{lines[-1]}, {entry},") <= WIDTH:
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
        text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def model_card(run: Run, progress: Progress, scores: Scores | None) -> str:
    """Return the card as Markdown.

    Args:
        run: what was trained.
        progress: of the exported checkpoint.
        scores: its dev scores by task, or None where they are not known.
    """
    heads = _HEADS.format(answers=_answers(), example=example()) if run.recipe.tasks else ""
    return _CARD.format(
        title=markdown_text(run.folder.resolve().name),
        tasks=listed(run.recipe.trained),
        together=together(run.recipe),
        version=__version__,
        source=progress.source,
        model_type=run.config.model_type,
        model=spec_of(run.config).name,
        libraries=_libraries(run),
        other_heads=_other_heads(run),
        with_heads=", with a head for each task" if heads else "",
        heads=heads,
        scores=scores_table(run, scores),
        data=data_list(run),
        recipe=recipe_block(run.recipe),
        versions=versions(),
    )


def _libraries(run: Run) -> str:
    """Return how other libraries load the encoder."""
    note = spec_of(run.config).untrained_note
    text = (
        f"The encoder, by transformers (`last_hidden_state`{note and f'; {note}'}) or by "
        f"sentence-transformers (sentence vectors, {run.recipe.pooling} pooling):"
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


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
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, fix_sentence_endings=True)
