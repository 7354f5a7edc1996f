"""Fixtures of the data tests."""

from pathlib import Path

import pytest

from engine.data.demo import write_demo
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Tokenizer:
    # Contexts would be half of all text, and the short vocabulary theirs.
    forms = [form for form in FORMATS.values() if form.labels != "spans"]
    tables = [read_table(form.file(demo, "dev"), form) for form in forms]
    return Tokenizer.train((text for t in tables for c in t.sentences for text in c), 500)


@pytest.fixture(scope="session")
def splits(demo: Path, tokenizer: Tokenizer) -> list[TokenizedSplit]:
    """The dev splits of sst, quora and sts."""
    return [
        tokenize(task, read_table(FORMATS[task].file(demo, "dev"), FORMATS[task]), tokenizer, 32)
        for task in ("sst", "quora", "sts")
    ]
