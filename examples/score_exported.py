"""Score an exported model's sentence vectors on STS by sentence-transformers alone.

    python -m examples.score_exported FOLDER --data DIR

For a run whose sts head is a cosine, this is the run's own dev score.
"""

import argparse
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from engine.data.table import read_table
from engine.data.task_schema import FORMATS


def main(arguments: list[str] | None = None) -> float:
    """Return the Pearson correlation of similarity and label on the dev data."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="what engine.export wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data files")
    options = parser.parse_args(arguments)
    form = FORMATS["sts"]
    table = read_table(form.file(options.data, "dev"), form)
    model = SentenceTransformer(str(options.folder), device="cpu")
    first, second = (model.encode(c, convert_to_tensor=True) for c in table.sentences)
    similarity = model.similarity_pairwise(first, second).clamp(min=0)
    return float(np.corrcoef(similarity.cpu().numpy(), table.labels)[0, 1])


if __name__ == "__main__":
    print(f"sts dev, pearson: {main():.3f}")
