"""``series.json``: kept, joined, grown, and refused where it is damaged."""

import json
import re
import shutil

import pytest

from engine import report
from engine.reporting.series_read import collect
from engine.reporting.series_record import read_records
from engine.runtime.precision import pick_device
from engine.utils.errors import InputError

from .made_series import run


def test_series_json_alone_gives_the_same_report(series, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(series, "--compare-to", "balance=sum", "--out", first)
    run(first / "series.json", "--compare-to", "balance=sum", "--out", second)
    assert len(list(first.iterdir())) == 4
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert str(series.parent) not in (first / "series.json").read_text()


def test_a_kept_series_grows(series, tmp_path):
    """What a later place says of a run counts; a run that is finished now is no longer missing."""
    part = shutil.copytree(series, tmp_path / "one/methods")
    results = json.loads((part / "results.json").read_text())
    kept = {name: one for name, one in results.items() if "seed-0" in name or "sum" in name}
    (part / "results.json").write_text(json.dumps(kept))
    run(part, "--out", tmp_path / "kept")
    (before,) = read_records(tmp_path / "kept/series.json")
    assert (len(before.runs), len(before.unfinished)) == (6, 6)
    shutil.copy(tmp_path / "kept/series.json", tmp_path / "before.json")
    run(tmp_path / "kept/series.json", series, "--out", tmp_path / "kept", "--force")
    (after,) = read_records(tmp_path / "kept/series.json")
    (whole,) = collect([series], pick_device("cpu"))
    assert {run.name: run for run in after.runs} == {run.name: run for run in whole.runs}
    assert after.unfinished == []
    # The other way round the old record takes nothing away.
    run(series, tmp_path / "before.json", "--out", tmp_path / "again")
    (again,) = read_records(tmp_path / "again/series.json")
    assert (len(again.runs), again.unfinished) == (12, [])


def test_runs_of_two_machines_are_told_apart(series, tmp_path):
    run(series, "--out", tmp_path / "kept")
    content = json.loads((tmp_path / "kept/series.json").read_text())
    content[0]["runs"] = [one for one in content[0]["runs"] if one["seed"] == 0]
    for one in content[0]["runs"]:
        one["read_with"]["device"] = "Other CPU"
    (tmp_path / "other.json").write_text(json.dumps(content))
    run(series, tmp_path / "other.json", "--out", tmp_path / "out")
    (joined,) = read_records(tmp_path / "out/series.json")
    others = {one.seed for one in joined.runs if one.read_with.device == "Other CPU"}
    own = {one.seed for one in joined.runs} - others
    assert others == {0}
    assert own == {1, 2, 3}
    text = (tmp_path / "out/series.md").read_text().partition("## Read with")[2]
    counts = re.findall(r"methods, (\d+) runs: .*?, ([^,]+), where", text)
    assert {count: device == "Other CPU" for count, device in counts} == {"9": False, "3": True}


def change(content: list, path: str, value: object) -> list:
    *tables, last = path.split(".")
    place = content[0]
    for key in tables:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            ("name", "a\x1b[2J"),
            ("runs", {}),
            ("other", 1),
            ("runs.0.read_with", {}),
            ("runs.0.seed", -1),
        ),
        *(("runs.0.scores", {"sst": None}), ("runs.0.scores", {"sst": "x"}), ("runs.0.sign", 2)),
        *(
            ("runs.0.course.conflict_rate", [0.5]),
            ("runs.0.point", "lr"),
            ("runs.0.steps", 1 << 40),
        ),
        *(("runs.1.name", "demo/balance=sum/seed-0"), ("runs.1.seed", 0), ("runs.0.seconds", None)),
        *(("runs.0.seconds", -1.0), ("runs.0.point", ["lr"]), ("runs.0.point", [" =1"])),
        *(("runs.0.scores", {"sst": 1e200}), ("runs.0.scores", {"sst": -1.7e308})),
        ("runs.0.decision", 1e101),
    ],
)
def test_a_corrupted_series_json_is_refused_in_one_line(series, tmp_path, path, value):
    run(series, "--out", tmp_path / "good")
    content = json.loads((tmp_path / "good/series.json").read_text())
    (tmp_path / "series.json").write_text(json.dumps(change(content, path, value)))
    with pytest.raises(InputError, match="not the record of a series") as error:
        report.main(["--series", str(tmp_path / "series.json"), "--out", str(tmp_path / "out")])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["", "[", "{}", "null", "[1]", "\0", "[" * 9999])
def test_what_is_no_series_json(tmp_path, content):
    (tmp_path / "series.json").write_text(content)
    with pytest.raises(InputError, match="not the record of a series"):
        report.main(["--series", str(tmp_path / "series.json"), "--out", str(tmp_path / "out")])
