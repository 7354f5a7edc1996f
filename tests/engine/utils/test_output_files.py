"""Output files that a user names: nothing that is there already is lost."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import export, predict, report, sweep, train
from engine.config.recipe import load
from engine.exporting.folder import check_free
from engine.runs.data_paths import data_folder
from engine.runs.lock import LOCK
from engine.utils import output_files
from engine.utils.errors import InputError
from engine.utils.file_names import as_file_name, distinct_names
from engine.utils.files import resolved
from engine.utils.output_files import check_outputs, write_output

from ...conftest import REPOSITORY
from ..conftest import TINY
from ..in_process import workers_in_process
from .test_files import everything

SETTINGS = ["--max-steps", "2", "--set", *TINY]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run; not to be changed."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    assert train.main(["demo", "--out", str(folder), *SETTINGS]) == 0
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """Some rows to predict."""
    file = tmp_path_factory.mktemp("examples") / "in.csv"
    lines = (data_folder(load("demo")) / "ids-sst-dev.csv").read_text().splitlines()[:4]
    file.write_text("\n".join(lines) + "\n")
    return file


def _file(path: Path) -> None:
    path.write_text("theirs")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "theirs").touch()


def _link_to_file(path: Path) -> None:
    path.with_name("outside").write_text("theirs")
    path.symlink_to("outside")


def _link_to_folder(path: Path) -> None:
    path.with_name("outside").mkdir()
    path.symlink_to("outside")


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _block_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(259, 1048575))  # no such device
    except PermissionError:
        pytest.skip("only root makes devices")


KINDS: dict[str, Callable[[Path], object]] = {
    "a file": _file,
    "a link to a file": _link_to_file,
    "a folder": _folder,
    "an empty folder": Path.mkdir,
    "a link to a folder": _link_to_folder,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a socket": _socket,
    "a block device": _block_device,
}
REPLACED = ("a file", "a link to a file")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_replaced_only_if_asked(tmp_path, kind, force):
    output = tmp_path / "output"
    KINDS[kind](output)
    before = everything(tmp_path)
    if force and kind in REPLACED:
        assert check_outputs([output], force=True)
        write_output(output, "ours", replace=True)
        assert output.resolve().read_text() == "ours"
        assert output.is_symlink() == (kind == "a link to a file")
        return
    for attempt in (
        lambda: check_outputs([tmp_path / "other", output], force=force),
        lambda: write_output(output, "ours", replace=force),
    ):
        with pytest.raises(InputError, match="output: "):
            attempt()
        assert everything(tmp_path) == before


def test_a_new_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("new/../output")
    assert not check_outputs([output])
    write_output(output, b"ours")
    assert Path("output").read_bytes() == b"ours"
    with pytest.raises(InputError, match="is there already"):
        check_outputs([output])
    with pytest.raises(InputError, match="is there already"):  # it came meanwhile
        write_output(output, b"again")
    assert everything(tmp_path) == {"output": b"ours"}


@pytest.mark.parametrize("answer", ["y", "yes", "", "no"])
def test_on_a_terminal_one_is_asked(tmp_path, monkeypatch, answer):
    asked = []
    monkeypatch.setattr(output_files.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(output_files.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    assert not check_outputs([tmp_path / "new"])
    assert not asked
    for name in "ab":
        (tmp_path / name).touch()
    paths = [tmp_path / name for name in ("a", "new", "b")]
    if answer.startswith("y"):
        assert check_outputs(paths)
    else:
        with pytest.raises(InputError, match="a: is there already"):
            check_outputs(paths)
    assert asked == [f"{tmp_path / 'a'}, {tmp_path / 'b'}: there already; replace? [y/N] "]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert not check_outputs([pipe])
    write_output(pipe, "ours")
    reader.join()
    assert read == ["ours"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize(("minor", "full"), [(3, False), (7, True)], ids=["null", "full"])
def test_a_device_is_written_to(tmp_path, minor, full):
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, minor))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("no devices can be made here")
    assert not check_outputs([device])
    if full:
        with pytest.raises(InputError, match=os.strerror(errno.ENOSPC).lower()):
            write_output(device, "ours")
    else:
        write_output(device, "ours")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert list(tmp_path.iterdir()) == [device]


WRITE = """
from pathlib import Path

from engine.utils.output_files import check_outputs, write_output

