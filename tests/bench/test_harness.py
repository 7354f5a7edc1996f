"""A benchmark's record: its place is checked before anything is measured."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gated_activation, harness, kernels_once, layer_norm, memory_bound


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


def test_a_contestant_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="more than 1 s"), harness.at_most(1):
        time.sleep(30)
    with harness.at_most(1):
        pass
    assert signal.alarm(0) == 0


def test_layer_norm_is_kept_case_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(layer_norm._KINDS, "plain", (with_a_peer_that(fails), 5, 0))
    monkeypatch.setattr(layer_norm.torch, "compile", lambda function, **_: function)
    record = tmp_path / "record.json"
    sizes = ["--rows", "8", "--width", "16", "--rounds", "2", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", *sizes, "--json", str(record)])
    with pytest.raises(SystemExit):  # one failed, by its name; the others were measured
        layer_norm.main()
    results = json.loads(record.read_text())["results"]
    assert results["failures"] == {
        "broken, [8, 16] plain, fp32": "RuntimeError: no such kernel",
    }
    assert results["[8, 16] plain, fp32"]["seconds"].keys() == {"this project", "torch"}
    assert len(results["[8, 16] embedding, fp32"]["seconds"]["this project"]) == 2


def test_gated_activations_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_activation.torch, "compile", lambda function, **_: function)
    record = tmp_path / "record.json"
    sizes = ["--rows", "8", "--width", "16", "--rounds", "2", "--dtype", "bf16"]
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", *sizes, "--json", str(record)])
    gated_activation.main()
    results = json.loads(record.read_text())["results"]
    assert results.pop("failures") == {}
    assert results.pop("copy_bytes_per_s, bf16") > 0
    assert results.keys() == {f"[8, 16] {kind}, bf16" for kind in gated_activation.KINDS}
    for measured in results.values():
        assert measured["seconds"].keys() == {"this project", "torch", "torch.compile"}


def with_a_peer_that(fails: harness.Contestant) -> object:
    def runs(inputs: layer_norm.Inputs, device: str) -> memory_bound.Runs:
        found = layer_norm.plain_runs(inputs, device)
        return {"this project": found["this project"], "torch": found["torch"], "broken": fails}

    return runs


def test_kernels_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["gram", "combine", "attention", "--columns", "100", "--case", "sst x 32"]
    monkeypatch.setattr(sys, "argv", ["x", *parts, "--device", "cpu"])
    kernels_once.main()
