"""Data that lead elsewhere, hold pickles, or have texts that a terminal or a table would obey."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import torch

from .base import PROGRAMS, Base
from .children import call, command
from .given import Given
from .toml_lines import toml_line

SECRET = "swordfish"
"""Stands in a file beside the folder of the case: it must not come into a run."""
_HEADER = "sentence,label\n"
_FILE_ELSEWHERE = _HEADER + f"{SECRET},a\n{SECRET} fish,b\n" * 8
_TEXTS = [
    *(
        "=1+1",
        "+1",
        "@x",
        "-1+1",
        "\x1b[2J",
        "a\rb",
        "\u202ex",
        "<script>x</script>",
        "$x^",
        "../x",
    ),
]


def lead_elsewhere(base: Base, here: Path, draw: random.Random) -> Given:
    """Make a folder that the library ``datasets`` loads, and that leads out or holds a pickle."""
    elsewhere, corpus = here.parent / "elsewhere.csv", here / "corpus"
    elsewhere.write_text(_FILE_ELSEWHERE)
    corpus.mkdir()
    (corpus / "train.csv").write_text(_HEADER + "fine film,a\ndull film,b\n" * 8)
    what, dataset = draw.choice(["path", "tar", "code", "name"]), str(corpus)
    match what:
        case "path":
            leads = ["../../elsewhere.csv", str(elsewhere), f"file://{elsewhere}"]
            lead = draw.choice([*leads, "**/../../../elsewhere.csv"])
            what += f" {lead.replace(str(here.parent), '')}"
            split = f'data_files:\n  - split: train\n    path: "{lead}"'
            text = f"---\nconfigs:\n- config_name: default\n  {split}\n---\n"
            (corpus / "README.md").write_text(text)
        case "tar":
            (corpus / "train.csv").unlink()
            ending = draw.choice(["pth", "pt", "pkl", "pickle", "npy", "json"])
            what += f" with .{ending}"
            _write_tar(corpus / "train.tar", ending)
        case "code":
            (corpus / "corpus.py").write_text("import os\nos.abort()\n")
        case "name":
            names = ["../corpus", "", "csv", "json", "text", "webdataset", "\x1b", "hf://x"]
            dataset = draw.choice(names)
            what += f" {dataset!a}"
    source = {"kind": "classification", "text": ["sentence"], "classes": ["a", "b"]}
    source |= {
        "label": "label",
        "dataset": dataset,
        "splits": dict.fromkeys(("train", "dev"), "train"),
    }
    return f"data set: {what}", "train", base.training(here / "new", *_own_task(source))


def _own_task(source: dict[str, object]) -> list[str]:
    task = {"own": {"head": "single", "source": source}}
    return [f"tasks={toml_line(task)}", "train=['own']"]


def _write_tar(path: Path, ending: str) -> None:
    content = io.BytesIO()
    if ending == "json":
        content.write(b'{"sentence": "fine", "label": "a"}')
    elif ending == "npy":
        np.save(content, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    else:
        torch.save({"sentence": "fine", "label": "a"}, content)
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            for name, data in {ending: content.getvalue(), "txt": b"fine film"}.items():
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_odd_texts(base: Base, here: Path, draw: random.Random) -> Given:
    """Write ids, sentences and classes that a terminal or a spreadsheet would obey.

    The task has all splits or some, two classes or thousands, and is trained or scored alone.
    """
    bad, many = [draw.choice(_TEXTS) for _ in range(4)], draw.choice([0, 0, 0, 3000])
    classes = [f"{bad[0]}a", f"{bad[1]}b", *(f"class {n}" for n in range(many))]
    rows = [
        {"id": f"{bad[2]}{n}", "text": f"{bad[3]} film {n}", "label": classes[n % 2]}
        for n in range(20)
    ]
    splits = draw.choice([("train", "dev"), ("train", "dev"), ("dev",), ("train",)])
    files = {name: str(here / f"{name}.jsonl") for name in splits}
    for file in files.values():
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "classification", "text": ["text"], "id": "id", "classes": classes}
    own = {"head": "single", "source": source | {"label": "label", "files": files}}
    tasks, train = {"sst": {"head": "single"}, "own": own}, ["own", "sst"]
    settings = [f"tasks={toml_line(tasks)}", f"train={train if 'train' in splits else ['sst']}"]
    program, arguments = draw.choice(_uses(base, here, *files.values(), settings=settings))
    return f"{len(classes)} classes, {splits}, {' '.join(map(ascii, bad))}", program, arguments


def _uses(
    base: Base, here: Path, rows: str, *_more: str, settings: list[str]
) -> list[tuple[str, list[str]]]:
    """Return commands on a run with such settings, which is trained before."""
    run, new = here / "run", here / "new"
    uses = [("train", base.training(new, *settings, steps=1))]
    trained = call(command(PROGRAMS["train"], base.training(run, *settings, steps=1)), here)
    if trained.status == 0:
        options = ["--task", "own", "--input", rows, "--output", f"{new}.tsv"]
        uses += [
            ("predict", [str(run), *options]),
            ("report", [str(run), "--out", str(new)]),
            ("export", [str(run), "--to", str(new)]),
            ("evaluate", [str(run)]),
        ]
    return uses
