"""Bad input: one line on stderr that says what and where, status 2, nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import evaluate, predict, report, sweep, train
from engine.cli.common import run_cli
from engine.config.recipe import load
from engine.data.cache import default_cache
from engine.runs.data_paths import data_folder

from ..conftest import TINY


def refuse(capsys, program, *arguments: str) -> str:
    """Run a program that must refuse; return its one line."""
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: program.main(list(arguments)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


MASKED = ["--set", "train=['sst','lm']", "--set", "objectives.lm.kind=masked_lm"]
NAMED = "kind='classification',text=['x'],files={train='x.csv'}"
SOURCE = "tasks.sst.source={kind='classification',text=['x'],classes=2,%s}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "RECIPE is missing"),
        (["cgz"], "did you mean cgs?"),
        (["cgs", "--set", "lrate=1"], "unknown key lrate; did you mean"),
        (["cgs", "--set", "tasks.sst.heads=single"], "did you mean head?"),
        (["cgs", "--set", "encoder.hiden_size=8"], "did you mean hidden_size?"),
        (["cgs", "--set", "lr"], "expected key=value"),
        (["cgs", "--set", "lr=fast"], "lr = 'fast'"),
        (["cgs", "--set", "lr=-1"], "lr = -1"),
        (["cgs", "--set", "lr=nan"], "lr = nan"),
        (["cgs", "--set", "lr=1e39"], "lr = 1e+39"),  # finite, but not in fp32
        (["cgs", "--set", "batch_size=0"], "batch_size = 0"),
        (["cgs", "--set", "balance=pcgard"], "did you mean pcgrad?"),
        (["cgs", "--set", "balancing.cagrad_d=0.1"], "did you mean cagrad_c?"),
        (["cgs", "--set", "balancing.cagrad_c=-1"], "balancing.cagrad_c = -1"),
        (["cgs", "--set", "balancing.nash_mtl_max_norm=-1"], "balancing.nash_mtl_max_norm = -1"),
        (
            ["cgs", "--set", "balancing.aligned_mtl_scale_mode=max"],
            "balancing.aligned_mtl_scale_mode = 'max'",
        ),
        (
            ["cgs", "--set", "balance=upgrad", "balancing.preferences.imdb=2"],
            "balancing.preferences: 'imdb' is no trained task",
        ),
        (["cgs", "--set", "balance=main_aux", "balancing.main=cfimdb"], "'cfimdb' is no trained"),
        *[
            (
                ["cgs", "--set", f"tasks.sst.source={{{NAMED},classes={classes}}}"],
                f"source.classes = {value}: expected names, such as ['no', 'yes'], or how many",
            )
            for classes, value in [
                *[("1", "1"), ("-3", "-3"), ("2.5", "2.5"), ("true", "True"), ("'yes'", "'yes'")],
                *[("[1, 2]", "[1, 2]"), ("{a=1}", "{'a': 1}"), ("99999999999", "99999999999")],
            ]
        ],
        (["cgs", "--set", "balance_granularity=layers"], "balance_granularity = 'layers'"),
        (
            ["mtb-cosine-simcse", "--set", "freeze_encoder=true"],
            "nothing is left to train by simcse",
        ),
        (
            [
                *("demo", "--set", "freeze_encoder=true", "task_schedule=cycle"),
                "tasks.sts.head=cosine",
            ],
            "nothing is left to train by sts",
        ),
        (["cgs", "--set", "lr.peak=1"], "lr has no fields"),
        (["cgs", "--set", "train=['imdb']"], "'imdb' is not among tasks"),
        (["cgs", "--set", "tasks.sst2.head=single"], "did you mean sst?"),
        (["cgs", "--set", "tasks.sst.head=cosine"], "tasks.sst.head = 'cosine'"),
        (["cgs", "--max-steps", "many"], "invalid int value"),
        (["cgs", "--device", "tpu"], "--device tpu"),
        (["cgs", "--data", "no/such/folder"], "no such folder"),
        (["cgs", "--init", "./no-such-model"], "no such folder"),
        (["cgs", "--init", "~nobody/model"], "no such folder"),
        (["cgs", "--init", __file__], "unpack archives"),
        (["cgs", "--init", "a" * 300], "neither a folder"),
        (["cgs", "--out", "a\0b"], r"'a\x00b': has control characters"),
        (["cgs", "--out", "a\nb"], r"'a\nb': has control characters"),
        (["cgs", "--out", "a\x1b[2J"], r"'a\x1b[2J': has control characters"),
        (["cgs", "--data", "\udcff"], r"'\udcff': has control characters or is no text"),
        (["cgs", "--out", "a" * 300, "--data", "."], "file name too long"),
        (["../recipes/cgs"], "recipe ../recipes/cgs: not found"),
        (["cgs", "--set", "lr=" + "[" * 5000], "lr = '[[["),
        (["cgs", "--set", "lr=" + "9" * 5000], "lr = '999"),
        (["cgs", "--set", "batch_size=" + "9" * 20], "batch_size = 999"),
        (["demo", "--set", "threads=1000000"], "threads = 1000000: this machine has"),
        (["demo", "--set", "encoder.num_hidden_layers=1000000"], "less than or equal to 1024"),
        (["demo", "--set", "batch_size=2147483647"], "; lower batch_size (now 2147483647)"),
        (
            ["demo", "--set", "tasks.sst.batch_size=2147483647"],
            "; lower tasks.sst.batch_size (now 2147483647)",
        ),
        (
            ["demo", *MASKED, "--set", "objectives.lm.batch_size=2147483647"],
            "; lower objectives.lm.batch_size (now 2147483647)",
        ),
        (
            ["demo", *MASKED, "--set", "objectives.lm.tokens_per_batch=2147483647"],
            "; lower objectives.lm.tokens_per_batch (now 2147483647)",
        ),
        (["demo", "--set", "encoder.intermediate_size=2147483647"], "GiB are needed, the machine"),
        (["demo", "--set", "encoder.max_position_embeddings=2147483647"], "GiB are needed"),
        (["demo", "--set", "adapter_width=100000000"], "GiB are needed, the machine has"),
        (["cgs", "--set", "encoder.vocab_size=99999999999"], "encoder.vocab_size = 999"),
        (["superbert", "--set", "objectives.masked_lm.files=['../x']"], "leaves the data folder"),
        (["cgs", "--resume"], "--out"),
        (["cgs", "--init", ""], "argument --init: '' is no value; give one"),
        (["cgs", "--data", ""], "argument --data: '' is no value; give one"),
        (["cgs", "--out", "  "], "argument --out: '  ' is no value; give one"),
        ([""], "argument RECIPE: '' is no value; give one"),
        (["cgs", "--seeds", "2", "--dry-run"], "leave --seeds out"),
        (["cgs", "--seeds", "0"], "'0': expected a whole number from 1 on"),
        (["cgs", "--set", "init="], "--set init=: no value"),
        (["cgs", "--set", "data= "], "--set data= : no value"),
        (["cgs", "--set", "lr="], "--set lr=: no value"),
        (["cgs", "--set", "description="], "--set description=: no value"),
        (["cgs", "--set", "init=' '"], "init = ' ': nothing but spaces"),
        (["cgs", "--set", "data='  '"], "data = '  ': nothing but spaces"),
        (["superbert", "--set", "objectives.masked_lm.files=['']"], "empty; give a name"),
        (["cgs", "--set", SOURCE % "files={train=''}"], "files.train = '': empty; give a name"),
        (["cgs", "--set", SOURCE % "dataset='x',splits={train=''}"], "splits.train = '': empty"),
        (["cgs", "--set", SOURCE % "dataset=' '"], "dataset = ' ': nothing but spaces"),
        (["none.toml"], "not found"),
        (["cgs", "--set", "encoder.hidden_size=30", "encoder.num_attention_heads=4"], "divisible"),
    ],
)
def test_options_and_recipes(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refuse(capsys, train, *arguments)
    assert not list(tmp_path.rglob("recipe.toml"))


@pytest.mark.parametrize("minutes", ["-1", "nan", "inf"])
def test_a_time_limit_that_is_none(capsys, tmp_path, minutes):
    options = ["demo", "--out", str(tmp_path / "runs"), "--minutes", minutes]
    assert "expected a number of minutes, at least 0" in refuse(capsys, sweep, *options)


def test_an_option_of_another_kind_of_report(capsys, tmp_path):
    options = [str(tmp_path), "--out", str(tmp_path / "pages"), "--no-texts"]
    assert "give it with --papers" in refuse(capsys, report, *options)


def test_what_is_named_may_look_like_markup(tiny_run, capsys):
    folder = tiny_run("run [/red] :bomb: zażółć", "--max-steps", "1")
    assert f"wrote {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recipe.toml", "config.json", "metrics.jsonl", "manifest.json"])
def test_a_pipe_in_a_runs_folder_is_not_waited_for(tiny_run, capsys, name):
    folder = tiny_run("run")
    for path in folder.rglob(name):
        path.unlink()
        os.mkfifo(path)
    capsys.readouterr()
    refuse(capsys, train, "demo", "--out", str(folder), "--resume", "--set", *TINY)


def test_a_recipe_that_is_no_toml(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text("lr = = 1\n")
    assert "line 1" in refuse(capsys, train, str(tmp_path / "mine.toml"))


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """A copy of the demo data set to corrupt."""
    return shutil.copytree(data_folder(load("demo")), tmp_path / "data")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1\tx\ta fine film\t7", "label is outside 0 to 4"),
        ("1\tx\ta fine film\tgood", "label is not a number"),
        ("1\tx\ta fine film\t2.5", "label is not a whole number"),
        ("1\tx\ta fine film\tnan", "label is not a number"),
        ("1\tx\t   \t2", "empty sentence"),
        ("1\tx\ta fine film", "number of fields"),
        ('1\tx\t"a fine film\t2', "broken quoting"),
    ],
)
def test_bad_rows_end_the_run_or_are_skipped(capsys, tmp_path, demo_copy, row, expected):
    file = demo_copy / "ids-sst-train.csv"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, rows[0], row, *rows[1:]]) + "\n")
    arguments = ["demo", "--data", str(demo_copy), "--out", str(tmp_path / "run")]
    message = refuse(capsys, train, *arguments, "--max-steps", "1", "--set", *TINY)
    assert expected in message
    assert f"{file}:3" in message

    skipping = [*arguments, "--on-bad-row", "skip", "--max-steps", "1"]
    assert train.main([*skipping, "--set", *TINY]) == 0
    printed = capsys.readouterr().out
    assert f"sst: 1 rows skipped ({expected})" in printed
    assert f"{file}:3; " in printed.partition("the first: ")[2].splitlines()[0]


def test_wrong_encoding_and_missing_files(capsys, tmp_path, demo_copy):
    file = demo_copy / "quora-dev.csv"
    file.write_bytes(file.read_bytes().replace(b"the ", b"th\xe9 ", 1))
    arguments = ["demo", "--data", str(demo_copy), "--out", str(tmp_path / "run"), "--set", *TINY]
    assert "not UTF-8" in refuse(capsys, train, *arguments)
    file.unlink()
    message = refuse(capsys, train, *[*arguments[:4], str(tmp_path / "other"), *arguments[5:]])
    assert "quora-dev.csv" in message


def test_out_that_holds_another_run(capsys, tiny_run):
    folder = tiny_run("run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "holds a run already" in refuse(capsys, train, "demo", "--out", str(folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resume_with_other_settings(capsys, tiny_run):
    folder = tiny_run("run")
    arguments = ["demo", "--out", str(folder), "--resume", "--set", *TINY, "lr=0.5"]
    assert "was made with lr = 0.001, now it is 0.5" in refuse(capsys, train, *arguments)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [((), 4), (("phases.one.epochs=2", "phases.two.epochs=1"), 6)],
    ids=["in this phase", "in the one before"],
)
def test_resume_with_fewer_steps_than_trained(capsys, tiny_run, settings, steps):
    folder = tiny_run("run", "--max-steps", "4", settings=settings)
    recipe = (folder / "recipe.toml").read_bytes()
    arguments = ["demo", "--out", str(folder), "--resume", "--set", *TINY, *settings]
    capsys.readouterr()
    line = refuse(capsys, train, *arguments, "max_steps=3")
    assert f"has trained {steps} steps, more than recipe and data give now; raise max_steps" in line
    assert (folder / "recipe.toml").read_bytes() == recipe
    for same_or_more in (4, 5):
        assert train.main([*arguments, f"max_steps={same_or_more}"]) == 0


def test_resume_at_a_checkpoint_within_an_epoch_that_is_to_be_the_end(capsys, tiny_run):
    settings = ("checkpoint_every=3", "keep_checkpoints=2", "epochs=2")  # of two steps each
    folder = tiny_run("run", settings=settings)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    arguments = ["demo", "--out", str(folder), "--resume", "--set", *TINY, *settings]
    capsys.readouterr()
    line = refuse(capsys, train, *arguments, "max_steps=3")
    assert "has trained these 3 steps, in the middle of an epoch, where it was not scored" in line
    assert train.main(arguments) == 0


def test_resume_of_a_run_that_ended_within_an_epoch(tiny_run):
    for again in ((), ("--resume",)):
        tiny_run("run", "--max-steps", "3", *again)


def test_a_run_whose_tokenizer_has_numbers_beyond_its_table(capsys, tiny_run):
    folder = tiny_run("run", "--max-steps", "1")
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["model"]["vocab"]["zebra"] = 13_700
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    resuming = ["demo", "--out", str(folder), "--resume", "--max-steps", "2", "--set", *TINY]
    capsys.readouterr()
    for program, arguments in ((evaluate, [str(folder)]), (train, resuming)):
        assert "the tokenizer has 13701 entries, the embedding table" in refuse(
            capsys, program, *arguments
        )


@pytest.fixture
def small_model(tiny_run, tmp_path: Path) -> Path:
    """A model folder in the Hugging Face layout, to corrupt."""
    from engine.models.hf_weights import to_huggingface_state
    from engine.runs.run import open_run

    run = open_run(tiny_run("source"))
    folder = tmp_path / "model"
    folder.mkdir()
    run.tokenizer.save(folder)
    shutil.copy(run.folder / "config.json", folder)
    state = to_huggingface_state(run.new_model().encoder.state_dict(), run.config)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers = 1000000: expected at most 1024"),
        ({"num_hidden_layers": 1000}, "weight encoder.layer.1.attention.self.query.weight is miss"),
        ({"vocab_size": 2**31 - 1}, "config.json asks for [2147483647, "),
        ({"intermediate_size": 2**31 - 1}, "config.json asks for [2147483647, "),
        ({"max_position_embeddings": 2**31 - 1}, "config.json asks for [2147483647, "),
    ],
)
def test_a_config_larger_than_its_weights(capsys, small_model, monkeypatch, fields, expected):
    """The weights' headers say so, before anything of that size is built."""
    path = small_model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    monkeypatch.setattr("engine.runs.run.MultitaskModel", None)
    assert expected in refuse(capsys, train, "demo", "--init", str(small_model))


