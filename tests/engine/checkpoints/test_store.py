"""Checkpoints that are cut off or damaged, or meet a full disk."""

import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.checkpoints import async_writer, manifest, store
from engine.checkpoints.manifest import Manifest, Progress, read_manifest, seal, verify
from engine.checkpoints.store import Checkpoints, load_weights
from engine.cli.common import run_cli
from engine.distributed.ranks import Ranks
from engine.runs import run as runs
from engine.runs.run import open_run
from engine.train import main
from engine.training.build import build_trainer
from engine.utils.errors import InputError
from engine.utils.files import write_text

from ...conftest import REPOSITORY
from ..conftest import TINY, tiny_run  # noqa: F401 (a fixture)
from ..disk import file_size_limit
from ..test_training_run import assert_same_run

EVERY_STEP = ("checkpoint_every=1", "keep_checkpoints=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["demo", "--out", str(folder), "--set", *TINY, *EVERY_STEP]) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of it, as ``run`` in the test's own folder."""
    return shutil.copytree(whole, tmp_path / "run")


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder."""
    return [int(path.name[-8:]) for path in open_run(folder).checkpoints.all("step")]


def test_the_newest_few_stay(whole):
    assert steps(whole) == [6, 5, 4]
    assert len(list((whole / "checkpoints").iterdir())) == 4  # and the best
    for path in (whole / "checkpoints").iterdir():
        verify(path)


@pytest.mark.parametrize("when", ["listed", "named", "read"])
def test_a_checkpoint_that_training_drops_meanwhile_has_a_successor(
    copy, monkeypatch, caplog, when
):
    run = open_run(copy)
    (best,) = run.checkpoints.all("best")
    later = run.checkpoints.path("best", 99)

    def before(module, name: str, path_of) -> None:
        usual = getattr(module, name)

        def after_the_move(first, *rest):
            if path_of(first).name == best.name and best.exists():
                best.rename(later)  # as if it were another one
            return usual(first, *rest)

        monkeypatch.setattr(module, name, after_the_move)

    if when == "listed":
        before(store, "verify", Path)
    elif when == "named":
        before(manifest, "_digest", lambda file: file.parent)
    else:
        before(runs, "load_weights", Path)
    _, progress = run.trained_model(torch.device("cpu"))
    assert later.is_dir()
    assert progress.step == read_manifest(later).progress.step
    assert not caplog.records


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "added", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(whole, copy, caplog, how):
    newest = open_run(copy).checkpoints.all("step")[0]
    (tensors,) = newest.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "bit":
        tensors.write_bytes(content)
    elif how == "cut":
        tensors.write_bytes(content[:-8])
    elif how == "gone":
        tensors.unlink()
    elif how == "added":
        shutil.copy(tensors, newest / "shard-00002-model-00001-of-00001.safetensors")
    else:
        (newest / "manifest.json").write_text("{")
    found = open_run(copy).checkpoints.find("step")
    assert found is not None
    assert found.name == "step-00000005"
    assert newest.name in caplog.text
    if how == "bit":
        assert main(["demo", "--out", str(copy), "--resume", "--set", *TINY, *EVERY_STEP]) == 0
        assert steps(copy) == [6, 5, 4]
        assert_same_run(copy, whole)


def test_a_write_that_is_cut_off_leaves_the_one_before(
    whole,
    tiny_run,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    put = async_writer.put_folder

    def cut_off(partial, path, known):
        if path.name == "step-00000004":
            raise KeyboardInterrupt  # at the last moment, when all but the name is there
        put(partial, path, known)

    with monkeypatch.context() as patch:
        patch.setattr(async_writer, "put_folder", cut_off)
        patch.setattr(async_writer, "remove_folder", lambda *_: None)  # nobody cleans up
        with pytest.raises(BaseException, match="KeyboardInterrupt"):
            tiny_run("run", settings=EVERY_STEP)
    folder = tmp_path / "run"
    assert steps(folder)[0] == 3
    assert list((folder / "checkpoints").glob("*.partial"))
    tiny_run("run", "--resume", settings=EVERY_STEP)
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert_same_run(folder, whole)


def test_a_full_disk_is_one_line_and_loses_nothing(copy, capsys):
    size = max(file.stat().st_size for file in copy.rglob("step-*/*.safetensors"))
    for path in open_run(copy).checkpoints.all("step")[:2]:
        shutil.rmtree(path)
    arguments = ["demo", "--out", str(copy), "--resume", "--set", *TINY]
    with file_size_limit(size // 2), pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file too large" in line
    assert steps(copy) == [4]
    assert not list(copy.rglob("*.partial"))


def test_a_full_disk_when_the_best_weights_are_written(whole, tiny_run, tmp_path):  # noqa: F811
    (best,) = whole.glob("checkpoints/best-*/*.safetensors")
    settings = ("keep_checkpoints=3",)  # none before the epoch's end, which comes after the best
    with (
        file_size_limit(best.stat().st_size // 2),
        pytest.raises(InputError, match=r"cannot write .*best-00000002: .*file too large"),
    ):
        tiny_run("run", settings=settings)
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert_same_run(tiny_run("run", "--resume", settings=settings), whole)


def test_a_file_that_cannot_be_written_leaves_no_other(tmp_path):
    (tmp_path / "notes").write_text("before")
    with file_size_limit(100), pytest.raises(InputError, match=r"cannot write .*too large"):
        write_text(tmp_path / "notes", "x" * 101)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert (tmp_path / "notes").read_text() == "before"


def test_tensors_come_back_and_others_are_missed(tmp_path):
    tensor = torch.arange(10.0)
    with async_writer.AsyncWriter(Checkpoints(tmp_path), 1, Ranks()) as writer:
        writer.save({"x": tensor}, Manifest(progress=Progress(step=3)))
    read = {"x": torch.empty(10)}
    writer.load(tmp_path / "step-00000003", read)
    assert torch.equal(read["x"], torch.arange(10.0))
    with pytest.raises(InputError, match="y is missing"):
        writer.load(tmp_path / "step-00000003", {"y": torch.empty(10)})


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda content: content | {"version": 99},
        lambda content: content | {"progress": ["x"]},
        lambda content: content | {"progress": [1, 0.9, 1]},
        lambda content: content | {"files": {"../../etc/passwd": "00"}},
        lambda content: content | {"more": 1},
        lambda content: [content],
    ],
)
def test_a_manifest_of_another_kind(tmp_path, corrupt):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    seal(tmp_path, Manifest(progress=Progress(step=3, best_score=0.5, best_step=2)))
    assert verify(tmp_path).progress == Progress(3, 0.5, 2)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(corrupt(json.loads(file.read_text()))))
    with pytest.raises(InputError, match="damaged"):
        verify(tmp_path)


def test_a_checkpoint_of_another_model(copy, tiny_run):  # noqa: F811
    settings = ("encoder.intermediate_size=64",)
    other = tiny_run("other", "--max-steps", "1", settings=settings)
    shutil.rmtree(other / "checkpoints")
    shutil.move(copy / "checkpoints", other / "checkpoints")
    with pytest.raises(InputError, match=r"layers.0.intermediate.*is of shape \[48"):
        tiny_run("other", "--resume", settings=settings)
    with pytest.raises(InputError, match=r"layers.0.intermediate"):
        open_run(other).trained_model(torch.device("cpu"))


WITHOUT_PICKLES = """
import sys

from engine import evaluate, export, train


def refuse(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError(f"a pickle is read: {arguments}")


sys.addaudithook(refuse)
run, arguments = sys.argv[1], ["demo", "--out", sys.argv[1], "--device", "cpu", *sys.argv[2:]]
assert train.main([*arguments, "max_steps=2"]) == 0
assert train.main([*arguments, "max_steps=3", "--resume"]) == 0
assert evaluate.main([run]) == 0
assert export.main([run, "--to", run + "-exported"]) == 0
assert train.main([*arguments[:2], run + "-2", *arguments[3:], "--init", run + "-exported"]) == 0
"""


def test_no_pickle_is_read(tmp_path):
    """Python tells an audit hook whenever one names a class or a function."""
    command = [sys.executable, "-c", WITHOUT_PICKLES, str(tmp_path / "run"), "--set", *TINY]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stderr == b""


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    finish, go_on = async_writer._Writer.finish, threading.Event()

    def wait(writer, *parts, **named):
        assert go_on.wait(timeout=60)
        finish(writer, *parts, **named)

    monkeypatch.setattr(async_writer._Writer, "finish", wait)
    checkpoints = Checkpoints(tmp_path)
    with async_writer.AsyncWriter(checkpoints, 1, Ranks()) as writer:
        writer.save({"x": torch.ones(3)}, Manifest(progress=Progress(step=3)))
        assert checkpoints.find("step") is None
        go_on.set()
    assert checkpoints.find("step") == tmp_path / "step-00000003"


def test_no_file_of_a_checkpoint_holds_a_pickle(whole):
    checkpoint = open_run(whole).checkpoints.all("step")[0]
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    for file in checkpoint.glob("*.safetensors"):
        assert load_file(file)
    assert read_manifest(checkpoint).places


def rewrite(file: Path, change, metadata=lambda stored: stored) -> None:
    """Change the tensors of a safetensors file of a checkpoint, and seal the checkpoint again."""
    with safe_open(file, "pt") as opened:
        stored = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata(stored))
    seal_again(file.parent)


def seal_again(folder: Path, **changed) -> None:
    manifest = read_manifest(folder).model_copy(update=changed)
    (folder / "manifest.json").unlink()
    seal(folder, manifest)


def put(value: float, dtype: torch.dtype = torch.float32):
    """Return what writes a value into the first weight of each tensor, stored in a dtype."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not name.startswith("step."):
                tensors[name] = tensor.to(dtype)
                tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(put(torch.nan), id="NaN"),
        pytest.param(put(torch.inf), id="infinity"),
        pytest.param(put(-1e300, torch.float64), id="float64 beyond fp32"),
        pytest.param(put(torch.inf, torch.bfloat16), id="bf16"),
    ],
)
@pytest.mark.parametrize("kind", ["best", "step"])
def test_weights_that_are_not_finite_are_refused(copy, kind, change):
    run = open_run(copy)
    newest = run.checkpoints.all(kind)[0]
    (file,) = newest.glob("*.safetensors")
    rewrite(file, change)
    verify(newest)
    with pytest.raises(InputError, match=r"no finite numbers|stored as .*, expected F32"):
        load_weights(newest, run.new_model())
    if kind == "step":
        with pytest.raises(InputError, match=r"no finite numbers|stored as .*, expected F32"):
            build_trainer(run, torch.device("cpu")).restore()


