"""Write the data files and the recipe of docs/guide-tasks.md: five tasks in five kinds of file.

    python -m examples.five_tasks FOLDER

FOLDER gets ``five.toml`` (taken from the guide), ``corpus`` with the files, and ``topics``, a data
set of the kind that has a name on the hub.  The texts are those of the project's demo corpus.
"""

import csv
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from engine.data.demo import write_demo
from engine.data.table import Table, read_table
from engine.data.task_schema import FORMATS

from .new_folder import new_folder

GUIDE = Path(__file__).parents[1] / "docs" / "guide-tasks.md"
_VERDICTS = ("bad", "bad", "fair", "good", "good")
_TOPICS = {
    "people": "doctors sailors farmers",
    "animals": "dogs cats hounds",
    "things": "cars boats cups",
    "places": "town forest hills",
}


def main(arguments: list[str] | None = None) -> None:
    """Write everything."""
    folder = new_folder(arguments)
    corpus = folder / "corpus"
    corpus.mkdir()
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name)
        write_demo(demo)
        for split in ("train", "dev"):
            tables = {
                task: read_table(FORMATS[task].file(demo, split), FORMATS[task])
                for task in ("sst", "quora", "sts")
            }
            _write_split(corpus, split, tables)
    _write_topics(folder / "topics")
    recipe, *_ = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "five.toml").write_text(recipe, encoding="utf-8")


def _write_split(corpus: Path, split: str, tables: dict[str, Table]) -> None:
    """Write the files of four tasks, in four layouts."""
    reviews, grades = tables["sst"].sentences[0], tables["sst"].labels.astype(int)
    verdicts = [("review", "verdict"), *zip(reviews, (_VERDICTS[g] for g in grades), strict=True)]
    _write_rows(corpus / f"reviews-{split}.csv", verdicts, ",")
    stars = [("review", "stars"), *zip(reviews, grades + 1, strict=True)]
    _write_rows(corpus / f"stars-{split}.tsv", stars, "\t")
    same = tables["quora"].labels.astype(int).tolist()
    pairs = zip(*tables["quora"].sentences, same, strict=True)
    lines = (json.dumps({"first": a, "second": b, "same": label}) for a, b, label in pairs)
    (corpus / f"duplicates-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    left, right = tables["sts"].sentences
    columns = {"left": left, "right": right, "score": tables["sts"].labels / 5}
    parquet.write_table(pa.table(columns), corpus / f"similarity-{split}.parquet")


def _write_rows(path: Path, rows: list[tuple[object, ...]], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def _write_topics(folder: Path) -> None:
    rng = np.random.default_rng(0)
    words = [names.split() for names in _TOPICS.values()]
    labels = rng.integers(len(words), size=400)
    texts = [" ".join(rng.choice(words[label], 5)) for label in labels]
    features = Features(text=Value("string"), label=ClassLabel(names=list(_TOPICS)))
    folder.mkdir()
    data = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    data.to_parquet(folder / "train.parquet")


if __name__ == "__main__":
    main()
