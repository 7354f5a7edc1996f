"""Fine-tune a transformers BERT with its own Trainer, on our kernels and without padding.

    python -m examples.finetune_transformers [--model FOLDER] [--steps N]

The task is to tell whether two questions of the project's demo corpus ask the same.  Without a
folder the model is a small one with random weights.  (Installed, it is `superbert.kernels`.)
"""

import argparse
import tempfile
from pathlib import Path

import transformers as hf

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from kernels import PackingCollator, accelerate, restore


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train; return the Trainer's evaluation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a BERT (default: a small one)")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    options = parser.parse_args(arguments)
    hf.set_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, form = Path(name), FORMATS["quora"]
        write_demo(folder)
        tables = {split: read_table(form.file(folder, split), form) for split in ("train", "dev")}
        if options.model is None:
            Tokenizer.train(tables["train"].sentences[0], 1000).save(folder)
            sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes)
            model = hf.BertForSequenceClassification(config)
        else:
            model = hf.BertForSequenceClassification.from_pretrained(options.model)
        tokenizer = hf.AutoTokenizer.from_pretrained(options.model or folder)

        rows = {
            split: [
                {"labels": int(label), **tokenizer(first, second)}
                for first, second, label in zip(*table.sentences, table.labels, strict=True)
            ]
            for split, table in tables.items()
        }
        print(accelerate(model))
        settings = hf.TrainingArguments(folder, max_steps=options.steps, report_to="none")
        sets = {"train_dataset": rows["train"], "eval_dataset": rows["dev"]}
        trainer = hf.Trainer(model, settings, PackingCollator(), processing_class=tokenizer, **sets)
        trainer.train()
        scores = trainer.evaluate()
        restore(model)  # a plain model again, which takes padded batches alone
        return scores


if __name__ == "__main__":
    print(main())
