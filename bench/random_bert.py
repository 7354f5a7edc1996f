"""``python -m bench.random_bert FOLDER``: a BERT of a published shape with random weights.

A step's time does not depend on what the weights are, and a folder of 440 MB need not be carried
to a machine that has no network.
"""

from pathlib import Path

import torch
from rich.console import Console

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

SHAPES = {  # width, layers, heads, width of the feed-forward layer
    "mini": (256, 4, 4, 1024),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


def write(folder: Path, shape: str, vocabulary: Path) -> None:
    """Write ``config.json``, weights and vocabulary of a BERT of one of SHAPES to a new folder."""
    from transformers import BertConfig, BertModel

    words = vocabulary.read_text(encoding="utf-8")
    width, layers, heads, inner = SHAPES[shape]
    config = BertConfig(
        vocab_size=len(words.splitlines()),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text(words, encoding="utf-8")


def main() -> None:
    """Write the folder."""
    parser = Parser(prog="python -m bench.random_bert", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--vocabulary", type=Path, required=True, help="a BERT's vocab.txt")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} is there already; give a new folder")
    if not options.vocabulary.is_file():
        parser.error(f"--vocabulary {options.vocabulary}: no such file")
    write(options.folder, options.shape, options.vocabulary)
    Console().print(f"wrote {options.folder}", soft_wrap=True)


if __name__ == "__main__":
    exit_with(main)
