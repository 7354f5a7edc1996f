"""Three tasks, one transformers BERT: packed, one forward and one backward pass a step, PCGrad.

python -m examples.three_tasks [--steps N]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from kernels import PackingCollator, PCGrad, TaskGradients, accelerate

LOSSES = {"sst": F.cross_entropy, "quora": F.cross_entropy, "sts": F.mse_loss}
OUTPUTS = {"sst": 5, "quora": 2, "sts": 1}
EACH = 32  # examples of a task in a step


def model_and_rows() -> tuple[nn.ModuleDict, dict[str, list[dict[str, Any]]]]:
    """Make an encoder with three heads, and the tokenized texts and labels of each task."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        tables = {t: read_table(FORMATS[t].file(folder, "train"), FORMATS[t]) for t in LOSSES}
        texts = [text for t in tables.values() for column in t.sentences for text in column]
        Tokenizer.train(texts, 1000).save(folder)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    rows = {
        task: [
            {"labels": float(label), **tokenizer(*own)}
            for *own, label in zip(*table.sentences, table.labels, strict=True)
        ]
        for task, table in tables.items()
    }
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = hf.BertModel(hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes))
    accelerate(bert)
    heads = nn.ModuleDict({task: nn.Linear(128, size) for task, size in OUTPUTS.items()})
    return nn.ModuleDict({"bert": bert, "heads": heads}), rows


def losses_of(
    model: nn.ModuleDict, batch: dict[str, Any], tasks: TaskGradients
) -> dict[str, Tensor]:
    """Compute each task's loss; the batch has EACH examples of the first, then of the next."""
    model = getattr(model, "module", model)  # in DistributedDataParallel
    labels = batch.pop("labels").split(EACH)
    losses = {}
    with tasks.batch([EACH] * len(LOSSES)):
        pooled = model["bert"](**batch).pooler_output.split(EACH)
        for number, (task, loss) in enumerate(LOSSES.items()):
            with tasks.task(number):
                outputs = model["heads"][task](pooled[number]).squeeze(1)
                target = labels[number] if task == "sts" else labels[number].long()
                losses[task] = loss(outputs, target)
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of the losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    steps = parser.parse_args(arguments).steps

    hf.set_seed(0)
    model, rows = model_and_rows()
    tasks = TaskGradients(model, num_tasks=len(LOSSES))
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4), task_gradients=tasks)
    collate, totals = PackingCollator(), []
    for _ in range(steps):
        picks = [own[i] for own in rows.values() for i in torch.randint(len(own), (EACH,)).tolist()]
        losses = losses_of(model, collate(picks), tasks)
        optimizer.zero_grad()
        optimizer.pc_backward(losses)
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses.values()))
    return totals


if __name__ == "__main__":
    print(main()[-1])
