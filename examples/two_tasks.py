"""What the PCGrad examples train: a small transformers BERT with two heads, on the demo corpus."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer

TASKS = {"sst": 5, "quora": 2}
"""The classes of each task."""


class TwoTaskBert(nn.Module):
    """One encoder, a linear head for each task."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        # Without dropout, so that the loop and Lightning can be seen to train alike.
        sizes |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
        config = hf.BertConfig(vocab_size=1000, intermediate_size=256, **sizes)
        self.encoder = hf.BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(128, size) for task, size in TASKS.items()})

    def losses(self, batches: dict[str, dict[str, Tensor]]) -> list[Tensor]:
        """Return the mean loss of each task's batch."""
        losses = []
        for task, batch in batches.items():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            first = self.encoder(**inputs).last_hidden_state[:, 0]
            losses.append(F.cross_entropy(self.heads[task](first), batch["labels"]))
        return losses


def batches(batch_size: int = 32) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield a batch of each task, for ever."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        tables = {
            task: read_table(FORMATS[task].file(folder, "train"), FORMATS[task]) for task in TASKS
        }
        texts = [text for table in tables.values() for column in table.sentences for text in column]
        Tokenizer.train(texts, 1000).save(folder)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    while True:
        batch = {}
        for task, table in tables.items():
            picks = torch.randint(len(table), (batch_size,), generator=generator).tolist()
            columns = [[column[i] for i in picks] for column in table.sentences]
            encoded = tokenizer(*columns, padding=True, return_tensors="pt")
            batch[task] = {**encoded, "labels": torch.tensor(table.labels[picks]).long()}
        yield batch
