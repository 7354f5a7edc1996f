"""Data sets in folders, for streams: shards of numbered sentences."""

import gc
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from engine.data.hub_stream import HubStream
from engine.data.source import TaskSource
from engine.data.stream_order import StreamOrder

SOURCE = TaskSource(
    kind="classification",
    text=("sentence",),
    classes=2,
    dataset="given",
    streaming=True,
)


def numbered(count: int, start: int = 0) -> list[dict]:
    """Rows whose sentences are their numbers."""
    return [
        {"sentence": f"number {number}", "label": number % 2}
        for number in range(start, start + count)
    ]


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[dict]],
    split: str = "train",
    ending: str = ".parquet",
) -> Path:
    """Write a file for each shard of a split; return the folder."""
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(shards):
        path = folder / f"{split}-{number:05}-of-{len(shards):05}{ending}"
        if ending == ".parquet":
            parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
        elif ending == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(
                "sentence,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in rows)
            )
    return folder


def write_numbered(
    folder: Path, sizes: Sequence[int], split: str = "train", ending: str = ".parquet"
) -> Path:
    """Write shards of so many rows, numbered through."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    shards = [numbered(size, start) for size, start in zip(sizes, starts, strict=True)]
    return write_shards(folder, shards, split, ending)


def order_of(
    folder: Path, size: int, shard: tuple[int, int] = (0, 1), *, seed: int = 0
) -> StreamOrder:
    """The order of the rows of a folder's train split."""
    stream = HubStream(str(folder), "", "train")
    schema = SOURCE.format("numbers")
    return StreamOrder(stream=stream, schema=schema, size=size, seed=seed, shard=shard)


def readers() -> set[threading.Thread]:
    """The threads that read ahead; those that were forgotten end soon."""
    gc.collect()
    return {thread for thread in threading.enumerate() if thread.name.startswith("reading")}
