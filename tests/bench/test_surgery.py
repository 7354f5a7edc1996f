"""bench.surgery times the update that a training step makes, and writes a record that is read."""

import json
import sys
from pathlib import Path

import pytest
import torch

import kernels
from bench import plot, surgery


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_pcgrad_clipped_into_adamw(dtype: torch.dtype) -> None:
    update = surgery.Update(3, 5000, dtype, "cpu")
    state = [update.master, update.exp_avg, update.exp_avg_sq]
    state += [] if update.low_precision is None else [update.low_precision]
    expected = [x.clone() for x in state]
    gram = kernels.gram(update.rows)
    weights = kernels.pcgrad_weights(gram, kernels.draw_order(3, update.seed))
    guard = kernels.update_guard(gram, weights, max_norm=1.0)
    for own, decay in (
        (slice(0, update.decayed), 0.01),
        (slice(update.decayed, None), 0.0),
    ):
        kernels.combine_adamw_(
            *(update.rows[:, own], weights, *(x[own] for x in expected)),
            **{"lr": update.lr, "step": update.count, "weight_decay": decay},
            **{"scale": guard.scale, "skip": guard.skip},
        )
    update()
    for found, wanted in zip(state, expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_update_calls_what_a_step_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("combine_adamw_segments_", "update_summary"):
        operator = getattr(kernels, name)

        def note(*arguments: object, name=name, operator=operator, **options: object) -> object:
            called.append(name)
            return operator(*arguments, **options)

        monkeypatch.setattr(kernels, name, note)
    surgery.Update(2, 100, torch.float32, "cpu")()
    assert called == ["update_summary", "combine_adamw_segments_"]


def test_its_record_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "surgery.json"
    arguments = ["--device", "cpu", "--columns", "2000", "--dtype", "bf16", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["surgery", *arguments, "--json", str(path)])
    surgery.main()
    results = json.loads(path.read_text())["results"]
    cases = dict(plot.cases(results, "surgery"))
    assert {"gram", "combine", "combine + AdamW"} < cases["operators, bf16"].keys()
    assert "this project" in cases["updates, bf16"]
    assert {"tasks", "columns", "gram", "combine + AdamW"} == results["growth"][0].keys()
    assert "GB/s" in capsys.readouterr().out
