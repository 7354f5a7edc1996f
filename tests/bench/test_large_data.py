"""The benchmark of large data: its table, samples of memory, and record; no figure is asserted."""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from bench import large_data, large_table, process_memory, random_encoder
from engine.utils.errors import InputError


def sentences(path: Path) -> list[list[str]]:
    """The words of all sentences of a table."""
    with path.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    assert tuple(rows[0]) == large_table.COLUMNS
    assert [row[""] for row in rows] == [str(number) for number in range(len(rows))]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["is_duplicate"] for row in rows} == {"0.0", "1.0"}
    return [row[name].split() for row in rows for name in ("sentence1", "sentence2")]


def test_the_same_table_in_any_blocks(tmp_path):
    large_table.write(tmp_path / "few.tsv", 15, seed=3)
    written = large_table.write(tmp_path / "table.tsv", 10_001, seed=3)
    large_table.write(tmp_path / "other.tsv", 15, seed=4)
    content = (tmp_path / "table.tsv").read_bytes()
    few, other = ((tmp_path / f"{name}.tsv").read_bytes() for name in ("few", "other"))
    assert content.startswith(few)
    assert not content.startswith(other)
    assert (written.rows, written.bytes) == (10_001, len(content))
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    found = sentences(tmp_path / "table.tsv")
    assert len(found) == 2 * written.rows
    assert sum(map(len, found)) == written.words
    # It stays what the records were made with.
    assert hashlib.sha256(few).hexdigest().startswith("3a4524eae44921cb")
    with pytest.raises(FileExistsError):
        large_table.write(tmp_path / "few.tsv", 15, seed=3)


def test_words_follow_zipf(tmp_path):
    words = large_table.vocabulary()
    assert len(set(words)) == len(words) > 5000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    large_table.write(tmp_path / "table.tsv", 10_000, seed=0)
    found = sentences(tmp_path / "table.tsv")
    assert {len(sentence) for sentence in found} == set(range(4, 15))
    assert all(sentence[-1].endswith("?") for sentence in found)
    every = [word.rstrip("?") for sentence in found for word in sentence]
    shares = large_table.zipf_bounds(len(words))
    for rank in (0, 1, 9, 99):
        expected = len(every) * (shares[rank] - (shares[rank - 1] if rank else 0))
        # Six standard deviations of a count.
        assert abs(every.count(words[rank]) - expected) < 6 * expected**0.5


def test_descendants():
    assert process_memory.descendants(5, {6: 5, 7: 6, 8: 1, 9: 5}) == [5, 6, 9, 7]
    assert process_memory.descendants(5, {}) == [5]


def test_memory_of_a_process_and_its_children(tmp_path):
    size = 64 << 20
    child = f"import time; held = b'x' * {size}; print('held', flush=True); time.sleep(60)"
    parent = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "pathlib.Path(sys.argv[1]).write_text('held')\n"
        "import time; time.sleep(1)\n"
        "child.kill()\n"
        "print(child.wait())\n"
    )
    mark = tmp_path / "mark"
    watched = process_memory.watch(
        [sys.executable, "-c", parent, str(mark)], {}, tmp_path / "log", lambda: False
    )
    assert watched.status == 0
    assert (tmp_path / "log").read_text() == "-9\n"
    assert watched.processes == 2
    assert watched.peak.whole >= watched.peak.anonymous > size > watched.main > 0
    assert watched.seconds > 1


def test_processes_that_have_ended_have_no_memory():
    assert process_memory.memory_of([os.getpid()]).anonymous > 0
    assert process_memory.memory_of([1 << 30]) == (0, 0)


