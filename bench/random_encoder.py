"""``python -m bench.random_encoder FOLDER``: an encoder of a published shape with random weights.

A step's time does not depend on what the weights are, and a folder of 440 MB need not be carried
to a machine that has no network.  ``bench.step --encoder`` writes such folders by itself.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.utils.errors import InputError


def _shape(model_type: str, width: int, layers: int, inner: int) -> dict[str, Any]:
    # Heads of 64 columns, as published.
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": inner,
    }


SHAPES = {
    "bert-mini": _shape("bert", 256, 4, 1024),
    "bert-base": _shape("bert", 768, 12, 3072),
    "bert-large": _shape("bert", 1024, 24, 4096),
    "modernbert-small": _shape("modernbert", 384, 6, 576),
    "modernbert-base": _shape("modernbert", 768, 22, 1152),
    "modernbert-large": _shape("modernbert", 1024, 28, 2624),
}
"""Fields of ``config.json``; ``modernbert-small`` is no published shape, but has MiniLM's width and
depth."""

LEAST_VOCABULARY = {"bert": 0, "modernbert": 50_368}
"""Entries of a published table of words, of which a smaller vocabulary uses the first."""


def write(folder: Path, shape: str, vocabulary: Path) -> None:
    """Write ``config.json``, weights and vocabulary of an encoder to a new folder.

    Args:
        folder: made here.
        shape: one of SHAPES.
        vocabulary: a BERT's ``vocab.txt``.

    Raises:
        InputError: the vocabulary cannot be read.
    """
    from transformers import AutoConfig, AutoModel

    try:
        words = vocabulary.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{vocabulary}: {error.strerror}") from error
    fields = dict(SHAPES[shape])
    model_type = fields.pop("model_type")
    places = words.splitlines()
    fields["vocab_size"] = max(len(places), LEAST_VOCABULARY[model_type])
    if model_type == "modernbert":
        # Its defaults are entries of its own vocabulary.
        ends = {"cls_token_id": "[CLS]", "bos_token_id": "[CLS]"}
        ends |= {"sep_token_id": "[SEP]", "eos_token_id": "[SEP]", "pad_token_id": "[PAD]"}
        fields |= {name: places.index(token) for name, token in ends.items()}
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    pooler = {"add_pooling_layer": False} if model_type == "bert" else {}
    config = AutoConfig.for_model(model_type, **fields)
    AutoModel.from_config(config, **pooler).save_pretrained(folder)
    (folder / "vocab.txt").write_text(words, encoding="utf-8")


def main() -> None:
    """Write the folder."""
    parser = Parser(prog="python -m bench.random_encoder", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--vocabulary", type=Path, required=True, help="a BERT's vocab.txt")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} is there already; give a new folder")
    write(options.folder, options.shape, options.vocabulary)
    Console().print(f"wrote {options.folder}", soft_wrap=True)


if __name__ == "__main__":
    exit_with(main)
