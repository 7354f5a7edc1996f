"""Records of a run that are corrupted: what reads them says which line is wrong, or reads on."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import evaluate, export, report, sweep, train
from engine.config import recipe as recipes
from engine.metrics.jsonl import StepLines
from engine.metrics.read import read_evaluation_lines, read_step_lines
from engine.reporting import plots
from engine.reporting.outcomes import collect, read_outcomes, to_json
from engine.reporting.run_data import read_evaluations, read_steps
from engine.runs.experiments import read_results, training_seconds
from engine.runs.run import Run, open_run
from engine.runtime.precision import pick_device
from engine.utils.errors import InputError
from tests.engine.conftest import TINY

LINE = {
    "step": 1,
    "lr": 1e-3,
    "tokens": 50,
    "losses": {"sst": 1.5, "sts": None},
    "weights": {"sst": 1.0, "sts": 1.0},
    "cosines": {"sst/sts": 0.5},
    "conflict_rate": 0.0,
    "task_grad_norms": {"sst": 1.0, "sts": 2.0},
    "grad_norm": 3.0,
    "skipped": 0,
    "tokens_per_s": 100.0,
}
EVALUATION = {"step": 1, "split": "dev", "scores": {"sst": 0.5, "overall": None}}
NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "null")
WRONG = (
    *('"1"', '""', '"x"', "true", "[]", "[1]", "{}", '{"a": {"b": 1}}', '{"a": "1"}', '{"a": [1]}'),
    *(
        "1e300",
        "-1e300",
        "9" * 5000,
        "[" * 5000,
        '{"a":' * 5000,
        '"\\ud800"',
        "nan",
        "0x1",
        "01",
        "1.",
        "",
    ),
)


def written(path: Path, *lines: str | bytes) -> Path:
    parts = (line.encode() if isinstance(line, str) else line for line in lines)
    path.write_bytes(b"\n".join([*parts, b""]))
    return path.parent


def with_value(line: dict, key: str, value: str) -> str:
    """The line as JSON, one value of it replaced by a text."""
    return json.dumps(line | {key: "HERE"}).replace('"HERE"', value)


def corrupted_lines(line: dict) -> Iterator[str | bytes]:
    for key in line:
        yield json.dumps({name: value for name, value in line.items() if name != key})
        yield from (with_value(line, key, value) for value in WRONG)
    yield from (with_value(line, "step", value) for value in (*NOT_FINITE, "-1", "1.5", "1e3"))
    good = json.dumps(line)
    yield from ("", " ", "null", "[]", f"[{good}]", good * 2, good[:-1], "{" + good, "\0" * 9)
    yield from (good.encode("utf-16"), good.encode("utf-32"), b"\xef\xbb\xbf" + good.encode())
    yield good.encode().replace(b"step", b"st\xffep")


@pytest.mark.parametrize(
    ("name", "line", "read"),
    [
        ("metrics.jsonl", LINE, read_step_lines),
        ("metrics.jsonl", LINE, training_seconds),
        ("evaluations.jsonl", EVALUATION, read_evaluation_lines),
    ],
    ids=["steps", "seconds", "evaluations"],
)
def test_a_wrong_line_is_named(tmp_path, name, line, read):
    good, last = json.dumps(line | {"step": 0}), json.dumps(line | {"step": 2})
    tables = {key for key, value in line.items() if isinstance(value, dict)}
    allowed = {with_value(line, key, "{}") for key in tables}
    for wrong in corrupted_lines(line):
        folder = written(tmp_path / name, good, wrong, last)
        if wrong in allowed:
            read(folder)
            continue
        with pytest.raises(InputError, match=rf"{name}:2: not a line of metrics \(.*\); remove it"):
            read(folder)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_number_that_is_not_finite_is_none(tmp_path, value):
    for key in ("lr", "conflict_rate", "grad_norm", "tokens_per_s"):
        written(tmp_path / "metrics.jsonl", with_value(LINE, key, value))
        (line,) = read_step_lines(tmp_path)
        assert line == LINE | {key: None}
        training_seconds(tmp_path)
    for key in ("losses", "cosines", "weights", "task_grad_norms"):
        written(tmp_path / "metrics.jsonl", with_value(LINE, key, f'{{"sst": {value}}}'))
        assert read_step_lines(tmp_path) == [LINE | {key: {"sst": None}}]
    written(tmp_path / "evaluations.jsonl", with_value(EVALUATION, "scores", f'{{"a": {value}}}'))
    assert read_evaluation_lines(tmp_path) == [EVALUATION | {"scores": {"a": None}}]


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (0, 5, 3)])
def test_steps_that_do_not_ascend_are_refused(tmp_path, steps):
    written(tmp_path / "metrics.jsonl", *(json.dumps(LINE | {"step": step}) for step in steps))
    with pytest.raises(InputError, match=rf"jsonl:{len(steps)}: .*step {steps[-1]} follows step"):
        read_step_lines(tmp_path)


def test_a_line_that_was_cut_off_is_left_out_of_the_newest_file_alone(tmp_path):
    lines = [json.dumps(LINE | {"step": step}) for step in range(4)]
    written(tmp_path / "metrics-00000000.jsonl", *lines[:2])
    written(tmp_path / "metrics.jsonl", lines[2], lines[3][:9])
    assert [line["step"] for line in read_step_lines(tmp_path)] == [0, 1, 2]
    written(tmp_path / "metrics-00000000.jsonl", lines[0], lines[1][:9])
    with pytest.raises(InputError, match=r"metrics-00000000\.jsonl:2: "):
        read_step_lines(tmp_path)
    written(tmp_path / "metrics-00000000.jsonl", *lines[:2])
    written(tmp_path / "metrics.jsonl", lines[2], json.dumps({"step": 3}))  # whole, and no line
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: .*lr: Field required"):
        read_step_lines(tmp_path)


def test_line_ends_of_other_systems_are_read(tmp_path):
    lines = [json.dumps(LINE | {"step": step}) for step in range(2)]
    (tmp_path / "metrics.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    assert len(read_step_lines(tmp_path)) == 2


def test_damaged_lines_are_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for wrong in (*corrupted_lines(LINE), b'{"step": 1, "\xed\xa0\x80": 1}'):
        written(path, json.dumps(LINE | {"step": 0}), wrong, json.dumps(LINE | {"step": 9}))
        StepLines(path).cut(5)
        assert path.read_text().startswith('{"step": 0')
        assert '"step": 9' not in path.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corrupted") / "run"
    assert train.main(["demo", "--out", str(folder), "--max-steps", "2", "--set", *TINY]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Run:
    return open_run(shutil.copytree(trained, tmp_path / "run"))


def test_records_of_another_run_are_refused(run):
    for file, key, read in (
        ("metrics.jsonl", "losses", read_steps),
        ("evaluations.jsonl", "scores", read_evaluations),
    ):
        path = run.folder / file
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1][key]["mine"] = 0.5
        written(path, *map(json.dumps, lines))
        with pytest.raises(InputError, match=f"{file}: 'mine' is not in recipe.toml"):
            read(run)


def test_a_page_of_steps_without_numbers(run, tmp_path):
    """A run whose numbers were never finite has a page that says so by what is not on it."""
    nothing = dict.fromkeys(("conflict_rate", "grad_norm", "tokens_per_s", "lr"))
    tables = ("losses", "weights", "cosines", "task_grad_norms")
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    empty = [
        line | nothing | {table: dict.fromkeys(line[table]) for table in tables} for line in lines
    ]
    written(run.folder / "metrics.jsonl", *map(json.dumps, empty))
    scores = {"scores": {"sst": None, "overall": None}}
    written(run.folder / "evaluations.jsonl", json.dumps(EVALUATION | scores))
    assert report.main([str(run.folder), "--out", str(tmp_path / "pages")]) == 0
    assert "nan" not in (tmp_path / "pages/run.html").read_text().split("<details>")[0]


PROGRAMS: dict[str, Callable[[Path, Path], int]] = {
    "report": lambda run, out: report.main([str(run), "--out", str(out)]),
    "papers": lambda run, out: report.main([str(run), "--papers", "--out", str(out)]),
    "evaluate": lambda run, out: evaluate.main([str(run)]),
    "export": lambda run, out: export.main([str(run), "--to", str(out)]),
    "resume": lambda run, out: train.main(
        ["demo", "--resume", "--out", str(run), "--max-steps", "2", "--set", *TINY]
    ),
}
FILES = ("metrics.jsonl", "evaluations.jsonl", "metrics.json", "recipe.toml", "config.json")
CONTENTS = (
    *(b"", b"\0" * 99, b"\xff\xfe{\0}\0", b"{}", b"[]", b'{"a":' * 9999, b"\x80abc"),
    *(b'{"step": -1}\n{"step": "1"}\n', b"a = 1\n"),
    b'{"split": "dev", "step": 1, "scores": {"sst": null, "quora": "x", "sts": NaN}}',
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_says_in_one_line_what_it_cannot_read(
    trained, tmp_path, program, monkeypatch
):
    """Whatever stands in a record, a command ends well or refuses it."""
    monkeypatch.setattr(plots, "_svg", lambda _figure: "data:")  # which takes most of the time
    ended_well = 0
    for file in FILES:
        for number, content in enumerate(CONTENTS):
            run = tmp_path / f"{file}-{number}"
            shutil.copytree(trained, run, copy_function=_link)
            (run / file).unlink(missing_ok=True)
            (run / file).write_bytes(content)
            with contextlib.suppress(InputError):  # whose message is one line
                PROGRAMS[program](run, tmp_path / "out" / run.name)
                ended_well += 1
    assert ended_well < len(FILES) * len(CONTENTS) * 0.8


def _link(source: str, target: str) -> None:
    """Copy small files, which commands write; link those of checkpoints, which they do not."""
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


@pytest.mark.parametrize(
    "content",
    [
        *('{"a": {}}', '{"a": {"group": "g", "scores": {"sst": "x"}, "seconds": 1}}', "[]", "{"),
        *('{"a": {"group": 1, "scores": {}, "seconds": 1}}', "null", "\0", '{"a": null}', "1e400"),
    ],
)
def test_corrupted_results_of_a_series(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json: not the results of a series"):
        read_results(tmp_path)
    with pytest.raises(InputError, match=r"results\.json"):
        sweep.main(["demo", "--out", str(tmp_path)])


def test_results_that_name_folders_elsewhere(tmp_path, run):
    result = {"group": "g", "scores": {}, "seconds": 1}
    for name in ("../run", str(run.folder), "a/../../run"):
        series = tmp_path / "series"
        series.mkdir(exist_ok=True)
        (series / "results.json").write_text(json.dumps({name: result}))
        with pytest.raises(InputError, match="is no folder below it"):
            collect([series], pick_device("cpu"), None)


@pytest.fixture(scope="module")
def outcome(trained) -> dict:
    (found,) = collect([trained], pick_device("cpu"), None)
    return json.loads(to_json([found]))[0]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": {"lr": "x"}},
        {"settings": [1]},
        {"layers": -1},
        {"width": "9" * 5000},
        {"examples": {"mine": 1}},
        {"examples": {"sst": -1}},
        {"scores": {"mine": 1}},
        {"scores": {"sst": None}},
        {"scores": {"sst": float("nan")}},
        {"scores": {"sst": float("inf")}},
        {"answers": {"mine": {}}},
        {"answers": {"sst": {"score": 1, "low": 0, "counts": [], "over": 0, "under": 0}}},
        {"system": 1},
        {"system": "mine"},
        {"other": 1},
    ],
    ids=str,
)
def test_corrupted_outcomes(tmp_path, outcome, change):
    path = tmp_path / "papers.json"
    path.write_text(json.dumps([outcome | change]))
    with pytest.raises(InputError) as refused:
        report.main([str(path), "--papers", "--out", str(tmp_path / "out")])
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("counts", [[], [[]], [[1, 2]], [[1], [2]], [[-1]], [[1] * 33] * 33])
def test_counts_that_are_no_matrix(tmp_path, outcome, counts):
    task = next(iter(outcome["answers"]))
    outcome = json.loads(json.dumps(outcome))
    outcome["answers"][task]["counts"] = counts
    (tmp_path / "papers.json").write_text(json.dumps([outcome]))
    with pytest.raises(InputError, match="not the outcomes of runs"):
        read_outcomes(tmp_path / "papers.json")


def test_outcomes_without_some_scores_are_reported(tmp_path, outcome):
    fields = {"scores": {"sst": 0.5}, "system": "mtl-even", "answers": {}}
    settings = recipes.load("mtl-even").model_dump(mode="json", exclude={"data", "init"})
    other = outcome | fields | {"settings": settings, "examples": {}}
    (tmp_path / "papers.json").write_text(json.dumps([outcome | {"answers": {}}, other]))
    with pytest.raises(InputError, match="none of these runs"):
        report.main([str(tmp_path / "papers.json"), "--papers", "--out", str(tmp_path / "out")])
