"""Sweeps over settings of kernels, without a GPU: times are made up."""

import ast
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import attention_tiles, harness, linear_tiles, tile_sweep
from bench.tile_sweep import Budget, Choice, Compiled
from kernels.attention import attention_runs_triton, attention_triton
from kernels.attention.attention_triton import Tiles
from kernels.linear import linear_triton

TABLES = {
    "attention_triton.TILES": (attention_triton, attention_triton.TILES),
    "attention_triton.LONG_TILES": (attention_triton, attention_triton.LONG_TILES),
    "attention_runs_triton.WARPS": (attention_runs_triton, attention_runs_triton.WARPS),
    "linear_triton.TILES": (linear_triton, linear_triton.TILES),
}
CPU = torch.device("cpu")


def parse(lines: list[str], module: Any) -> dict[Any, Any]:
    return eval("{" + "\n".join(lines) + "}", {"Tiles": getattr(module, "Tiles", None)})


@pytest.mark.parametrize("name", TABLES)
def test_lines_are_the_sources(name: str) -> None:
    """Of every dtype and width in the table; and they parse to the same table."""
    module, table = TABLES[name]
    lines = [tile_sweep.line_of(key, setting) for key, setting in table.items()]
    assert parse(lines, module) == table
    assert all(ast.parse("{" + line + "}", mode="eval") for line in lines)
    source = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    assert [line for line in source if line in lines] == lines


def test_the_table_of_a_sweep_marks_the_least() -> None:
    seconds = {
        "one": {"a": [2e-6, 2e-6], "b": [1e-6, 1e-6]},
        "two": {"a": [3e-6], "b": [4e-6], "c": [5e-6]},
        "three": {},
    }
    console = Console(width=60, record=True)
    console.print(tile_sweep.table_of("title", "tiles", seconds))
    text = console.export_text()
    assert "1.0 *" in text
    assert "3.0 *" in text
    assert text.count("*") == 2
    assert text.count(" - ") == 4


def test_what_goes_wrong_is_told() -> None:
    def fail() -> None:
        raise RuntimeError("out of shared memory")

    assert tile_sweep.attempt(fail) == "RuntimeError: out of shared memory"
    assert tile_sweep.attempt(list) == ""


def test_the_fastest_over_all_cases() -> None:
    seconds = {
        "one": {"1": [1.0], "2": [2.0], "4": [0.5], "8": [0.1]},
        "two": {"1": [8.0], "2": [2.0], "4": [9.0]},
    }
    best = tile_sweep.fastest([1, 2, 4, 8], 1, seconds)
    assert best is not None
    assert best[0] == 2  # 2 x 1/4, and 8 was not measured in both
    assert best[1] == pytest.approx(0.5**0.5)
    assert tile_sweep.fastest([1], 1, seconds) == (1, 1.0)
    assert tile_sweep.fastest([1, 2], 8, seconds) is None
    assert tile_sweep.fastest([1, 2], 1, {}) is None


def test_what_is_compiled_too_late_is_told() -> None:
    """In processes of their own, which are ended."""
    start = time.monotonic()
    wrong = tile_sweep.compile_all(str.strip, [("",), (" no ",)], Budget(600))
    assert wrong == Compiled({(" no ",): "no"}, [])
    late = tile_sweep.compile_all(time.sleep, [(300,)], Budget(1))
    assert late == Compiled({}, [(300,)])
    assert time.monotonic() - start < 200


class Clock:
    """A GPU whose recordings take seconds by a clock of its own, and a call that takes a time."""

    def __init__(self, recording: float) -> None:
        self.now, self._recording = 0.0, recording
        self.recorded: list[Any] = []

    def replay(self, run: harness.Contestant, device: torch.device) -> harness.Contestant:
        self.now += self._recording
        took = run()
        self.recorded.append(took)
        return lambda: took

    def seconds(
        self, contestants: dict[str, Any], device: torch.device, *, rounds: int, replays: int
    ) -> dict[str, list[float]]:
        return {name: [contestant()] * rounds for name, contestant in contestants.items()}


