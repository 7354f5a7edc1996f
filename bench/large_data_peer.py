"""Prepare a table of pairs with Hugging Face's datasets, and take a training step.

:mod:`bench.large_data` starts it, as ``python -m bench.large_data_peer TABLE MODEL CACHE MARK
WORKERS DEVICE``.  It is written as the libraries' pages say, and imports nothing of this project,
whose memory would be counted.  MARK is written when the step is done.
"""

import sys
from pathlib import Path

_TOKENS, _BATCH = 128, 32


def main() -> None:
    """Take the step."""
    table, model_folder, cache, mark, workers, device = sys.argv[1:]
    import torch
    from datasets import load_dataset
    from torch.utils.data import DataLoader
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )

    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def tokenize(rows):  # type: ignore[no-untyped-def]
        pairs = (rows["sentence1"], rows["sentence2"])
        labels = [int(label) for label in rows["is_duplicate"]]
        return {**tokenizer(*pairs, truncation=True, max_length=_TOKENS), "labels": labels}

    read = load_dataset("csv", data_files=table, sep="\t", cache_dir=cache, split="train")
    ready = read.map(
        tokenize,
        batched=True,
        num_proc=workers_of(workers, len(read)),
        remove_columns=read.column_names,
    )
    loader = DataLoader(
        ready, batch_size=_BATCH, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = next(iter(loader)).to(device)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    Path(mark).write_text(f"{loss.item()}\n", encoding="utf-8")


def workers_of(workers: str, rows: int) -> int | None:
    """Return how many processes ``map`` starts; for few rows none, as its user would."""
    return int(workers) if rows > 10_000 else None


if __name__ == "__main__":
    main()
