"""Corrupted input through whole commands: exit status, one line, and nothing half written."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import save_file

from engine import evaluate, export, predict, train
from engine.checkpoints.manifest import verify
from engine.checkpoints.store import KINDS
from engine.cli.common import BAD_INPUT, run_cli
from engine.models.hf_weights import to_huggingface_state
from engine.runs.data_paths import data_folder
from engine.runs.run import Run, open_run
from engine.utils.errors import InputError

from .corrupt import UGLY, corrupt_bytes, corrupt_json, corrupt_safetensors, corrupt_toml
from .fuzz import TINY, Kind

_NAMES = [
    *("run", "a b", ".", "..", "~", "~nobody/x", "a/../b", "/", "/proc/x", "/dev/null", "x.tar.gz"),
    *("a" * 300, "a/" * 3000, "[/red]", ":bomb:", "\x1b[2J", "\udcff", "-x", "zażółć", "a\nb"),
    *("https://example.com/x", "file:///etc", "C:\\x", "%2e%2e/x", "model.zip", "..\\x", "pandas"),
]


def command_kinds(run: Run, folder: Path) -> list[Kind]:
    """Return kinds whose input is a folder or the arguments of a command."""
    trial = folder / "trial"
    whole = {path.name: path for path in run.folder.rglob("*") if path.is_file()}
    assert {"recipe.toml", "manifest.json", "model.safetensors"} <= whole.keys()
    return [
        Kind("a run's folder, resumed", 2, b"", _corrupted_run(run, trial, _resume), (_seed,)),
        Kind("a run's folder, used", 2, b"", _corrupted_run(run, trial, _use), (_seed,)),
        Kind("a model's folder", 2, b"", _corrupted_model(run, folder, trial), (_seed,)),
        Kind("data files", 2, b"", _corrupted_data(run, trial), (_seed,)),
        Kind("names on the command line", 2, b"", _names(trial), (_seed,)),
    ]


def _seed(_good: bytes, draw: random.Random) -> bytes:
    """Return what :func:`random.Random` is seeded with where an input is a folder."""
    return str(draw.getrandbits(64)).encode()


Command = Callable[[Path, random.Random], int]


def _corrupted_run(run: Run, trial: Path, command: Command) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        draw = random.Random(content)
        with _fresh(trial):
            folder = shutil.copytree(run.folder, trial / "run")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in draw.sample(files, draw.choice([1, 1, 1, 2])):
                corrupt_file(path, draw)
            return _ended(command(folder, draw), folder)

    return read


def corrupt_file(path: Path, draw: random.Random) -> None:
    fitting = {".json": corrupt_json, ".toml": corrupt_toml, ".safetensors": corrupt_safetensors}
    corrupt = draw.choice([corrupt_bytes, fitting.get(path.suffix, corrupt_bytes)])
    match draw.randrange(20):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.unlink()
            os.mkfifo(path)
        case 3:
            path.unlink()
            path.symlink_to(draw.choice(["/dev/zero", "/nowhere", path.name, "/etc/passwd"]))
        case 4:
            os.truncate(path, 1 << 40)  # a hole, which takes no room on the disk
        case _:
            path.write_bytes(corrupt(path.read_bytes(), draw))


def _resume(folder: Path, _draw: random.Random) -> int:
    options = ["--out", str(folder), "--resume", "--device", "cpu", "--max-steps", "3"]
    return _run(train, "demo", *options, "--set", *TINY, "checkpoint_every=1")


def _use(folder: Path, draw: random.Random) -> int:
    match draw.randrange(3):
        case 0:
            return _run(evaluate, str(folder), "--device", "cpu")
        case 1:
            return _run(export, str(folder), "--to", str(folder.parent / "exported"))
    source = folder.parent / "in.tsv"
    source.write_text("id\tsentence\n1\ta fine film\n")
    options = ["--task", "sst", "--input", str(source), "--output", str(folder.parent / "out.tsv")]
    return _run(predict, str(folder), *options, "--device", "cpu")


def _corrupted_model(run: Run, folder: Path, trial: Path) -> Callable[[bytes], object]:
    good = folder / "good model"
    good.mkdir()
    run.tokenizer.save(good)
    shutil.copy(run.folder / "config.json", good)
    state = to_huggingface_state(run.new_model().encoder.state_dict(), run.config)
    save_file(state, good / "model.safetensors")

    def read(content: bytes) -> object:
        draw = random.Random(content)
        with _fresh(trial):
            model = shutil.copytree(good, trial / "model")
            corrupt_file(draw.choice(sorted(model.iterdir())), draw)
            options = ["--init", str(model), "--out", str(trial / "run"), "--device", "cpu"]
            status = _run(train, "demo", *options, "--max-steps", "1", "--set", *TINY)
            return _ended(status, trial / "run")

    return read


def _corrupted_data(run: Run, trial: Path) -> Callable[[bytes], object]:
    good = data_folder(run.recipe)

    def read(content: bytes) -> object:
        draw = random.Random(content)
        with _fresh(trial):
            data = trial / "data"
            data.mkdir()
            for path in sorted(good.iterdir()):
                lines = path.read_bytes().splitlines(keepends=True)
                (data / path.name).write_bytes(b"".join(lines[:40]))
            corrupt_file(draw.choice(sorted(data.iterdir())), draw)
            bad_row = draw.choice(["skip", "error"])
            options = ["--data", str(data), "--out", str(trial / "run"), "--on-bad-row", bad_row]
            status = _run(train, "demo", *options, "--max-steps", "1", "--set", *TINY)
            return _ended(status, trial / "run")

    return read


def _names(trial: Path) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        draw = random.Random(content)
        name = draw.choice([*_NAMES, *(one.decode("utf-8", "surrogateescape") for one in UGLY)])
        name += draw.choice(["", "", ".toml", "\0"])
        option = draw.choice(["--out", "--init", "--data", "--set", "files"])
        with _fresh(trial):
            (here := trial / "1" / "2" / "3" / "4").mkdir(parents=True)  # names may lead up
            given = [option, name]
            if option == "--set":
                given = ["--set", draw.choice(["data", "init", "lr", "train"]) + "=" + name]
            elif option == "files":
                source = "tasks.sst.source={kind='regression', text=['x'], files={train=%s}}"
                given = ["--set", source % json.dumps(name)]
            out = [] if option == "--out" else ["--out", "run"]
            with contextlib.chdir(here):
                status = _run(train, "demo", *out, *given, "--max-steps", "1", "--set", *TINY)
            return _ended(status, trial)

    return read


@contextlib.contextmanager
def _fresh(trial: Path) -> Iterator[None]:
    trial.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(trial)


def _run(program, *arguments: str) -> int:
    """Run a command as its program does; return the exit status, its last line being checked."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal is
    error = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            run_cli(lambda: program.main(list(arguments)))
        except SystemExit as stop:
            status = stop.code
        out.flush()
    if status == BAD_INPUT:
        *_, last = error.getvalue().splitlines()
        assert last.startswith("error: "), last
    assert "Traceback" not in error.getvalue(), error.getvalue()
    assert status in (0, BAD_INPUT), f"exit status {status}"
    return status


def _ended(status: int, folder: Path) -> int:
    """Check that nothing half written is left, and what there is can be read."""
    assert not list(folder.rglob("*.partial"))
    if status == BAD_INPUT:
        raise InputError("refused by the command")
    if (folder / "recipe.toml").is_file():
        found = open_run(folder).checkpoints
        for newest in (path for kind in KINDS for path in found.all(kind)[:1]):
            verify(newest)
    return status
