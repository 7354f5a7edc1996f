"""A run's own files with other values: metrics, scores, results of series and papers."""

import json
import random
import shutil
from pathlib import Path

from .base import Base
from .corrupt import VALUES, corrupt_json
from .given import Given, use_run


def corrupt_metrics(base: Base, here: Path, draw: random.Random) -> Given:
    """Metrics, evaluations and scores with other values."""
    run = base.copy_run(here / "run")
    program, arguments = draw.choice(
        [use_run(base, here, draw), ("report", [str(run), "--out", str(here / "new")])]
    )
    name = draw.choice(["metrics.jsonl", "metrics.jsonl", "evaluations.jsonl", "metrics.json"])
    path = run / name
    if path.suffix == ".json":
        path.write_bytes(corrupt_json(path.read_bytes(), draw))
        return name, program, arguments
    lines = path.read_bytes().splitlines()
    for number in draw.sample(range(len(lines)), min(len(lines), draw.randint(1, 2))):
        lines[number] = draw.choice(
            [
                lambda line: corrupt_json(line, draw),
                lambda line: line[: len(line) // 2],
                lambda line: json.dumps(draw.choice(VALUES)).encode(),
                lambda line: line + b"\n" + line,
                lambda line: line.replace(b": ", b": -", 1),
            ]
        )(lines[number])
    path.write_bytes(b"\n".join(lines) + draw.choice([b"\n", b""]))
    return name, program, arguments


def corrupt_results(base: Base, here: Path, draw: random.Random) -> Given:
    """The results of a series with other values."""
    shutil.copytree(base.series, here / "run")
    path = here / "run" / "results.json"
    path.write_bytes(corrupt_json(path.read_bytes(), draw))
    names = [["--papers", "--out", str(here / "new")]]
    uses = [
        ("train", [*base.training(here / "run", "seed=3"), "--seeds", "2"]),
        ("report", [str(here / "run"), *draw.choice(names)]),
    ]
    program, arguments = draw.choice(uses)
    return "results.json", program, arguments


def corrupt_papers(base: Base, here: Path, draw: random.Random) -> Given:
    """The outcomes of runs with other values, and systems that lead elsewhere."""
    outcomes = json.loads(base.papers.read_text())
    if draw.random() < 0.4:
        system = draw.choice(
            ["../../outside", "/etc/x", "..", "x/y", "\x1b[2J", "=1+1", "", "A" * 300]
        )
        outcomes.append(outcomes[0] | {"system": system})
        what = f"system {system[:20]!a}"
    else:
        outcomes = json.loads(corrupt_json(json.dumps(outcomes).encode(), draw))
        what = "values"
    (here / "papers.json").write_text(json.dumps(outcomes))
    arguments = [str(here / "papers.json"), "--papers", "--out", str(here / "new")]
    return f"papers.json {what}", "report", arguments
