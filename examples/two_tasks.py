"""What the PCGrad examples train: a small transformers BERT with two heads, on the demo corpus.

Of several processes (torchrun, accelerate, Lightning) each gets its part of every batch.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer

TASKS = {"sst": 5, "quora": 2}
"""The classes of each task."""
BATCH_SIZE = 32  # of each task

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


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

    def forward(self, batches: dict[str, dict[str, Tensor]]) -> list[Tensor]:
        """Return the mean loss of each task's batch, padded or, where accelerated, packed."""
        losses = []
        for task, batch in batches.items():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            hidden = self.encoder(**inputs).last_hidden_state
            if "cu_seq_lens_q" in inputs:  # packed [1, T, H]: it says where sentences begin
                first = hidden[0, inputs["cu_seq_lens_q"][:-1]]
            else:
                first = hidden[:, 0]
            losses.append(F.cross_entropy(self.heads[task](first), batch["labels"]))
        return losses


def batches(collate: Collate | None = None) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield this process' part of a batch of each task, for ever.

    The batches are padded unless another collator is given.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        tables = {
            task: read_table(FORMATS[task].file(folder, "train"), FORMATS[task]) for task in TASKS
        }
        texts = [text for table in tables.values() for column in table.sentences for text in column]
        Tokenizer.train(texts, 1000).save(folder)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    collate = collate or hf.DataCollatorWithPadding(tokenizer)
    generator = torch.Generator().manual_seed(0)
    while True:
        batch = {}
        for task, table in tables.items():
            picks = torch.randint(len(table), (BATCH_SIZE,), generator=generator).tolist()
            picks = picks[rank::ranks]
            rows = [tokenizer(*(column[i] for column in table.sentences)) for i in picks]
            labels = [int(table.labels[i]) for i in picks]
            batch[task] = collate(
                [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
            )
        yield batch
