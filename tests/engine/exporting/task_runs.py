"""A run with a task of every kind that can be exported by itself, and of some that cannot."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from engine import train
from engine.data.split import TokenizedSplit
from engine.distributed.ranks import Ranks
from engine.runs.predictor import Example, _table
from engine.runs.run import Run, open_run
from engine.runs.scoring import scores_of

from ..conftest import SHORT, TINY
from ..models.byte_pairs import byte_pairs

WORDS = "the film was plot good bad fine dull a story of people and rain it's well-made ! (really)"
MOODS, TOPICS = ("poor", "fine", "grand"), ("praise", "blame", "people", "story")
TAGS = ("O", "B-WHO", "I-WHO", "B-WHAT")

RECIPE = """\
train = ["mood", "spam", "same", "alike", "share", "stars", "topics", "tags", "near", "memory"]
batch_size = 16
[tasks.mood]
head = "single"
source = { kind = "classification", text = ["text"], label = "mood", classes = ["poor", "fine", \
"grand"], files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.spam]
head = "single"
source = { kind = "classification", text = ["text"], label = "spam", classes = ["ham", "spam"], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.same]
head = "cross"
source = { kind = "pair_classification", text = ["text", "other"], label = "same", classes = 2, \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.alike]
head = "cross"
source = { kind = "pair_regression", text = ["text", "other"], label = "stars", range = [1, 5], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.share]
head = "single"
loss = "cross_entropy"
source = { kind = "regression", text = ["text"], label = "stars", range = [1, 5], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.stars]
head = "single"
source = { kind = "regression", text = ["text"], label = "stars", range = [1, 5], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.topics]
head = "single"
source = { kind = "multi_label_classification", text = ["text"], label = "topics", \
classes = ["praise", "blame", "people", "story"], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.tags]
head = "tokens"
source = { kind = "token_classification", text = ["words"], label = "tags", \
classes = ["O", "B-WHO", "I-WHO", "B-WHAT"], \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.near]
head = "difference"
source = { kind = "pair_classification", text = ["text", "other"], label = "same", classes = 2, \
files = { train = "rows.jsonl", dev = "rows.jsonl" } }
[tasks.memory]
head = "bilstm"
source = { kind = "classification", text = ["text"], label = "mood", classes = ["poor", "fine", \
"grand"], files = { train = "rows.jsonl", dev = "rows.jsonl" } }
"""

EXPORTED = ("mood", "spam", "same", "alike", "share", "stars", "topics", "tags")
PAIRS = ("same", "alike")

# Wide weights: sentences differ by far more than fp32 rounds, also in their first tokens.
ENCODERS = {
    "bert": ["encoder.initializer_range=0.5"],
    "modernbert": ["encoder.model_type=modernbert", "encoder.initializer_range=0.3"],
    "roberta": [],
}


def sentence(chance: random.Random, longest: int = 12) -> str:
    return " ".join(chance.choices(WORDS.split(), k=chance.randint(1, longest)))


def write_rows(folder: Path) -> Path:
    """Write the data and the recipe; the data are random, but the same every time."""
    chance, rows = random.Random(0), []
    for number in range(32):
        text = sentence(chance)
        rows.append(
            {
                "text": text,
                "other": sentence(chance),
                "mood": MOODS[number % 3],
                "spam": ("ham", "spam")[number % 2],
                "same": number // 2 % 2,
                "stars": 1 + number % 5,
                "topics": chance.sample(TOPICS, number % 4),
                "words": text.split(),
                "tags": chance.choices(("O", "B-WHO", "B-WHAT"), k=len(text.split())),
            }
        )
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.toml").write_text(RECIPE)
    return folder


def trained_run(folder: Path, encoder: str, pooling: str) -> Run:
    """A run of two steps, below ``folder``."""
    data, run = write_rows(folder / "private-data"), folder / "run"
    arguments = [str(data / "tasks.toml"), "--data", str(data), "--out", str(run)]
    settings = [*TINY, *ENCODERS[encoder], f"pooling={pooling}", "max_length=24", "lr=1e-2"]
    if encoder == "roberta":
        arguments += ["--init", str(write_roberta(folder / "private-model"))]
        settings = [*SHORT, f"pooling={pooling}", "max_length=24", "lr=1e-2"]
    assert train.main([*arguments, "--max-steps", "2", "--set", *settings]) == 0
    return open_run(run)


def write_roberta(folder: Path) -> Path:
    """A RoBERTa of random weights."""
    config = transformers.RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=42,
        initializer_range=0.5,
        type_vocab_size=1,
    )
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(folder)
    byte_pairs([WORDS] * 9).save(str(folder / "tokenizer.json"))
    return folder


def examples(task: str) -> list[Example]:
    """A dozen of them, of which some are too long."""
    chance = random.Random(task)
    lengths = [1, 2, 5, 8, 12, 12, 9, 40, 60, 3, 30, 7]
    first = [sentence(chance, most) for most in lengths]
    if task in PAIRS:
        return [*zip(first, (sentence(chance, most) for most in lengths[::-1]), strict=True)]
    return first if task != "tags" else [text.split() for text in first]


def engine_logits(run: Run, task: str, given: Sequence[Example]) -> tuple[TokenizedSplit, Tensor]:
    """The outputs of a task's head in fp32, ``[n, L]``, of tags those of W words ``[W, C]``."""
    model, _ = run.trained_model(torch.device("cpu"), torch.float32)
    form = run.recipe.formats[task]
    split = run.tokenize(form, _table(form, given))
    scores = scores_of(model, split, Ranks())
    return split, scores if scores.dim() == 2 else scores[:, None]
