"""Files and folders that are whole or not there, among things that are not this program's."""

import os
import re
import stat
from pathlib import Path

import pytest

from engine.checkpoints.manifest import Progress
from engine.checkpoints.store import Checkpoints
from engine.metrics.jsonl import StepLines
from engine.utils import files
from engine.utils.errors import InputError
from engine.utils.files import (
    is_partial,
    remove_folder,
    remove_partial_files,
    resolved,
    whole_folder,
    write_text,
)

KNOWN = re.compile(r"known\d?")


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_half_written_has_a_name_of_its_own(tmp_path, monkeypatch):
    """Whatever stands under the names that it had before, or under the first it draws, stays."""
    (tmp_path / "notes.partial").write_text("mine")
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / ".notes-00000000.partial").symlink_to("outside")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "00000000")
    with pytest.raises(InputError, match="file exists"):
        write_text(tmp_path / "notes", "new")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "00000001")
    write_text(tmp_path / "notes", "new")
    assert (tmp_path / "notes").read_text() == "new"
    assert (tmp_path / "notes.partial").read_text() == "mine"
    assert (tmp_path / "outside").read_text() == "theirs"
    assert names(tmp_path) == [".notes-00000000.partial", "notes", "notes.partial", "outside"]


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / "notes").symlink_to("outside")
    write_text(tmp_path / "notes", "new")
    assert not (tmp_path / "notes").is_symlink()
    assert (tmp_path / "outside").read_text() == "theirs"


def test_files_and_folders_are_as_open_as_the_user_s_others(tmp_path, umask):
    write_text(tmp_path / "notes", "new")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "known").touch()
    assert stat.S_IMODE((tmp_path / "notes").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127])
def test_a_name_as_long_as_can_be(tmp_path, name):
    write_text(tmp_path / name, "new")
    assert names(tmp_path) == [name]


def _file(path: Path) -> None:
    path.write_text("theirs")


def _filled(path: Path) -> None:
    path.mkdir()
    (path / "theirs").write_text("theirs")


def _with_folder(path: Path) -> None:
    (path / "known").mkdir(parents=True)
    (path / "known" / "theirs").touch()


def _with_link(path: Path) -> None:
    _filled(path.with_name("outside"))
    path.mkdir()
    (path / "known").symlink_to("../outside/theirs")


def _link(path: Path) -> None:
    _filled(path.with_name("outside"))
    path.symlink_to("outside")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


OTHERS = [_file, _filled, _with_folder, _with_link, _link, _dangling, os.mkfifo]


def everything(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else (path.readlink() if path.is_symlink() else stat.S_IFMT(path.stat().st_mode))
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("known", [None, KNOWN], ids=["new", "made again"])
@pytest.mark.parametrize("make", OTHERS)
def test_a_folder_does_not_take_the_place_of_something_else(tmp_path, make, known):
    make(tmp_path / "folder")
    before = everything(tmp_path)
    with pytest.raises(InputError), whole_folder(tmp_path / "folder", known) as folder:
        (folder / "known").write_text("ours")
    assert everything(tmp_path) == before


def test_a_folder_takes_the_place_of_an_empty_one_or_of_its_like(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "known2").touch()
    for name in ("empty", "like", "new/below"):
        with whole_folder(tmp_path / name, KNOWN) as folder:
            (folder / "known").write_text("ours")
        assert names(tmp_path / name) == ["known"]
    with pytest.raises(InputError, match="not empty"), whole_folder(tmp_path / "like") as folder:
        pass
    assert names(tmp_path) == ["empty", "like", "new"]


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_not_ours_is_not_removed(tmp_path, make):
    make(tmp_path / "folder")
    before = everything(tmp_path)
    with pytest.raises(InputError):
        remove_folder(tmp_path / "folder", KNOWN)
    assert everything(tmp_path) == before


LEFT = ".known-0123abcd.partial"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (LEFT, True),
        ("known.partial", False),
        (".known.partial", False),
        (".known-0123abc.partial", False),
        (".known-0123ABCD.partial", False),
        (".known-0123abcd.partial2", False),
        (".other-0123abcd.partial", False),
        ("known-0123abcd.partial", False),
    ],
)
def test_only_our_own_leftovers_are_known_as_such(tmp_path, name, ours):
    assert is_partial(name, KNOWN) == ours
    (tmp_path / name).touch()
    remove_partial_files(tmp_path, KNOWN)
    assert names(tmp_path) == ([] if ours else [name])


@pytest.mark.parametrize("make", OTHERS[1:])
def test_what_has_the_name_of_a_leftover_but_is_no_file_stays(tmp_path, make):
    make(tmp_path / LEFT)
    before = everything(tmp_path)
    remove_partial_files(tmp_path, KNOWN)
    assert everything(tmp_path) == before


def test_checkpoints_are_removed_but_nothing_of_anybody_s(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save_best(Progress(step=step), {})
    assert names(checkpoints.folder) == ["best-00000002"]
    theirs = checkpoints.path("best", 2) / "notes.txt"
    theirs.write_text("mine")
    for name in (".step-00000001-0123abcd.partial", ".best-00000003-0123abcd.partial"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "manifest.json").touch()
    (checkpoints.folder / ".best-00000003-0123abcd.partial/theirs").touch()
    (checkpoints.folder / "best-00000009.partial").mkdir()
    checkpoints.sweep()
    checkpoints.save_best(Progress(step=3), {})
    assert names(checkpoints.folder) == [
        ".best-00000003-0123abcd.partial",
        *("best-00000002", "best-00000003", "best-00000009.partial"),
    ]
    assert theirs.read_text() == "mine"
    assert "holds 'notes.txt'" in caplog.text


PLACES = ["metrics.jsonl", "metrics-00000000.jsonl"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [_link, _dangling, _filled, os.mkfifo])
def test_lines_of_steps_go_into_their_own_file_alone(tmp_path, make, place):
    make(tmp_path / place)
    before = everything(tmp_path)
    steps = StepLines(tmp_path / "metrics.jsonl", limit=1)
    with pytest.raises(InputError, match=r"no regular file|is there already"):
        steps.cut(0)
    with pytest.raises(InputError, match=r"no regular file|is there already"):
        steps.append([{"step": 0}])
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before


def test_a_copy_by_hard_links_stays_what_it_was(tmp_path):
    StepLines(tmp_path / "metrics.jsonl").append([{"step": 0}])
    (tmp_path / "copy").hardlink_to(tmp_path / "metrics.jsonl")
    steps = StepLines(tmp_path / "metrics.jsonl")
    steps.cut(1)
    steps.append([{"step": 1}])
    assert (tmp_path / "copy").read_text() == '{"step": 0}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_only_pieces_of_ours_are_dropped(tmp_path):
    (tmp_path / "metrics-2024.jsonl").write_text("mine")
    steps = StepLines(tmp_path / "metrics.jsonl", limit=1, keep=1)
    for step in range(3):
        steps.append([{"step": step}])
    assert names(tmp_path) == ["metrics-00000002.jsonl", "metrics-2024.jsonl"]


def test_paths_are_looked_at_without_links_and_ways_back(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "link").symlink_to("p")
    monkeypatch.chdir(tmp_path)
    for way in ("p/new/..", "./p", "link", "p/new/../../p", "new/../link/./new/.."):
        assert resolved(Path(way)) == Path("p")
        assert resolved(tmp_path / way) == tmp_path / "p"
    assert resolved(Path("..")) == tmp_path.parent
    assert resolved(Path("p/..")) == Path()
