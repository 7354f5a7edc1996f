"""Two datasets and losses in sentence-transformers' trainer, both in each step, with PCGrad.

    python -m examples.pcgrad_sentence_transformers [--steps N]
    torchrun --nproc-per-node 2 -m examples.pcgrad_sentence_transformers

The demo corpus has pairs of sentences with scores, and pairs of questions that ask the same.
(Installed, it is `superbert.kernels`.)
"""

import argparse
import tempfile
from pathlib import Path

import sentence_transformers as st
import transformers as hf
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from kernels import PCGradSentenceTransformerTrainer, accelerate


def model_and_rows(folder: Path) -> tuple[st.SentenceTransformer, dict[str, Dataset]]:
    """Make a small model with random weights, and two datasets."""
    write_demo(folder)
    sts, quora = (
        read_table(FORMATS[t].file(folder, "train"), FORMATS[t]) for t in ("sts", "quora")
    )
    Tokenizer.train([text for t in (sts, quora) for c in t.sentences for text in c], 1000).save(
        folder
    )
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf.BertModel(hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes)).save_pretrained(
        folder
    )

    first, second = sts.sentences
    scored = {"first": first, "second": second, "score": (sts.labels / 5).tolist()}
    same = [pair for *pair, label in zip(*quora.sentences, quora.labels, strict=True) if label]
    asked = {"question": [pair[0] for pair in same], "other": [pair[1] for pair in same]}
    rows = {"scored": Dataset.from_dict(scored), "asked": Dataset.from_dict(asked)}
    return st.SentenceTransformer(str(folder), device="cpu"), rows


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Train; return what was logged: the sum of the losses, and each of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    steps = parser.parse_args(arguments).steps

    hf.set_seed(0)
    with tempfile.TemporaryDirectory() as name:
        model, rows = model_and_rows(Path(name))
        accelerate(model)
        settings = st.SentenceTransformerTrainingArguments(
            name, max_steps=steps, learning_rate=5e-4, logging_steps=5, report_to="none"
        )
        loss = {"scored": CosineSimilarityLoss(model), "asked": MultipleNegativesRankingLoss(model)}
        trainer = PCGradSentenceTransformerTrainer(model, settings, rows, loss=loss)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    last = main()[-1]
    PartialState().print(last)  # on the first process alone