def stub(monkeypatch: pytest.MonkeyPatch, recording: float) -> Clock:
    clock = Clock(recording)
    monkeypatch.setattr(harness, "graph_replay", clock.replay)
    monkeypatch.setattr(harness, "device_seconds", clock.seconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    budget = tile_sweep.Budget
    monkeypatch.setattr(tile_sweep, "Budget", lambda s, c=lambda: clock.now: budget(s, c))
    return clock


def test_settings_beyond_the_budget_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, current = stub(monkeypatch, 1.0), [0.0]

    @contextmanager
    def using(setting: float) -> Iterator[None]:
        current[0] = setting
        yield

    arguments = ([4.0, 3.0, 2.0, 1.0], using, CPU)
    budget = Budget(4, lambda: clock.now)  # half of it for recording
    found, late = tile_sweep.measure(lambda: current[0], *arguments, budget)
    assert list(found) == ["4.0", "3.0"]
    assert late == [2.0, 1.0]
    spent = Budget(0, lambda: clock.now)
    assert tile_sweep.measure(lambda: current[0], *arguments, spent) == ({}, arguments[0])


def time_of(kernel: str, lengths: list[int], width: int) -> float:
    """Made up: as if the fastest had 2 warps and, of long sequences, 128 queries."""
    key = (kernel, 2, width)
    if kernel.endswith("runs"):
        return 1 + abs(attention_runs_triton.WARPS[key] - 2)
    is_long = sum(lengths) > attention_triton.LONG * len(lengths)
    tables = (attention_triton.LONG_TILES, attention_triton.TILES)
    tiles = next(table[key] for table in tables[0 if is_long else 1 :] if key in table)
    return 1 + abs(tiles.num_warps - 2) + (abs(tiles.queries - 128) if is_long else tiles.keys)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands in for the GPU of `bench.attention_tiles`; a kernel and its time are told apart."""
    clock = stub(monkeypatch, 0.001)
    replaced = attention_tiles.replaced
    using: list[str] = []

    @contextmanager
    def noted(kernel: str, setting: Any, width: int) -> Iterator[None]:
        using[:] = [kernel]
        with replaced(kernel, setting, width):
            yield

    class Call:
        def __init__(self, lengths: list[int], width: int) -> None:
            self._lengths, self._width = lengths, width

        def forward(self) -> float:
            return time_of(using[0], self._lengths, self._width)

        backward = forward

    monkeypatch.setattr(attention_tiles, "replaced", noted)
    monkeypatch.setattr(attention_tiles, "Call", Call)
    monkeypatch.setattr(tile_sweep, "compile_all", lambda *_: Compiled({}, []))
    return clock


def printed_tables(text: str) -> dict[str, list[str]]:
    """The lines below each heading, of what comes last."""
    found: dict[str, list[str]] = {}
    for line in text[text.index("What compiles here") :].splitlines()[1:]:
        if line.startswith("    "):
            list(found.values())[-1].append(line)
        else:
            found[line.split(" of the time")[0].split(", in ")[0]] = []
    return found


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_lines_of_attention_to_paste(
    width: int, sweep: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--width", str(width)])
    assert attention_tiles.main() == 0
    text = capsys.readouterr().out
    assert "not measured" not in text
    found = printed_tables(text)
    runs, tiles, long = (
        f"kernels/attention/attention_{name}"
        for name in ("runs_triton.py WARPS", "triton.py TILES", "triton.py LONG_TILES")
    )
    kernels = ("forward", "grad_q", "grad_kv")
    for name, table, own in (
        (runs, attention_runs_triton.WARPS, ("forward_runs", "backward_runs")),
        (tiles, attention_triton.TILES, kernels),
    ):
        now = parse(found[f"{name}, now:"], attention_triton)
        assert now == {(kernel, 2, width): table[kernel, 2, width] for kernel in own}
        assert parse(found[f"{name}, to paste"], attention_triton).keys() == now.keys()
    pasted = parse(found[f"{runs}, to paste"], attention_triton)
    assert set(pasted.values()) == {2}
    # As though pasted: no setting is faster.
    for kernel, line in parse(found[f"{tiles}, to paste"], attention_triton).items():
        others = attention_tiles.candidates(kernel[0], width)
        cost = [1 + abs(each.num_warps - 2) + each.keys for each in others]
        assert 1 + abs(line.num_warps - 2) + line.keys == min(cost)
    # Of long sequences by cost, whether the table has a line of its own now or not.
    others = attention_tiles.candidates("forward", width)
    cost = {each: abs(each.num_warps - 2) + abs(each.queries - 128) for each in others}
    line = parse(found[f"{long}, to paste"], attention_triton)["forward", 2, width]
    assert cost[line] == min(cost.values())
    now = parse(found[f"{long}, now:"], attention_triton)
    assert now == {k: v for k, v in attention_triton.LONG_TILES.items() if k[2] == width}
    lines = text.splitlines()
    assert len(lines) - lines.index(next(x for x in lines if "What compiles" in x)) <= 25


def test_what_attention_had_no_time_for_is_named(
    sweep: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = attention_triton.TILES["grad_q", 2, 64]  # measured, however late it was compiled
    sweep._recording = 0.5  # 172 recordings in 25 s
    monkeypatch.setattr(sys, "argv", ["bench", "--seconds", "25"])
    monkeypatch.setattr(
        tile_sweep,
        "compile_all",
        lambda *_: Compiled(
            {("grad_q", Tiles(16, 32, 2, 2), 64): "OutOfResources: shared memory"},
            [("forward", Tiles(64, 64, 4, 2), 64), ("grad_q", usual, 64)],
        ),
    )
    assert attention_tiles.main() == 0
    text = capsys.readouterr().out
    assert "grad_q Tiles(16, 32, 2, 2): OutOfResources: shared memory" in text
    assert "not measured, since 25 s did not suffice: forward Tiles(64, 64, 4, 2); " in text
    assert "forward Tiles(128, 128, 8, 2) in cfimdb x 256" in text
    assert sweep.now <= 26
    tiles = printed_tables(text)["kernels/attention/attention_triton.py TILES, to paste"]
    assert len(tiles) == 3  # the current settings come first, so that there is a line


def test_the_line_of_linear_to_paste(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, 0.001)

    class Inputs:
        def copies_beyond_cache(self) -> int:
            return 2

        def another(self) -> "Inputs":
            return self

    def replay(run: Any, _device: torch.device) -> Any:
        run()
        tiles = linear_triton.TILES[linear_tiles.KEY]
        return lambda: float(tiles.tokens + tiles.num_stages)

    monkeypatch.setattr(harness, "graph_replay", replay)
    monkeypatch.setattr(linear_tiles, "_inputs", lambda *_: Inputs())
    monkeypatch.setattr(linear_tiles, "runs", lambda _: {linear_tiles.OURS: list})
    monkeypatch.setattr(tile_sweep, "compile_all", lambda *_: Compiled({}, []))
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert linear_tiles.main() == 0
    found = printed_tables(capsys.readouterr().out)
    name = "kernels/linear/linear_triton.py TILES"
    now, pasted = (
        parse(found[f"{name}, {which}"], linear_triton) for which in ("now:", "to paste")
    )
    assert now == {(2, "large"): linear_triton.TILES[2, "large"]}
    assert pasted == {(2, "large"): linear_triton.Tiles(128, 128, 32, 8, 4)}


def test_a_sweep_that_finds_nothing_for_a_line_fails() -> None:
    found = Choice("file TABLE", ("forward", 2, 32), 2, (3, 0.9))
    assert tile_sweep.print_end({}, [], Budget(1), [found]) == 0
    assert tile_sweep.print_end({}, [], Budget(1), [found, found._replace(found=None)]) == 1


def test_a_line_that_is_not_there_now_is_reported_alone() -> None:
    text = tile_sweep.report([Choice("file TABLE", ("forward", 2, 32), None, (3, 0.9))])
    assert text.splitlines()[1:] == [
        "file TABLE, now:",
        "file TABLE, to paste, in 0.90 of the time:",
        '    ("forward", 2, 32): 3,',
    ]
