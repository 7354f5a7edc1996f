"""Options of the benchmarks: a wrong one ends with one line and status 2."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bench

COUNTS = ("0", "-1", "1.5", "nan", "inf", "many", "", "99999999999999999999")
REALS = ("0", "-1", "nan", "inf", "-inf", "fast", "", "1e-320", "1e300")
ONE = (*COUNTS, "1")
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {
        "--width": COUNTS,
        "--rounds": ONE,
        "--device": ("gpu", ""),
        "--case": ("sst",),
        "--only": ("(",),
    },
    "distributed": {"--ranks": ONE, "--batch-size": COUNTS, "--rounds": ONE},
    "fusion": {"--tokens": (*ONE, "159"), "--width": COUNTS, "--rounds": COUNTS},
    "gated_activation": {
        **{"--rows": COUNTS, "--width": COUNTS, "--rounds": ONE},
        **{"--device": ("gpu",), "--dtype": ("fp64",)},
    },
    "large_data": {
        **{"--rows": COUNTS, "--repeats": COUNTS, "--workers": COUNTS, "--seed": COUNTS[1:]},
        **{"--device": ("gpu",), "--encoder": ("",)},
    },
    "layer_norm": {"--rows": COUNTS, "--width": COUNTS, "--rounds": ONE, "--device": ("gpu",)},
    "linear": {
        **{"--tokens": COUNTS, "--tasks": COUNTS, "--shares": COUNTS},
        **{"--rounds": ONE, "--device": ("gpu",)},
    },
    "linear_tiles": {"--tokens": COUNTS, "--tasks": COUNTS, "--seconds": COUNTS},
    "attention_tiles": {"--width": COUNTS, "--seconds": COUNTS},
    "rotary": {
        **{"--tokens": COUNTS, "--width": ONE, "--heads": COUNTS, "--rounds": ONE},
        "--device": ("gpu",),
    },
    "scaling": {
        **dict.fromkeys(("--forward", "--backward", "--update", "--latency", "--bandwidth"), REALS),
        **dict.fromkeys(("--tasks", "--ranks"), COUNTS),
    },
    "kernels_once": {"--columns": COUNTS, "--runs": COUNTS, "--case": ("sst",)},
    "scaling_check": {"--steps": ONE},
    "balancing.noise": {"--steps": COUNTS[1:], "--batches": (*ONE, "65")},
    "step": {
        **{"--batch-size": COUNTS, "--rounds": ONE, "--device": ("gpu",)},
        **{"--warmup-seconds": COUNTS, "--only": ("(",)},
        "--masked-lm": (*COUNTS, "511"),
    },
    "transformers": {
        **{"--batches": COUNTS, "--rounds": ONE, "--device": ("gpu",), "--warmup-seconds": COUNTS},
        **{"--minutes": COUNTS, "--only": ("(",), "--compile": ("(",), "--cases": ("512",)},
        "--precisions": ("fp16",),
    },
    "surgery": {"--tasks": COUNTS, "--columns": COUNTS, "--rounds": ONE, "--device": ("gpu",)},
    "readme_walkthrough": {"--steps": COUNTS[:-1]},
    "argument_checks": {"no.so": ("--",), "--json": ("",)},
}
CASES = [
    (name, option, value)
    for name, options in OPTIONS.items()
    for option, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("name", "option", "value"), CASES)
def test_a_bad_option_is_one_line(
    name: str,
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", ["bench", *([option] if value == "--" else [option, value])])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert option.removeprefix("--") in printed.err


def test_no_number_is_read_without_its_range() -> None:
    for source in Path(bench.__file__).parent.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"type=(int|float)\b(?!, choices)", text), source
        assert "ArgumentParser(" not in text, source


def test_the_readme_is_tried_with_nothing_but_python() -> None:
    command = [sys.executable, "-S", "-m", "bench.readme_walkthrough", "--help"]
    root = Path(bench.__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_file_that_is_no_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module("bench.argument_checks")
    other = tmp_path / "other.so"
    other.write_bytes(b"none")
    monkeypatch.setattr(module, "OWN", str(other))
    monkeypatch.setattr(sys, "argv", ["bench", str(other)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
