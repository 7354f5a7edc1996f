"""``python -m engine.fill RUN``: what stands behind [MASK], before training and after."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .cli.common import Parser, positive, run_cli, terminal
from .cli.options import add_device
from .data.collate import join
from .data.task_batch import TaskBatch
from .data.tokenizer import Tokenizer
from .models.context import Context
from .models.multitask import MultitaskModel
from .runs.run import Run, open_run
from .runtime.precision import pick_device
from .utils.errors import InputError

_MASK = "[MASK]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)

    run, device = open_run(options.run), pick_device(options.device)
    name = _objective(run)
    after, _ = run.trained_model(device, torch.float32)
    models = {"before": run.initial_model().to(device).eval(), "after": after}
    console = terminal()
    for sentence in options.sentences:
        console.print(sentence, highlight=False)
        for when, model in models.items():
            words = likeliest(model, name, run.tokenizer, sentence, options.top)
            found = "  ".join(f"{word} {share:.1%}" for word, share in words)
            console.print(f"  {when:6}  {found}", highlight=False, soft_wrap=True)
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.fill",
        description="Show the likeliest words behind [MASK], by a run whose recipe has masked LM: "
        "as the run began, and by its best checkpoint.",
    )
    what, where = made.add_argument_group("what to fill"), made.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument(
        "sentences",
        nargs="*",
        default=["This movie was [MASK]."],
        metavar="SENTENCE",
        help='with one [MASK] each (default: "This movie was [MASK].")',
    )
    what.add_argument(
        "--top", type=positive, default=5, metavar="N", help="words to show (default: 5)"
    )
    add_device(where)
    return made


def likeliest(
    model: MultitaskModel, objective: str, tokenizer: Tokenizer, sentence: str, count: int
) -> list[tuple[str, float]]:
    """Return the likeliest words behind the mask of a sentence, and their probabilities.

    Args:
        model: in evaluation mode; ``objective`` is a masked LM of it.
        objective: its name.
        tokenizer: the model's.
        sentence: with one ``[MASK]``, whatever the tokenizer calls it.
        count: how many words.

    Raises:
        InputError: the sentence has no mask, or several.
    """
    spelt = sentence.replace(_MASK, tokenizer.special_tokens[-1])
    tokens = tokenizer.encode([spelt], model.encoder.config.max_position_embeddings).tokens
    (masks,) = np.nonzero(tokens == tokenizer.mask_id)
    if len(masks) != 1:
        raise InputError(f"{sentence!r}: expected one {_MASK}, found {len(masks)}")
    task_batch = TaskBatch(
        task=objective,
        tokens=tokens.astype(np.int64),
        sizes=np.array([len(tokens)]),
        columns=1,
        labels=None,
    )
    word = model.encoder.word_table
    with torch.inference_mode():
        batch = join([task_batch]).to(word.weight.device)
        hidden = model.encoder(batch.input_ids, Context.of(batch))
        probabilities = model.head(objective).word_logits(hidden[masks], word).softmax(1)
    shares, ids = probabilities[0].topk(min(count, probabilities.shape[1]))
    return [
        (tokenizer.id_to_token(number) or str(number), share)
        for number, share in zip(ids.tolist(), shares.tolist(), strict=True)
    ]


def _objective(run: Run) -> str:
    """Return the run's masked LM.

    Raises:
        InputError: it has none.
    """
    if run.masked_lm is not None:
        return run.masked_lm
    raise InputError(f"{run.folder}: its recipe has no masked LM; take a run of superbert, say")


if __name__ == "__main__":
    run_cli(main)
