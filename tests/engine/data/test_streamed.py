"""Examples of a stream: the batches of the rows in their order, whatever is asked for and resumed.

The oracle reads the rows of :mod:`engine.data.stream_order` into one table and tokenizes it whole.
"""

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from engine.data import streamed
from engine.data.cache import Reading
from engine.data.hub_stream import HubStream
from engine.data.prepare import Preparation
from engine.data.source import TaskSource
from engine.data.split import TokenizedSplit, tokenize
from engine.data.stream_order import Block, Place, StreamOrder
from engine.data.streamed import StreamedExamples, StreamSampler
from engine.data.table import table_of
from engine.data.task_batch import TaskBatch
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from .streams import SOURCE, numbered, order_of, readers, write_numbered, write_shards

WORDS = Tokenizer.train(["number 0 1 2 3 4 5 6 7 8 9 is it who the one"] * 3, 60)


def prepared(order: StreamOrder, on_bad_row: str = "error") -> Preparation:
    return Preparation(
        schema=order.schema, labelled=True, on_bad_row=on_bad_row, max_length=32, joins_pairs=False
    )


def streamed_of(order: StreamOrder, on_bad_row: str = "error", **further) -> StreamedExamples:
    return StreamedExamples(order, prepared(order, on_bad_row), WORDS, Reading(), **further)


def whole(order: StreamOrder, blocks: int, on_bad_row: str = "error") -> TokenizedSplit:
    """The examples of the first blocks."""
    rows = [row for block in islice(order.blocks(Place()), blocks) for row in block.rows]
    table = table_of(rows, 0, order.schema, labelled=True, on_bad_row=on_bad_row)
    return tokenize(order.schema.task, table, WORDS, 32, schema=order.schema)


def assert_same(one: TaskBatch, other: TaskBatch) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.sizes, other.sizes)
    if isinstance(other.labels, torch.Tensor):
        assert torch.equal(one.labels, other.labels)
        return
    for mine, its in zip(one.labels, other.labels, strict=True):
        assert torch.equal(mine, its)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_PIECE", 5)
    monkeypatch.setattr(streamed, "_BETWEEN_MARKS", 8)


@pytest.fixture
def order(tmp_path: Path) -> StreamOrder:
    return order_of(write_numbered(tmp_path / "set", [20, 9, 31]), 16)


