"""A benchmark's record: its place is checked before anything is measured."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import harness


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return harness.parse(argparse.ArgumentParser())


def test_a_record_that_is_there_ends_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    record.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--json", str(record))
    assert stop.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert parse(monkeypatch, "--json", str(record), "--force").force
    assert not parse(monkeypatch, "--json", str(tmp_path / "new.json")).force
    assert record.read_text() == "mine"


def test_a_record_is_not_written_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, cpu = tmp_path / "more/record.json", torch.device("cpu")
    harness.write_record(record, "one", cpu, {})
    with pytest.raises(SystemExit) as stop:
        harness.write_record(record, "other", cpu, {})
    assert stop.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert json.loads(record.read_text())["benchmark"] == "one"
    harness.write_record(record, "other", cpu, {}, replace=True)
    assert json.loads(record.read_text())["benchmark"] == "other"