def test_a_sample_is_the_last(tmp_path):
    asked = []

    def is_done() -> bool:
        asked.append(True)
        return len(asked) == 2

    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    process_memory.watch(command, {}, tmp_path / "log", is_done)
    assert len(asked) == 2


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """A folder with a small encoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"model_type": "bert", **sizes, "intermediate_size": 48}
    monkeypatch.setitem(random_encoder.SHAPES, "small", shape)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *large_table.vocabulary()[:500]]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    random_encoder.write(tmp_path / "encoder", "small", tmp_path / "vocab.txt")
    return tmp_path / "encoder"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict:
    path = folder / "record.json"
    given = ["--device", "cpu", "--rows", "2000", "--workers", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench.large_data", *given, *arguments])
    large_data.main()
    return json.loads(path.read_text())


@pytest.mark.long
def test_every_start_is_in_the_record(encoder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    kept = tmp_path / "kept"
    record = run(monkeypatch, tmp_path, "--encoder", str(encoder), "--keep", str(kept))
    assert record["benchmark"] == "large data"
    results = record["results"]
    assert results["failures"] == {}
    names = [
        f"{program}, {start}"
        for program in ("this engine", "datasets")
        for start in ("1,000 rows", "first start", "second start")
    ]
    assert list(results["starts"]) == names
    for (sample,) in results["starts"].values():
        assert 0 < sample["seconds"] < sample["whole_seconds"]
        assert sample["peak_bytes"] > sample["peak_anonymous_bytes"] > 0
        assert sample["main_peak_bytes"] > 0
        assert sample["processes"] >= 1
        assert sample["cache_bytes"] > 0
    table = results["table"]
    content = (kept / "large" / "pairs-train.tsv").read_bytes()
    assert table["rows"] == 2000
    assert table["sha256"] == hashlib.sha256(content).hexdigest()
    assert 1 < table["tokens_a_word"] < 1.5
    assert sorted(path.name for path in kept.iterdir()) == ["large", "logs", "small"]


@pytest.mark.long
def test_from_scratch_and_a_failure(tmp_path, monkeypatch):
    results = run(monkeypatch, tmp_path, "--from-scratch")["results"]
    assert list(results["starts"]) == [
        *("this engine, 1,000 rows", "this engine, first start", "this engine, second start")
    ]
    monkeypatch.setattr(large_data, "_RECIPE", "train = 3\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--from-scratch", "--force")
    failures = json.loads((tmp_path / "record.json").read_text())["results"]["failures"]
    assert "ended with status 2" in failures["this engine"]


def test_repeats_take_turns_and_a_failure_stops_nothing(encoder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    sizes = ("peak_bytes", "peak_anonymous_bytes", "main_peak_bytes", "processes", "cache_bytes")
    begun = []

    def starts(_contestant, _folder, log):
        begun.append(log)
        if log == "datasets, 2":
            raise RuntimeError("ended with status 1")
        yield "first start", {"seconds": 1.0, "whole_seconds": 2.0} | dict.fromkeys(sizes, 3)

    monkeypatch.setattr(large_data, "starts", starts)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--encoder", str(encoder), "--repeats", "3")
    turns = (("this engine", "datasets", 1), ("datasets", "this engine", 2))
    turns += (("this engine", "datasets", 3),)
    assert begun == [f"{name}, {repeat}" for *names, repeat in turns for name in names]
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    counts = {name: len(samples) for name, samples in results["starts"].items()}
    assert counts == {"this engine, first start": 3, "datasets, first start": 2}
    assert results["failures"] == {"datasets": "ended with status 1"}


def test_options_that_do_not_go_together(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--encoder: give a model folder, or --from-scratch"):
        run(monkeypatch, tmp_path)
    with pytest.raises(InputError, match="--encoder: give a model folder, or --from-scratch"):
        run(monkeypatch, tmp_path, "--encoder", str(tmp_path), "--from-scratch")
    with pytest.raises(InputError, match=r"no model folder: no config\.json"):
        run(monkeypatch, tmp_path, "--encoder", str(tmp_path))
    with pytest.raises(InputError, match="is there already"):
        run(monkeypatch, tmp_path, "--from-scratch", "--keep", str(tmp_path))
