"""Fine-tune a sentence-transformers model by its own trainer, on our kernels, without padding.

    python -m examples.finetune_sentence_transformers [--model FOLDER] [--steps N]

The task is the similarity of two sentences of the project's demo corpus.  Without a folder the
model is a small one with random weights.  (Installed, it is `superbert.kernels`.)
"""

import argparse
import tempfile
from pathlib import Path

import sentence_transformers as st
import transformers as hf
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from kernels import accelerate, restore


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train; return the correlations on the dev data."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a BERT (default: a small one)")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    options = parser.parse_args(arguments)
    hf.set_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, form = Path(name), FORMATS["sts"]
        write_demo(folder)
        tables = {split: read_table(form.file(folder, split), form) for split in ("train", "dev")}
        if options.model is None:
            texts = [text for column in tables["train"].sentences for text in column]
            Tokenizer.train(texts, 1000).save(folder)
            sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes)
            hf.BertModel(config).save_pretrained(folder)
        model = st.SentenceTransformer(str(options.model or folder), device="cpu")

        (first, second), scores = tables["train"].sentences, tables["train"].labels / 5
        rows = Dataset.from_dict({"first": first, "second": second, "score": scores})
        (first, second), scores = tables["dev"].sentences, tables["dev"].labels / 5
        evaluator = EmbeddingSimilarityEvaluator(first, second, scores.tolist())
        print(accelerate(model))
        settings = st.SentenceTransformerTrainingArguments(
            folder, max_steps=options.steps, learning_rate=5e-4, report_to="none"
        )
        loss = CosineSimilarityLoss(model)
        st.SentenceTransformerTrainer(model, settings, rows, loss=loss).train()
        scores = evaluator(model)
        restore(model)  # a plain model again
        return scores


if __name__ == "__main__":
    print(main())