def below_zero(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("exp_avg_sq."):
            tensor.view(-1)[0] = -1e-3


def test_moments_that_no_training_leaves_are_refused(copy):
    run = open_run(copy)
    newest = run.checkpoints.all("step")[0]
    (file,) = newest.glob("*.safetensors")
    rewrite(file, below_zero)
    with pytest.raises(InputError, match="squares are below zero"):
        build_trainer(run, torch.device("cpu")).restore()


def shifted(stored: dict[str, str]) -> dict[str, str]:
    """Let the pieces of the tensors begin a row late, as others wrote the rows before."""
    name = "DCP_SHARDING_INFO"
    of_tensors = json.loads(stored[name])
    for entry in of_tensors.values():
        entry["saved_offsets"] = [1, *entry["saved_offsets"][1:]]
    return stored | {name: json.dumps(of_tensors)}


def test_pieces_that_leave_gaps_are_refused(copy):
    """Else what is not read would be what memory had."""
    run = open_run(copy)
    newest = run.checkpoints.all("step")[0]
    (file,) = newest.glob("*.safetensors")
    trainer = build_trainer(run, torch.device("cpu"))
    rewrite(file, lambda tensors: None, shifted)
    with pytest.raises(InputError, match="overlap or leave gaps"):
        load_weights(newest, run.new_model())
    with pytest.raises(InputError, match="overlap or leave gaps"):
        build_trainer(run, torch.device("cpu"))
    with pytest.raises(InputError, match="expected"):
        trainer.restore()


@pytest.mark.parametrize("how", ["overlap", "outside", "no bucket"])
def test_places_that_do_not_fit_are_refused(copy, how):
    run = open_run(copy)
    newest = run.checkpoints.all("step")[0]
    places = dict(read_manifest(newest).places)
    first, second, *_ = [name for name, place in places.items() if place.bucket == "heads"]
    changed = {
        "overlap": {"offset": places[first].offset},
        "outside": {"offset": 1 << 40},
        "no bucket": {"bucket": "attic"},
    }
    places[second] = places[second].model_copy(update=changed[how])
    seal_again(newest, places=places)
    with pytest.raises(InputError, match=r"damaged: the place of .* (overlaps|is outside)"):
        load_weights(newest, run.new_model())


@pytest.mark.parametrize("begins", [{"a": 0, "b": 12}, {"a": 0, "b": 4}, {"a": 4, "b": 12}])
def test_files_with_gaps_or_overlaps_are_refused(copy, begins):
    places = {name: [begin, begin + 8] for name, begin in begins.items()}
    tensors = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place}
        for name, place in places.items()
    }
    header = json.dumps(tensors).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(max(begins.values()) + 8)
    run = open_run(copy)
    for kind in ("best", "step"):
        newest = run.checkpoints.all(kind)[0]
        (file,) = newest.glob("*.safetensors")
        file.write_bytes(content)
        seal_again(newest)
        with pytest.raises(InputError, match="invalid offset"):
            load_weights(newest, run.new_model())


