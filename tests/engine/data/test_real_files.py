"""The CS224N files themselves, read whole."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.source import TaskSource
from engine.data.split import tokenize
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer

ROWS = {
    "sst": {"train": 8544, "dev": 1101, "test": 2210},
    "quora": {"train": 14148, "dev": 2021, "test": 4043},
    "sts": {"train": 6040, "dev": 863, "test": 1725},
    "cfimdb": {"train": 1707, "dev": 245, "test": 488},
}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_row_counts(real_data: Path, task: str, split: str) -> None:
    format_ = FORMATS[task]
    table = read_table(format_.file(real_data, split), format_, labelled=split != "test")
    assert len(table) == ROWS[task][split]
    assert not table.bad_rows
    assert len(set(table.ids)) == len(table)
    assert all(len(column) == len(table) for column in table.sentences)
    if table.labels is None:
        return
    assert set(np.unique(table.labels)) <= set(range(format_.high + 1)) or format_.kind == "score"
    assert (table.labels.min(), table.labels.max()) == (0, format_.high)


def test_tokens_of_real_sentences(real_data: Path, real_encoder: Path) -> None:
    tokenizer = Tokenizer.load(real_encoder)
    table = read_table(FORMATS["cfimdb"].file(real_data, "dev"), FORMATS["cfimdb"])
    split = tokenize("cfimdb", table, tokenizer, 128)
    assert split.lengths.max() == 128
    assert split.truncated == (split.lengths == 128).sum() > 0
    np.testing.assert_array_equal(split.tokens[split.offsets[1:] - 1], tokenizer.sep_id)


@pytest.mark.parametrize("task", ROWS)
def test_the_files_as_sources_of_ones_own(real_data: Path, task: str) -> None:
    built_in, kind = FORMATS[task], {"score": "regression"}.get(FORMATS[task].kind)
    source = TaskSource(
        kind=("pair_" if len(built_in.sentences) == 2 else "") + (kind or "classification"),
        text=built_in.sentences,
        label=built_in.label,
        id=built_in.id,
        classes=() if kind else int(built_in.high) + 1,
        files={split: built_in.file(real_data, split).name for split in ROWS[task]},
    )
    for split in ROWS[task]:
        labelled = split != "test"
        origin = source.origin(task, split, real_data)
        found = origin.table(source.format(task), labelled=labelled, on_bad_row="error")
        wanted = read_table(origin.path, built_in, labelled=labelled)
        assert (found.ids, found.sentences) == (wanted.ids, wanted.sentences)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert found.notes == ("separated by tabs, as its header is, not by commas",)