def test_a_config_that_is_too_large_a_file(capsys, small_model):
    os.truncate(small_model / "config.json", 1 << 40)
    line = refuse(capsys, train, "demo", "--init", str(small_model))
    assert "has 1,099,511,627,776 bytes, at most 67,108,864 are expected" in line


def test_a_run_folder_whose_config_asks_for_more_than_the_memory(capsys, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run("source"), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"intermediate_size": 2**31 - 1}))
    assert "GiB are needed, the machine has" in refuse(capsys, evaluate, str(run))


def test_a_model_folder_trains(small_model, tiny_run):
    tiny_run("from-model", "--init", str(small_model))


def corrupt_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.0.output.dense.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors")


def corrupt_missing(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.0.attention.self.key.bias"]
    save_file(state, folder / "model.safetensors")


def corrupt_nan(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors")


def corrupt_value(value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    """Put a value into a weight that is stored in another dtype."""

    def corrupt(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        weight = state["encoder.layer.0.output.dense.weight"].to(dtype)
        weight[0, 0] = value
        state["encoder.layer.0.output.dense.weight"] = weight
        save_file(state, folder / "model.safetensors")

    return corrupt


def corrupt_index(*names: object) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        index = {"weight_map": dict(zip("abc", names, strict=False))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return corrupt


def corrupt_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: not found"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a readable"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: not found"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 5000), "brackets within"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "not a JSON object"),
        (corrupt_config, "model_type = 'gpt2'"),
        (
            corrupt_index("../../x.safetensors"),
            "'../../x.safetensors' is not the name of a file in",
        ),
        (corrupt_index("/etc/passwd"), "'/etc/passwd' is not the name of a file in"),
        (corrupt_index(3), "3 is not the name of a file in"),
        (corrupt_index(), "no weight_map"),
        (corrupt_shape, "encoder.layer.0.output.dense.weight has shape [3, 3]"),
        (corrupt_missing, "encoder.layer.0.attention.self.key.bias is missing"),
        (corrupt_nan, "no finite numbers"),
        (corrupt_value(1e300, torch.float64), "no finite numbers"),
        (corrupt_value(float("-inf"), torch.float16), "no finite numbers"),
        (corrupt_value(0, torch.float8_e4m3fn), "is stored as F8_E4M3, expected F64"),
        (corrupt_value(0, torch.int64), "is stored as I64, expected F64"),
    ],
)
def test_model_folders(capsys, tmp_path, small_model, corrupt, expected):
    capsys.readouterr()
    corrupt(small_model)
    arguments = ["demo", "--init", str(small_model), "--out", str(tmp_path / "run")]
    assert expected in refuse(capsys, train, *arguments, "--set", *TINY)
    assert not (tmp_path / "run").exists()


def test_runs_that_cannot_be_evaluated(capsys, tmp_path, tiny_run):
    assert "holds no run" in refuse(capsys, evaluate, str(tmp_path))
    folder = tiny_run("run")
    capsys.readouterr()
    (folder / "data.tsv").write_text("id\ttext\n1\tx\n")
    arguments = [str(folder), "--input", str(folder / "data.tsv"), "--output", str(folder / "out")]
    assert "no column 'sentence'" in refuse(capsys, predict, *arguments, "--task", "sst")
    assert "sst, quora, sts" in refuse(capsys, predict, *arguments, "--task", "cfimdb")
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint yet" in refuse(capsys, evaluate, str(folder))


def test_a_cache_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("SUPERBERT_CACHE", str(blocked / "cache"))
    assert default_cache() == blocked / "cache"
    message = refuse(capsys, train, "demo", "--out", str(tmp_path / "run"), "--set", *TINY)
    assert "cannot" in message


def test_a_hub_name_that_cannot_be_had(capsys, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(model: str, **_: object) -> str:
        raise OSError(f"cannot reach the hub for {model}\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refuse(capsys, train, "cgs", "--init", "bert-base-uncased", "--out", str(tmp_path))
    assert "neither a folder nor a model that the hub gives" in message


def test_sentences_over_the_limit_are_cut_and_counted(capsys, tiny_run):
    tiny_run("run", "--max-steps", "1", settings=("max_length=5",))
    assert "sentences cut to the length limit" in capsys.readouterr().out


def test_a_checkpoint_that_is_damaged(capsys, tiny_run):
    folder = tiny_run("run")
    capsys.readouterr()
    for file in (folder / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "damaged: its checksum" in refuse(capsys, evaluate, str(folder))
    arguments = ["demo", "--out", str(folder), "--resume", "--set", *TINY]
    assert "damaged: its checksum" in refuse(capsys, train, *arguments)
