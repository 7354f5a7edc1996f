"""Pictures of benchmark records, whatever benchmark wrote them."""

import json
import sys
from pathlib import Path

import pytest

from bench import plot

SAMPLES = {"this project": [1.0, 1.1, 0.9], "another": [2.0, 2.2, 2.1]}
ENVIRONMENT = {"device": "a machine", "commit": "0" * 40, "date": "2026-11-21T00:00:00Z"}
# As bench.attention, bench.step and bench.surgery write them, with what else stands there.
RESULTS = {
    "attention": {"heads": 12, "sst x 32, fp32": {"flops": 1, "seconds": SAMPLES}},
    "step": {"tasks": ["sst"], "seconds": SAMPLES, "floor_seconds": {"surgery": 0.1}},
    "surgery": {
        "read_bandwidth": 1e9,
        "operators, fp32": {name: {"bytes": 8, "seconds": s} for name, s in SAMPLES.items()},
        "growth": [{"tasks": 2, "columns": 8, "gram": {"bytes": 8, "seconds": [1.0]}}],
    },
    "long text": {"cases": [{"case": "4 x 2048", "precision": "fp32", "seconds": SAMPLES}]},
    "step, masked lm": {"cases": [{"case": "sentences", "seconds": SAMPLES}]},
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_record_is_found_and_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = RESULTS[name]
    cases = {"attention": "sst x 32, fp32", "step": "step", "surgery": "operators, fp32"}
    cases |= {"long text": "4 x 2048, fp32", "step, masked lm": "sentences"}
    assert list(plot.cases(results, name)) == [(cases[name], SAMPLES)]
    record = {"benchmark": name, "environment": ENVIRONMENT, "results": results}
    source = tmp_path / "record.json"
    source.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["plot", str(source), "--out", str(tmp_path / "pictures")])
    plot.main()
    assert (tmp_path / "pictures/record.png").read_bytes().startswith(b"\x89PNG")


# Records of failures, of a newcomer's minutes, of memory and of scores hold no contestants.
RECORDS = [
    path
    for path in sorted((Path(plot.__file__).parent / "results").glob("*/*.json"))
    if not path.name.startswith(("faults", "papers", "readme_walkthrough", "run_memory"))
    and path.parent.name not in ("guides", "balancing", "large_data")
]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_kept_record_is_drawn(path: Path) -> None:
    assert plot.draw(json.loads(path.read_text())).startswith(b"\x89PNG")


def test_a_record_without_timings_is_refused() -> None:
    record = {"benchmark": "attention", "environment": ENVIRONMENT, "results": {"heads": 12}}
    with pytest.raises(SystemExit, match="no timings"):
        plot.draw(record)


def test_records_of_one_name_have_pictures_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [tmp_path / folder / "record.json" for folder in "ab"]
    for source in sources:
        source.parent.mkdir()
        record = {"benchmark": "step", "environment": ENVIRONMENT, "results": RESULTS["step"]}
        source.write_text(json.dumps(record))
    out = tmp_path / "pictures"
    arguments = ["plot", *map(str, sources), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    plot.main()
    assert sorted(path.name for path in out.iterdir()) == ["a-record.png", "b-record.png"]
    (out / "a-record.png").write_text("mine")
    with pytest.raises(SystemExit):
        plot.main()
    assert "is there already" in capsys.readouterr().err
    assert (out / "a-record.png").read_text() == "mine"
    monkeypatch.setattr(sys, "argv", [*arguments, "--force"])
    plot.main()
    assert (out / "a-record.png").read_bytes().startswith(b"\x89PNG")
