"""Three tasks, one transformers BERT: packed, one forward and one backward pass a step, PCGrad.

python -m examples.three_tasks [--steps N]
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from kernels import PackingCollator, PCGrad, TaskGradients, accelerate

LOSSES = {"sst": F.cross_entropy, "quora": F.cross_entropy, "sts": F.mse_loss}
OUTPUTS = {"sst": 5, "quora": 2, "sts": 1}
EACH = 32  # examples of a task in a step


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; return the sum of the losses at every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    steps = parser.parse_args(arguments).steps

    hf.set_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        tables = [read_table(FORMATS[task].file(folder, "train"), FORMATS[task]) for task in LOSSES]
        Tokenizer.train([text for t in tables for c in t.sentences for text in c], 1000).save(
            folder
        )
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = hf.BertModel(hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes))
    heads = nn.ModuleDict({task: nn.Linear(128, size) for task, size in OUTPUTS.items()})
    model = nn.ModuleDict({"bert": bert, "heads": heads})

    accelerate(bert)
    tasks = TaskGradients(model, num_tasks=len(LOSSES))
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-4), task_gradients=tasks)
    collate, totals = PackingCollator(), []
    for _ in range(steps):
        rows, labels = [], []
        for table in tables:
            picks = torch.randint(len(table), (EACH,)).tolist()
            rows += [tokenizer(*(column[i] for column in table.sentences)) for i in picks]
            labels.append(torch.tensor([table.labels[i].item() for i in picks]))
        losses = []
        with tasks.batch([EACH] * len(LOSSES)):  # of each task, one after the other
            pooled = bert(**collate(rows)).pooler_output.split(EACH)
            for number, (task, loss) in enumerate(LOSSES.items()):
                with tasks.task(number):
                    outputs = heads[task](pooled[number]).squeeze(1)
                    target = labels[number].float() if task == "sts" else labels[number].long()
                    losses.append(loss(outputs, target))
        optimizer.zero_grad()
        optimizer.pc_backward(losses)
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return totals


if __name__ == "__main__":
    print(main()[-1])
