"""The benchmark of transformers encoders: its loops compute the same; no figure is asserted."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import harness, plot, transformers, transformers_cases
from bench.batching import register_varlen_attention
from bench.transformers_cases import Case
from engine.utils.errors import InputError
from tests.kernels import tolerance

CPU = torch.device("cpu")
TEXTS = Case("texts", trains=True, texts=("sst", "quora"))
FULL = Case("4 x 8 without mask", trains=False, shape=(4, 8), with_mask=False)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two narrow layers, and three examples of each text, one of them longer than a window."""
    sizes = {**transformers._SIZES, **SIZES, "intermediate_size": 48}
    monkeypatch.setattr(transformers, "_SIZES", sizes)
    files = dict.fromkeys(transformers_cases._FILES, ("", (), 3))
    monkeypatch.setattr(transformers_cases, "_FILES", files)
    monkeypatch.setattr(transformers_cases, "_LENGTHS", {"sst": (9, 5), "quora": (90, 60)})
    monkeypatch.setattr(transformers, "CASES", [TEXTS, FULL])


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "record.json"
    given = ["--device", "cpu", "--rounds", "2", "--no-compile", "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", ["bench.transformers", *given])
    transformers.main()
    return dict(json.loads(path.read_text()))


def test_every_model_and_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = run(monkeypatch, tmp_path, "--cases", *(case.name for case in (TEXTS, FULL)))
    results = record["results"]
    assert results["failures"] == {}
    measured = {(case["case"], case["mode"], case["model"]): case for case in results["cases"]}
    expected = [(case.name, case.mode) for case in (TEXTS, FULL)]
    assert list(measured) == [(*case, kind) for case in expected for kind in transformers._MODELS]
    for (name, _, _), case in measured.items():
        loops = ["transformers, padded", "accelerated, padded"]
        if name == TEXTS.name:
            loops += ["accelerated, packed", "transformers, sorted"]
        assert list(case["seconds"]) == loops
        assert all(len(samples) == 2 for samples in case["seconds"].values())
        assert case["peak_bytes"].keys() == case["seconds"].keys()
        assert (case["tokens"] == case["places"]) == (name == FULL.name)
    assert plot.draw(record).startswith(b"\x89PNG")


def test_batches_of_a_given_padding() -> None:
    """Of 50 random batches those nearest to it, for any number of them."""
    case = Case("texts", trains=True, texts=("sst", "quora"), full=0.4)
    all_of_them = transformers_cases.examples(case, 50, None, None)
    distances = [abs(transformers_cases.share_of_tokens([batch]) - 0.4) for batch in all_of_them]
    assert distances == sorted(distances)
    assert distances[-1] > 0.1
    assert transformers_cases.examples(case, 3, None, None) == all_of_them[:3]


def test_a_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = ["--cases", TEXTS.name, FULL.name, "--precisions", "fp32", "bf16"]
    only = [*cases, "--only", "^bert, 4 x 8.*inference, bf16$"]
    record = run(monkeypatch, tmp_path, *only)
    (case,) = record["results"]["cases"]
    assert (case["model"], case["case"], case["precision"]) == ("bert", FULL.name, "bf16")
    monkeypatch.setattr(sys, "argv", ["bench.transformers", "--list", *only])
    transformers.main()
    assert capsys.readouterr().out.splitlines()[-1] == "bert, 4 x 8 without mask, inference, bf16"
    monkeypatch.setattr(sys, "argv", ["bench.transformers", "--only", "no such name"])
    with pytest.raises(InputError, match="--only"):
        transformers.main()


def test_it_ends_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The clock is looked at once before the first case, and before each.
    monkeypatch.setattr(transformers.time, "monotonic", itertools.count(step=40).__next__)
    both = ["--models", "bert", "mpnet", "--cases", FULL.name, "--precisions", "fp32"]
    results = run(monkeypatch, tmp_path, *both, "--minutes", "1")["results"]
    assert [case["model"] for case in results["cases"]] == ["bert"]
    assert results["left_out"] == ["mpnet, 4 x 8 without mask, inference, fp32"]


def test_a_loop_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: object) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(transformers.kernels, "accelerate", refuse)
    with pytest.raises(SystemExit):
        run(
            *(monkeypatch, tmp_path, "--models", "bert", "--cases", FULL.name),
            *("--precisions", "fp32"),
        )
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    name = "bert, 4 x 8 without mask, inference, fp32, accelerated, padded"
    assert results["failures"] == {name: "ValueError: not this one"}
    assert results["cases"][0]["seconds"].keys() == {"transformers, padded"}


# ---- what the loops compute ---------------------------------------------------------------------


def hidden_states(loop: transformers.Loop) -> list[Tensor]:
    """Return the hidden states ``[T, H]`` of each batch's tokens, without dropout."""
    loop.model.eval()
    found = []
    for batch in loop.batches:
        with torch.no_grad():
            hidden = loop.model(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        found.append(hidden.flatten(0, 1) if mask is None else hidden[mask.bool()])
    return found


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    *_: object,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention as torch's ``varlen_attn`` computes it, which has no kernel for a CPU."""
    out = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        own = (x[start:end].transpose(0, 1) for x in (q, k, v))
        places = torch.arange(end - start)
        apart = (places[:, None] - places).abs()
        sees = (apart <= window_size[0]) | torch.tensor(window_size[0] < 0)
        out.append(F.scaled_dot_product_attention(*own, sees).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("kind", transformers._MODELS)
def test_all_loops_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attention)
    batches = transformers_cases.examples(TEXTS, 2, None, None)
    assert max(map(len, batches[0])) > 65  # beyond ModernBERT's window
    options = {"autocast": False, "compiled": False}
    model = transformers._model(None, kind)
    makers = transformers.loops(model, TEXTS, batches, CPU, **options)
    plain = makers["transformers, padded"]()
    torchs = hidden_states(plain)
    plain.model.double()
    exact = hidden_states(plain)
    found = {name: makers[name]() for name in ("accelerated, padded", "accelerated, packed")}
    if kind not in transformers._ONE_ATTENTION:
        first = 2 if kind in transformers._COUNT_FROM_PADDING else 0
        stream = [transformers_cases.packed(batch, CPU) for batch in batches]
        one_row = [transformers_cases.with_positions(batch, first) for batch in stream]
        own = transformers._model(None, kind)
        own.set_attn_implementation(register_varlen_attention())
        assert own.config._attn_implementation == "torch_varlen"
        found["unpadded"] = transformers.Loop(own, one_row, TEXTS, **options)
    for loop in found.values():
        for values in zip(hidden_states(loop), torchs, exact, strict=True):
            tolerance.assert_within_twice(*values)


def test_one_attention_cannot_be_exchanged() -> None:
    for kind in transformers._MODELS:
        model = transformers._model(None, kind)
        is_fixed = kind in transformers._ONE_ATTENTION
        assert model._can_set_attn_implementation() != is_fixed


def test_no_gradients_are_left_between_samples() -> None:
    batches = transformers_cases.examples(TEXTS, 1, None, None)
    model = transformers._model(None, "bert")
    makers = transformers.loops(model, TEXTS, batches, CPU, autocast=False, compiled=False)
    loop = makers["transformers, padded"]()
    peaks = [harness.peak_memory(loop, CPU) for _ in range(2)]
    # All that a pass allocates counts, its gradients too, in the first pass as in others.
    assert peaks[0] == peaks[1] > sum(p.nbytes for p in loop.model.parameters())
    assert all(p.grad is None for p in loop.model.parameters())