def test_a_manifest_without_a_number_is_refused(copy):
    """A score that is NaN or null where there is one; the digest is that of what is read back."""
    (best,) = open_run(copy).checkpoints.all("best")
    text = (best / "manifest.json").read_text()
    progress = read_manifest(best).progress
    for value in ("NaN", "Infinity", "1e999"):
        (best / "manifest.json").write_text(text.replace(str(progress.best_score), value))
        with pytest.raises(InputError, match=r"damaged at progress.*finite"):
            read_manifest(best)
    (best / "manifest.json").write_text(text)
    seal_again(best, progress=progress._replace(best_score=None))
    assert read_manifest(best).progress.best_score is None


def test_checkpoints_without_the_later_fields_of_progress_are_whole():
    """The digest is that of a checkpoint from before there were evaluations within epochs."""
    old = Manifest(progress=Progress(3, 0.5, 2))
    assert old.model_dump(mode="json")["progress"] == [3, 0.5, 2, 0, 0]
    assert (
        old.expected_digest() == "40928a26a586cac38c30cc765344e30595044bf68d08f99fb38f357cec2736ad"
    )
    later = Progress(3, 0.5, 2, 0, 0, None, 1)
    assert Manifest(progress=later).expected_digest() != old.expected_digest()
    text = Manifest(progress=later).model_dump_json()
    assert Manifest.model_validate_json(text).progress == later


def test_evaluations_in_a_row_without_a_better_score_are_counted_by_phase():
    progress = Progress(step=4).evaluated(0.5)
    assert (progress.best_score, progress.best_step, progress.stale) == (0.5, 4, 0)
    for score in (0.5, math.nan, 0.4):
        progress = progress._replace(step=progress.step + 1).evaluated(score)
    assert (progress.best_score, progress.best_step, progress.stale) == (0.5, 4, 3)
    later = progress.in_phase(1)
    assert (later.phase, later.phase_start, later.stale) == (1, 7, 0)
    later = later._replace(step=8).evaluated(0.3)  # the first of its phase
    assert (later.best_score, later.best_step, later.stale) == (0.5, 4, 0)
    assert later._replace(step=9).evaluated(0.4).stale == 0


def test_weights_beyond_the_dtype_to_compute_in_are_refused(copy):
    run = open_run(copy)
    (best,) = run.checkpoints.all("best")
    rewrite(best / "model.safetensors", put(1e5))
    run.trained_model(torch.device("cpu"))
    with pytest.raises(InputError, match=r"beyond the range of torch\.float16"):
        run.trained_model(torch.device("cpu"), torch.float16)