@pytest.mark.parametrize("batch", [1, 4, 13, 80])
def test_batches_are_the_rows_in_their_order(order, batch) -> None:
    examples, expected = streamed_of(order), whole(order, 30)
    sampler = StreamSampler("numbers", batch, 1)
    for step in range(len(expected) // batch):
        chosen = sampler.batch(step)
        assert_same(examples.task_batch(chosen, step), expected.task_batch(chosen, step))
        sizes = examples.sequence_sizes(chosen, step)
        np.testing.assert_array_equal(sizes, expected.sequence_sizes(chosen, step))
        assert examples.terms(chosen) == batch


def test_micro_batches_are_parts_of_a_step_in_their_order(order) -> None:
    examples, expected = streamed_of(order), whole(order, 30)
    sampler = StreamSampler("numbers", 12, 1)
    for step in range(8):
        for part in np.array_split(sampler.batch(step), 3):
            assert_same(examples.task_batch(part, step), expected.task_batch(part, step))


def test_little_stays_in_memory(order) -> None:
    examples, sampler = streamed_of(order), StreamSampler("numbers", 4, 1)
    for step in range(40):
        examples.task_batch(sampler.batch(step), step)
        assert len(examples._join()) <= 4 + 2 * 5


@pytest.mark.parametrize("start", [1, 3, 14, 40])
@pytest.mark.parametrize("kept", [False, True])
def test_it_goes_on_from_any_batch(order, tmp_path, start, kept) -> None:
    """With the places that are kept in the run's folder, or, without, all is read again."""
    sampler, whole_run = StreamSampler("numbers", 4, 1), streamed_of(order, folder=tmp_path)
    batches = [whole_run.task_batch(sampler.batch(step), step) for step in range(45)]
    if kept:
        whole_run.keep_marks(tmp_path)
    resumed = streamed_of(order, folder=tmp_path)
    resumed.go_to(sampler.batch(start))
    for step in range(start, 45):
        assert_same(resumed.task_batch(sampler.batch(step), step), batches[step])


def test_a_resumed_run_reads_one_block_again(order, tmp_path, monkeypatch) -> None:
    sampler, examples = StreamSampler("numbers", 4, 1), streamed_of(order, folder=tmp_path)
    for step in range(40):
        examples.task_batch(sampler.batch(step), step)
    examples.keep_marks(tmp_path)
    resumed = streamed_of(order, folder=tmp_path)
    read = []
    monkeypatch.setattr(type(resumed), "_read_chunk", _counting(type(resumed)._read_chunk, read))
    resumed.go_to(sampler.batch(38))
    assert len(read) <= -(-16 // 5) + 2


def test_a_later_phase_goes_on_from_its_own_places(order, tmp_path, monkeypatch) -> None:
    """It begins with the first rows again, far before the places that an earlier phase kept."""
    monkeypatch.setattr(streamed, "_MARKS", 3)
    sampler, first = StreamSampler("numbers", 4, 1), streamed_of(order, folder=tmp_path)
    first.task_batch(sampler.batch(60), 60)
    first.keep_marks(tmp_path)
    second = streamed_of(order, folder=tmp_path)
    for step in range(20):
        batch = second.task_batch(sampler.batch(step), step)
    second.keep_marks(tmp_path)
    resumed = streamed_of(order, folder=tmp_path)
    read = []
    monkeypatch.setattr(type(resumed), "_read_chunk", _counting(type(resumed)._read_chunk, read))
    resumed.go_to(sampler.batch(19))
    assert len(read) <= -(-16 // 5) + 2
    assert_same(resumed.task_batch(sampler.batch(19), 19), batch)


def _counting(function, calls):
    def counted(self, first):
        calls.append(first)
        return function(self, first)

    return counted


def test_rows_that_are_passed_over_are_not_tokenized(order, tmp_path, monkeypatch) -> None:
    tokenized = []
    real = Preparation.tokenized
    monkeypatch.setattr(
        Preparation,
        "tokenized",
        lambda self, table, words: tokenized.append(len(table)) or real(self, table, words),
    )
    examples = streamed_of(order, folder=tmp_path)
    tokenized.clear()
    examples.go_to(StreamSampler("numbers", 4, 1).batch(40))
    assert sum(tokenized) <= 5


def test_progress_of_rows_that_are_passed_over(order) -> None:
    shown = []

    @contextmanager
    def watch(name):
        yield lambda rows, share: shown.append((name, rows, share))

    examples = StreamedExamples(order, prepared(order), WORDS, Reading(watch=watch))
    examples.go_to(StreamSampler("numbers", 4, 1).batch(20))
    assert shown[0][0] == order.stream.name
    assert shown[-1][1] >= 75
    assert shown[-1][2] == 1.0  # more would be less than no time left


def test_places_of_other_data_are_not_used(order, tmp_path) -> None:
    examples, sampler = streamed_of(order, folder=tmp_path), StreamSampler("numbers", 4, 1)
    for step in range(30):
        examples.task_batch(sampler.batch(step), step)
    examples.keep_marks(tmp_path)
    other = order_of(Path(order.stream.name), 17)
    resumed, expected = streamed_of(other, folder=tmp_path), whole(other, 10)
    resumed.go_to(sampler.batch(30))
    chosen = sampler.batch(30)
    assert_same(resumed.task_batch(chosen, 30), expected.task_batch(chosen, 30))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"sha256": 3}', "another place"])
def test_a_damaged_file_of_places(order, tmp_path, content) -> None:
    streamed_of(order, folder=tmp_path).keep_marks(tmp_path)
    path = tmp_path / "stream-numbers-rank-0.json"
    if content == "another place":
        said = json.loads(path.read_text())
        content = json.dumps(said | {"marks": [[0, 0, 0, 0, [[1, -2]]]]})
    path.write_text(content)
    with pytest.raises(InputError, match=r"stream-numbers-rank-0\.json: damaged; remove it"):
        streamed_of(order, folder=tmp_path)


def test_forgotten_examples_are_not_waited_for(order, monkeypatch) -> None:
    goes_on, blocks = threading.Event(), StreamOrder.blocks

    def slow(self: StreamOrder, place: Place) -> Iterator[Block]:
        for number, block in enumerate(blocks(self, place)):
            if number:
                goes_on.wait(30)
            yield block

    monkeypatch.setattr(StreamOrder, "blocks", slow)
    before = readers()
    examples = streamed_of(order)
    (reader,) = readers() - before
    begun = time.monotonic()
    del examples
    gc.collect()
    assert time.monotonic() - begun < 20
    assert reader.is_alive()
    goes_on.set()
    reader.join(30)
    assert not reader.is_alive()


def test_one_thread_reads_at_once(order) -> None:
    """Going back begins with a block anew, once the thread before has ended."""
    before = readers()
    examples, sampler = streamed_of(order), StreamSampler("numbers", 4, 1)
    for step in (0, 20, 1, 30):
        examples.task_batch(sampler.batch(step), step)
        assert len(readers() - before) == 1


def test_a_batch_before_is_read_again(order) -> None:
    examples, sampler = streamed_of(order), StreamSampler("numbers", 4, 1)
    first = examples.task_batch(sampler.batch(0), 0)
    examples.task_batch(sampler.batch(30), 30)
    assert_same(examples.task_batch(sampler.batch(0), 0), first)


def with_bad_rows(rows: list[dict]) -> list[dict]:
    """Every third row has a label that is none, or no sentence."""
    return [
        row | ({"label": 7} if number % 6 == 0 else {"sentence": " "} if number % 3 == 0 else {})
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("start", [0, 5, 29])
@pytest.mark.parametrize("kept", [False, True])
def test_bad_rows_are_skipped_and_counted(tmp_path, start, kept) -> None:
    shards = [with_bad_rows(numbered(30)), with_bad_rows(numbered(20, 30))]
    order = order_of(write_shards(tmp_path / "set", shards), 8)
    examples, expected = streamed_of(order, "skip", folder=tmp_path), whole(order, 40, "skip")
    sampler = StreamSampler("numbers", 3, 1)
    if kept:
        for step in range(40):
            examples.task_batch(sampler.batch(step), step)
        assert examples.bad_rows["empty sentence"] > 16
        assert examples.bad_rows["label is outside 0 to 1"] > 16
        assert re.search(r", train-\S+, row \d+; correct the row$", examples.first_bad)
        examples.keep_marks(tmp_path)
        examples = streamed_of(order, "skip", folder=tmp_path)
    examples.go_to(sampler.batch(start))
    for step in range(start, 40):
        chosen = sampler.batch(step)
        assert_same(examples.task_batch(chosen, step), expected.task_batch(chosen, step))


def test_a_bad_row_is_named_by_its_place(tmp_path) -> None:
    rows = numbered(30)
    rows[17]["label"] = 9
    order = order_of(write_shards(tmp_path / "set", [rows]), 1)
    examples, sampler = streamed_of(order), StreamSampler("numbers", 4, 1)
    with pytest.raises(InputError) as error:
        examples.go_to(sampler.batch(8))
    assert str(error.value) == (
        "label is outside 0 to 1: '9' in column 'label', data set "
        f"{tmp_path / 'set'}, split train, train-00000-of-00001.parquet, row 17; "
        "correct the row or see --on-bad-row"
    )


def test_a_stream_without_a_usable_row(tmp_path) -> None:
    rows = [row | {"label": 5} for row in numbered(12)]
    order = order_of(write_shards(tmp_path / "set", [rows]), 5)
    with pytest.raises(InputError, match=r"no usable row \(label is outside 0 to 1: 12\), data"):
        streamed_of(order, "skip")


def test_a_rank_without_a_row(tmp_path) -> None:
    order = order_of(write_numbered(tmp_path / "set", [2]), 5, (2, 3))
    with pytest.raises(InputError, match=r"no usable row, data set .*, for rank 2 of 3; give"):
        streamed_of(order)


USELESS = {
    "empty": [],
    "bad": [row | {"label": 5} for row in numbered(20, 100)],
    "blank": [{"sentence": " ", "label": 0}] * 4,
}


@pytest.mark.parametrize("kind", USELESS)
@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("kept", [False, True])
def test_a_rank_passes_over_epochs_without_a_row(tmp_path, kind, shards, kept) -> None:
    """Half of the files have none, so that in some epochs a rank has nothing but these."""
    half = shards // 2
    written = [numbered(6, 10 * number) for number in range(half)] + [USELESS[kind]] * half
    folder, sampler = (
        write_shards(tmp_path / "set", written, ending=".jsonl"),
        StreamSampler("numbers", 4, 1, 2),
    )
    for rank in range(2):
        order = order_of(folder, 8, (rank, 2))
        expected = whole(order, 60, "skip")
        examples = streamed_of(order, "skip", folder=tmp_path)
        start = 0
        if kept:
            examples.task_batch(sampler.batch(18)[rank::2], 18)
            examples.keep_marks(tmp_path)
            examples, start = streamed_of(order, "skip", folder=tmp_path), 15
        examples.go_to(sampler.batch(start))
        assert len(expected) >= 2 * 24
        for step in range(start, 24):
            own = np.arange(2 * step, 2 * step + 2)
            found = examples.task_batch(sampler.batch(step)[rank::2], step)
            assert_same(found, expected.task_batch(own, step))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", USELESS)
def test_no_shard_has_a_row(tmp_path, kind, ranks) -> None:
    """Each rank says so, whether it is dealt shards or rows, and does not look for ever."""
    shards = [USELESS[kind] or USELESS["blank"]] * 4
    order = order_of(write_shards(tmp_path / "set", shards, ending=".jsonl"), 8, (0, ranks))
    of_rank = f", for rank 0 of {ranks}" if ranks > 1 else ""
    with pytest.raises(InputError, match=rf"no usable row \(.*split train{of_rank}; the first"):
        streamed_of(order, "skip")


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_file_with_other_columns(tmp_path, ending) -> None:
    """The library takes no file with more columns than the first, whatever they are."""
    shards = [numbered(9), [row | {"z": 1} for row in numbered(9, 9)]]
    order = order_of(write_shards(tmp_path / "set", shards, ending=ending), 1)
    message = r"\(other columns than in the files before\); see that it .* has the columns of the"
    with pytest.raises(InputError, match=message):
        streamed_of(order).go_to(StreamSampler("numbers", 4, 1).batch(5))


def test_a_stream_without_a_column(tmp_path) -> None:
    rows = [{"text": "x", "label": 1}]
    order = order_of(write_shards(tmp_path / "set", [rows]), 5)
    with pytest.raises(InputError, match="no column 'sentence'"):
        streamed_of(order)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_file_that_is_cut_short(tmp_path) -> None:
    folder = write_numbered(tmp_path / "set", [20, 20], ending=".jsonl")
    path = folder / "train-00001-of-00002.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    order, said = order_of(folder, 1), ""
    try:
        streamed_of(order).go_to(StreamSampler("numbers", 4, 1).batch(40))
    except InputError as error:
        said = str(error)
    gc.collect()  # the library leaves the file open
    assert said.startswith(
        f"data set {folder}, split train, train-00001-of-00002.jsonl: cannot be read on behind row"
    )
    assert "\n" not in said


@pytest.mark.parametrize("sizes", [[20, 20], [13, 14, 15]])
def test_ranks_find_their_own_examples(tmp_path, sizes) -> None:
    folder = write_numbered(tmp_path / "set", sizes)
    sampler = StreamSampler("numbers", 7, 1, 2)
    for rank, share in ((0, 4), (1, 3)):
        order = order_of(folder, 8, (rank, 2))
        examples, expected = streamed_of(order), whole(order, 12)
        for step in range(9):
            batch = sampler.batch(step)
            own = np.arange(step * share, (step + 1) * share)
            found = examples.task_batch(batch[rank::2], step)
            assert_same(found, expected.task_batch(own, step))
            assert examples.terms(batch) == 7


def test_batches_that_are_too_small_for_the_ranks() -> None:
    with pytest.raises(InputError, match="batch_size = 1: too small for 2 ranks that each read"):
        StreamSampler("numbers", 1, 5, 2)


def order_of_kind(folder: Path, rows: list[dict], **fields) -> StreamOrder:
    source = TaskSource(dataset="given", streaming=True, **fields)
    write_shards(folder, [rows[:9], rows[9:]], ending=".jsonl")
    stream = HubStream(str(folder), "", "train")
    return StreamOrder(stream=stream, schema=source.format("own"), size=8, seed=0)


KINDS = {
    "tags": (
        {"kind": "token_classification", "text": ("words",), "label": "tags", "classes": 3},
        lambda i: {"words": ["number", *str(i)], "tags": [i % 3] * (1 + len(str(i)))},
    ),
    "several": (
        {
            "kind": "multi_label_classification",
            "text": ("sentence",),
            "label": "labels",
            "classes": ("a", "b"),
        },
        lambda i: {"sentence": f"number {i}", "labels": ["a"] * (i % 2) + ["b"] * (i % 3 == 0)},
    ),
    "windows": (
        {
            "kind": "question_answering",
            "text": ("question", "context"),
            "label": "answers",
            "window_overlap": 4,
        },
        lambda i: {
            "question": f"who is {i}",
            "context": " ".join(map(str, range(i + 1))),
            "answers": [
                {"text": str(i), "answer_start": len(" ".join(map(str, range(i)))) + (i > 0)}
            ],
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 7])
def test_other_kinds_of_tasks(tmp_path, kind, start) -> None:
    fields, row = KINDS[kind]
    order = order_of_kind(tmp_path / "set", [row(i) for i in range(24)], **fields)
    examples, expected = streamed_of(order), whole(order, 12)
    assert (len(expected) > 96) == (kind == "windows")
    sampler = StreamSampler("own", 4, 1)
    examples.go_to(sampler.batch(start))
    for step in range(start, 12):
        chosen = sampler.batch(step)
        assert examples.terms(chosen) == expected.terms(chosen)
        assert_same(examples.task_batch(chosen, step), expected.task_batch(chosen, step))


def test_texts_of_retrieval_have_the_same_numbers_on_all_ranks(tmp_path) -> None:
    rows = [{"q": f"who is {i % 3}", "a": f"the {i}"} for i in range(20)]
    order = order_of_kind(tmp_path / "set", rows, kind="retrieval", text=("q", "a"))
    examples, expected = streamed_of(order), whole(order, 10)
    chosen = np.arange(16)
    found, known = examples.task_batch(chosen, 0).labels.ids, expected.text_ids[chosen]
    assert (found >= 0).all()
    same = known.reshape(-1, 1) == known.reshape(1, -1)
    np.testing.assert_array_equal(found.reshape(-1, 1) == found.reshape(1, -1), same)
    other = examples.task_batch(np.arange(16, 36), 1).labels.ids
    assert set(found[:, 0].tolist()) == set(other[:, 0].tolist())


def test_the_task_of_a_source_is_streamed() -> None:
    assert isinstance(SOURCE.origin("numbers", "dev", None), HubStream)
    assert SOURCE.shuffle_buffer == 10_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streaming": False, "shuffle_buffer": 5}, "shuffle_buffer: has no effect without"),
        ({"dataset": "", "files": {"train": "f.csv"}}, "streaming: has no effect on files"),
        ({"splits": {"train": "train[:90%]"}}, r"splits.train: train\[:90%\] is a slice, which"),
        ({"shuffle_buffer": 0}, "greater than"),
    ],
)
def test_sources_that_cannot_be_streamed(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSource(**(SOURCE.model_dump(exclude_unset=True) | fields))


OUT = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: ../secret.csv
---
"""


def test_a_stream_reads_no_file_but_its_own(tmp_path) -> None:
    (tmp_path / "secret.csv").write_text("sentence,label\nx,1\n")
    write_numbered(tmp_path / "set", [3], ending=".csv")
    (tmp_path / "set" / "README.md").write_text(OUT)
    with pytest.raises(InputError, match=r"its README\.md names .*secret\.csv"):
        HubStream(str(tmp_path / "set"), "", "train").digest()


@pytest.mark.parametrize("ending", [".png", ".h5", ".pkl", ".py", ".pt", ".tar"])
def test_what_reads_other_kinds_of_files_streams_nothing(tmp_path, ending) -> None:
    (tmp_path / f"train{ending}").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"would be read as|cannot load split train"):
        HubStream(str(tmp_path), "", "train").digest()


def test_no_file_is_opened_for_a_column_of_a_stream(tmp_path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    data = Dataset.from_dict(
        {"sentence": [str(tmp_path / "secret.png")], "label": [1]},
        features=Features(sentence=Image(), label=Value("int64")),
    )
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train-00000.parquet")
    with pytest.raises(InputError, match=r"column 'sentence' holds neither text .* but Image"):
        streamed_of(order_of(tmp_path / "set", 5))


def test_class_labels_are_matched_by_name(tmp_path) -> None:
    """The data set numbers them in another order than the recipe."""
    data = Dataset.from_dict(
        {"sentence": ["number 1", "number 2"], "label": [0, 1]},
        features=Features(sentence=Value("string"), label=ClassLabel(names=["b", "a"])),
    )
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train-00000.parquet")
    source = SOURCE.model_copy(update={"classes": ("a", "b")})
    order = order_of(tmp_path / "set", 1)
    examples = streamed_of(replace(order, schema=source.format("named")))
    assert examples.task_batch(np.arange(2), 0).labels.tolist() == [1, 0]


def test_a_column_that_a_later_file_lacks(tmp_path) -> None:
    shards = [numbered(9), [{"label": 1}] * 3]
    order = order_of(write_shards(tmp_path / "set", shards, ending=".jsonl"), 50)
    with pytest.raises(InputError, match="no value in column 'sentence', data set"):
        streamed_of(order)