print("before")
assert not check_outputs([Path({name!r})])
write_output(Path({name!r}), "ours\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_what_stdout_was_sent_to_goes_on(tmp_path, name):
    """A redirection into a file is neither replaced nor written over from its beginning."""
    command = [sys.executable, "-c", WRITE.format(name=name)]
    with (tmp_path / "out").open("w") as file:
        subprocess.run(command, cwd=REPOSITORY, stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "before\nours\nafter\n"
    piped = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
    assert piped.stdout == "before\nours\nafter\n"


@pytest.mark.parametrize("way", ["itself", "another way", "link", "hard link"])
def test_predictions_do_not_replace_their_input(run, examples, tmp_path, way):
    source = tmp_path / "in.csv"
    shutil.copy(examples, source)
    output = tmp_path / "output"
    if way == "link":
        output.symlink_to(source)
    elif way == "hard link":
        output.hardlink_to(source)
    else:
        output = source if way == "itself" else tmp_path / "new/../in.csv"
    options = ["--task", "sst", "--input", str(source), "--output", str(output)]
    for force in ([], ["--force"]):
        with pytest.raises(InputError, match="is the file that is read"):
            predict.main([str(run), *options, *force])
    assert source.read_bytes() == examples.read_bytes()


def test_predictions(run, examples, tmp_path):
    output = tmp_path / "out.tsv"
    output.write_text("mine")
    options = [str(run), "--task", "sst", "--input", str(examples), "--output", str(output)]
    with pytest.raises(InputError, match="--force"):
        predict.main(options)
    assert output.read_text() == "mine"
    assert predict.main([*options, "--force"]) == 0
    assert len(output.read_text().splitlines()) == 4
    assert list(tmp_path.iterdir()) == [output]


def test_pages_have_names_of_their_own(run, tmp_path, capsys):
    for name in "xy":
        shutil.copytree(run, tmp_path / name / "run")
    (tmp_path / "link").symlink_to("x/run")
    places = [str(tmp_path / name) for name in ("x/run", "y/run", "link", "y/../x/run")]
    out = tmp_path / "pages"
    assert report.main([*places, "--out", str(out / "new/..")]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("comparison.html", "x-run.html", "y-run.html"),
    ]
    assert "<h1>y-run</h1>" in (out / "y-run.html").read_text()
    (out / "x-run.html").write_text("mine")
    (out / "y-run.html").unlink()
    (out / "comparison.html").unlink()
    with pytest.raises(InputError, match="is there already"):
        report.main([*places, "--out", str(out)])
    assert everything(out) == {"x-run.html": b"mine"}
    assert capsys.readouterr().out.count("wrote") == 3


@pytest.mark.parametrize("name", ["papers.json", "papers.md", "mistakes.md", "cgs.png"])
def test_tables_of_papers_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: is there already"):
        report.main(["--papers", str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert everything(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("way", ["v", "v/new/..", "link", "v/new/../../link/new/.."])
def test_an_export_empties_no_folder(run, tmp_path, way):
    _folder(tmp_path / "v")
    (tmp_path / "link").symlink_to("v")
    with pytest.raises(InputError, match="holds something already"):
        export.main([str(run), "--to", str(tmp_path / way)])
    assert (tmp_path / "v/theirs").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "v"]


def test_an_export_goes_where_nothing_is(run, tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    (tmp_path / "link").symlink_to("v")
    monkeypatch.chdir(tmp_path)
    for way in ("link", "new/x/..", "here"):
        if way == "here":
            Path(way).mkdir()
            monkeypatch.chdir(way)
            way = "."
        assert export.main([str(run), "--to", way]) == 0
    for name in ("v", "new", "here"):
        assert (tmp_path / name / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("way", ["p", "p/new/..", "link"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_is_no_run_is_not_trained_into(tmp_path, way, resume):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/vocab.txt").write_text("mine")
    (tmp_path / "link").symlink_to("p")
    with pytest.raises(InputError, match="something"):
        train.main(["demo", "--out", str(tmp_path / way), *resume, *SETTINGS])
    assert everything(tmp_path / "p") == {"vocab.txt": b"mine"}


def test_what_cannot_be_trained_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (["--out", "a/run"], [], ["--out", "a/runs", "--seeds", "2"], ["--seeds", "2"]):
        with pytest.raises(InputError, match="no such folder"):
            train.main(["demo", *place, "--data", "nowhere", *SETTINGS])
    with pytest.raises(InputError, match="no such folder"):
        sweep.main(["demo", "--out", "a/runs", "--data", "nowhere", *SETTINGS])
    assert list(tmp_path.iterdir()) == []


FILES = ["metrics.json", "metrics.jsonl", "evaluations.jsonl", "recipe.toml", "checkpoints"]


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "wandb"])
@pytest.mark.parametrize("kind", ["a file", "a socket"])
def test_what_stands_for_a_folder_of_a_run_is_refused(run, tmp_path, name, kind):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / name, ignore_errors=True)
    KINDS[kind](copy / name)
    before = everything(copy)
    with pytest.raises(InputError, match=f"{name}: is no folder"):
        train.main(["demo", "--resume", "--out", str(copy), *SETTINGS, 'loggers=["tensorboard"]'])
    assert everything(copy) == before


@pytest.mark.parametrize("name", [*FILES, "tensorboard", "metrics.json.partial"])
def test_a_run_from_elsewhere_writes_nothing_outside(run, tmp_path, name):
    (outside := tmp_path / "outside").mkdir()
    copy = shutil.copytree(run, tmp_path / "run")
    if (copy / name).exists():
        shutil.move(copy / name, outside / name)
    (copy / name).symlink_to(f"../outside/{name}")
    before = everything(outside)
    arguments = ["demo", "--out", str(copy), "--resume", "--max-steps", "4", *SETTINGS[2:]]
    if name in ("metrics.json", "recipe.toml", "metrics.json.partial"):
        assert train.main(arguments) == 0
    else:
        with pytest.raises(InputError, match=r"link"):
            train.main(arguments)
    assert everything(outside) == before


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--max-steps", "3"], "max_steps = 2, now it is 3"),
        (["--set", "lr=0.5"], "lr = 0.001, now it is 0.5"),
        (["--data", "DATA"], "data = ''"),
    ],
)
def test_scores_of_other_settings_are_not_shown(run, tmp_path, changed, expected, capsys):
    """Not for a seed that is trained already, nor beside those of other seeds."""
    series = tmp_path / "series"
    shutil.copytree(run, series / "seed-0")
    result = {"group": "", "scores": {"overall": 0.5}, "seconds": 1.0}
    (series / "results.json").write_text(json.dumps({"seed-0": result}))
    before = everything(series)
    changed = [str(data_folder(load("demo"))) if word == "DATA" else word for word in changed]
    for seed in ("0", "7"):
        options = ["demo", "--seeds", "1", "--seed", seed, "--out", str(series), *SETTINGS]
        with pytest.raises(InputError, match=expected):
            train.main([*options, *changed])
    assert everything(series) == before
    capsys.readouterr()
    options = ["demo", "--seeds", "1", "--out", str(series), *SETTINGS, "log_every=7"]
    assert train.main(options) == 0
    assert "0.500" in capsys.readouterr().out
    shutil.rmtree(series / "seed-0")
    with pytest.raises(InputError, match="is missing"):
        train.main(options)


def test_recipes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.toml").touch()
        (tmp_path / folder / "demo.toml").touch()
    assert sweep.groups(["a/x.toml"]) == {"x": "a/x.toml"}
    assert sweep.groups(["a/x.toml", "b/x.toml", "b/../a/x.toml", "demo", "demo"]) == {
        "a-x": "a/x.toml",
        "b-x": "b/x.toml",
        "demo": "demo",
    }
    assert sweep.groups(["a/demo.toml", "demo"]) == {"a-demo": "a/demo.toml", "demo": "demo"}
    assert list(sweep.groups(["...toml", "..toml", ".toml"])) == ["%2E%2E", "%2E", ".toml"]


def test_a_grid_s_values_do_not_lead_out(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.sweep.workers_of", workers_in_process)
    out, data = tmp_path / "x/runs", data_folder(load("demo"))
    grid = f"data={data},{tmp_path}/../{tmp_path.name}/data"
    shutil.copytree(data, tmp_path / "data")
    arguments = [
        "demo",
        "--grid",
        grid,
        "--out",
        str(out),
        *SETTINGS,
        "max_train_examples=32",
        "epochs=1",
    ]
    assert sweep.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x"]
    assert sorted(os.listdir(out)) == [LOCK, "demo", "results.json"]
    assert sorted(os.listdir(out / "demo")) == sorted(
        point.replace("/", "%2F") for (point,) in sweep.grid_points([grid])
    )


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/run"], ["run"]),
        (["/x/run", "/y/run"], ["x-run", "y-run"]),
        (["/x/a/run", "/y/a/run", "/a"], ["x-a-run", "y-a-run", "a"]),
        (["/x/run", "/y/run", "/z/x-run"], ["x-run", "y-run", "z-x-run"]),
        (["/run", "/run/run"], ["run", "run-run"]),
    ],
)
def test_names_are_as_short_as_can_be(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names


def test_names_that_no_folder_tells_apart():
    with pytest.raises(InputError, match="rename one"):
        distinct_names([Path("/a-b/c"), Path("/z/c"), Path("/a/b-c"), Path("/y/b-c")])


def test_texts_as_file_names_stay_different():
    texts = ["lr=1e-3", "a/b", "a%2Fb", "a\\b", "a\nb", "..", "%2E%2E", ".", "…", "x" * 300]
    names = [as_file_name(text) for text in [*texts, "x" * 301]]
    assert len(set(names)) == len(names)
    assert names[0] == "lr=1e-3"
    for name in names:
        assert Path(name).name == name
        assert len(name.encode()) <= 200
        assert name.isprintable()


def test_from_a_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    for attempt in (
        lambda: resolved(Path("run")),
        lambda: check_outputs([Path("out.tsv")], inputs=[Path("in.tsv")]),
        lambda: write_output(Path("out.tsv"), "ours"),
        lambda: check_free(Path("exported")),
        lambda: sweep.groups(["x.toml"]),
        lambda: report.main(["run", "--out", "pages"]),
    ):
        with pytest.raises(InputError, match="no such file or directory"):
            attempt()
