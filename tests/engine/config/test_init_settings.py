"""``--init`` with settings of the encoder: rates take effect, the shape has to agree."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import evaluate, export, predict, sweep, train
from engine.config import recipe as recipes
from engine.runs.resume import resume
from engine.runs.run import begin, open_run
from engine.training.build import build_trainer
from engine.utils.errors import InputError

from ..cli.test_bad_input import refuse
from ..conftest import SHORT, TINY
from ..in_process import workers_in_process

CPU = torch.device("cpu")
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder with rates of its own: 32 wide, one layer, 0.2 and 0.3."""
    folder = tmp_path_factory.mktemp("model")
    own = ["encoder.hidden_dropout_prob=0.2", "encoder.attention_probs_dropout_prob=0.3"]
    options = ["--out", str(folder / "run"), "--max-steps", "1", "--set", *TINY, *own]
    assert train.main(["demo", *options]) == 0
    assert export.main([str(folder / "run"), "--to", str(folder / "model")]) == 0
    return folder / "model"


def plan(model: Path, *settings: str, recipe: str = "cgs", **options: Path):
    """A run with ``--init``, as it would begin."""
    settings = (f"init={model}", *SHORT, *settings)
    return begin(recipes.load(str(options.get("file", recipe)), settings), Path("not-written"))


def dropouts(model) -> set[tuple[float, float, float]]:
    """The rates that an encoder drops out with: embeddings, layers, attention."""
    first = model.encoder.embeddings.dropout_p
    return {
        (first, layer.hidden_dropout_p, layer.attention_dropout_p) for layer in model.encoder.layers
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (0.2, 0.2, 0.3)),
        (("encoder.hidden_dropout_prob=0.0",), (0.0, 0.0, 0.3)),
        (("encoder.attention_probs_dropout_prob=0.5",), (0.2, 0.2, 0.5)),
        (("encoder.hidden_dropout_prob=0.1", "encoder.hidden_size=32"), (0.1, 0.1, 0.3)),
        (("phases.one.epochs=1", "encoder.hidden_dropout_prob=0"), (0.0, 0.0, 0.3)),
    ],
)
def test_rates_that_are_set_take_effect_and_others_are_the_models(model, settings, expected):
    run = plan(model, *settings)
    assert dropouts(build_trainer(run, CPU).model) == {expected}
    for recipe in (run.recipe, *run.recipe.in_phases.values()):
        assert tuple(getattr(recipe.encoder, rate) for rate in RATES) == expected[1:]
        assert recipe.encoder.hidden_size == run.config.hidden_size == 32


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [
        ("vocab_size", 17, 256),
        ("hidden_size", 64, 32),
        ("num_hidden_layers", 2, 1),
        ("num_attention_heads", 4, 2),
        ("intermediate_size", 64, 48),
        ("max_position_embeddings", 512, 64),
    ],
)
def test_a_shape_that_contradicts_the_model_is_refused(model, tmp_path, capsys, field, value, own):
    setting = f"encoder.{field}={value}"
    options = ["--init", str(model), "--out", str(tmp_path / "run"), "--set", setting]
    line = refuse(capsys, train, "demo", *options)
    assert f"encoder.{field} = {value}: --init {model} has " in line
    assert getattr(plan(model).config, field) <= own
    assert not (tmp_path / "run").exists()
    same = f"encoder.{field}={getattr(plan(model).config, field)}"
    assert plan(model, same).config == plan(model).config


def test_a_sweep_is_refused_before_its_first_run(model, tmp_path, capsys):
    """A shape that contradicts the model in one point of a grid is not found hours later."""
    options = ["cgs", "--init", str(model), "--out", str(tmp_path), "--set", *SHORT]
    line = refuse(capsys, sweep, *options, "--grid", "encoder.hidden_size=32,64")
    assert f"encoder.hidden_size = 64: --init {model} has 32" in line
    assert not list(tmp_path.iterdir())


def test_a_file_with_an_init_of_its_own_has_to_agree_with_it(model, tmp_path):
    file = tmp_path / "mine.toml"
    text = (recipes.RECIPES / "cgs.toml").read_text()
    file.write_text(f"init = {json.dumps(str(model))}\n{text}\n[encoder]\nhidden_size = 64\n")
    with pytest.raises(InputError, match=r"encoder\.hidden_size = 64: --init .* has 32"):
        begin(recipes.load(str(file)), tmp_path / "run")
    file.write_text(file.read_text().replace("= 64", "= 32\nhidden_dropout_prob = 0.0"))
    assert begin(recipes.load(str(file)), tmp_path / "run").config.hidden_dropout_prob == 0


def test_the_shape_of_a_recipe_from_scratch_is_set_aside_in_one_line(model, tmp_path, capsys):
    options = ["--init", str(model), "--out", str(tmp_path / "run"), "--dry-run"]
    assert train.main(["demo", *options, "--set", *SHORT]) == 0
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "no effect" in text)
    assert line.startswith("[encoder]: no effect, it describes an encoder from scratch")
    assert "hidden_size 32, not 128" in line
    assert "max_position_embeddings" not in line  # as in the model


def test_a_limit_above_the_models_vocabulary_is_said_to_change_nothing(model, tmp_path, capsys):
    options = ["--init", str(model), "--out", str(tmp_path / "run"), "--dry-run"]
    settings = [*SHORT, "encoder.vocab_size=99999", "encoder.hidden_size=32"]
    assert train.main(["cgs", *options, "--set", *settings]) == 0
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "no effect" in text)
    own = plan(model).config.vocab_size
    assert line.endswith(f"the model has vocab_size {own}, not 99999")


@pytest.fixture
def changed(model, tiny_run, tmp_path) -> Path:
    """A run with ``--init`` and no dropout of hidden states."""
    folder = tmp_path / "run"
    options = ["--init", str(model), "--out", str(folder), "--max-steps", "1"]
    assert train.main(["cgs", *options, "--set", *SHORT, "encoder.hidden_dropout_prob=0"]) == 0
    return folder


def test_the_runs_folder_says_what_is_in_force_and_every_command_follows(
    model, changed, tmp_path, capsys
):
    written = recipes.load(str(changed / "recipe.toml")).encoder
    config = json.loads((changed / "config.json").read_text())
    for field in type(written).model_fields:
        assert getattr(written, field) == config[field], field
    assert config["hidden_dropout_prob"] == 0
    assert config["attention_probs_dropout_prob"] == 0.3
    source = tmp_path / "in.tsv"
    source.write_text("id\tsentence\n1\ta fine film\n")
    out = ["--input", str(source), "--output", str(tmp_path / "out.tsv")]
    assert evaluate.main([str(changed)]) == 0
    assert predict.main([str(changed), "--task", "sst", *out]) == 0
    assert export.main([str(changed), "--to", str(tmp_path / "model")]) == 0
    exported = json.loads((tmp_path / "model" / "config.json").read_text())
    assert exported["hidden_dropout_prob"] == 0
    assert exported["attention_probs_dropout_prob"] == 0.3
    again = recipes.load(str(changed / "recipe.toml"), ["seed=1"])
    assert begin(again, tmp_path / "again").config == open_run(changed).config


def test_a_run_is_resumed_under_the_settings_that_it_was_made_with(
    model, changed, tmp_path, capsys
):
    capsys.readouterr()
    options = ["cgs", "--out", str(changed), "--resume", "--init", str(model)]
    told = "was made with encoder.hidden_dropout_prob = 0.0, now it is 0.5"
    rate = "encoder.hidden_dropout_prob=0.5"
    assert told in refuse(capsys, train, *options, "--set", *SHORT, rate, "max_steps=2")
    wide = "encoder.hidden_size=64"
    assert "has 32" in refuse(capsys, train, *options, "--set", *SHORT, wide, "max_steps=2")
    before = (changed / "recipe.toml").read_text()
    for more in (["--init", str(model)], []):  # the folder may be gone
        settings = ["--set", *SHORT, "max_steps=2"]
        recipe = recipes.load("cgs", [*SHORT, "max_steps=2", *(f"init={m}" for m in more[1:])])
        run = resume(recipe, changed)
        assert run.recipe.init == str(model)
        assert run.recipe.encoder.hidden_dropout_prob == 0
        assert train.main([*options[:4], *more, *settings]) == 0
    assert (changed / "recipe.toml").read_text().replace("= 2\n", "= 1\n") == before.replace(
        "= 2\n", "= 1\n"
    )


def test_a_run_from_scratch_is_not_resumed_with_a_model(model, tiny_run, capsys):
    folder = tiny_run("scratch", "--max-steps", "1")
    capsys.readouterr()
    options = ["demo", "--out", str(folder), "--resume", "--init", str(model)]
    assert "was begun from scratch" in refuse(capsys, train, *options, "--set", *SHORT)


def test_a_sweep_over_rates(model, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.sweep.workers_of", workers_in_process)
    grid = ["--grid", "encoder.hidden_dropout_prob=0.0,0.4"]
    options = ["--init", str(model), "--out", str(tmp_path), "--max-steps", "1", *grid]
    assert sweep.main(["cgs", *options, "--set", *SHORT]) == 0
    for rate in (0.0, 0.4):
        (config,) = tmp_path.glob(f"cgs/*={rate}/seed-0/config.json")
        assert json.loads(config.read_text())["hidden_dropout_prob"] == rate


def test_a_run_made_before_this_was_said_is_read_as_it_is(changed):
    file = changed / "recipe.toml"
    file.write_text(
        file.read_text().replace("hidden_dropout_prob = 0.0", "hidden_dropout_prob = 0.1")
    )
    assert open_run(changed).recipe.encoder.hidden_dropout_prob == 0.0


def test_a_model_that_is_too_small_is_refused(model, tmp_path):
    small = shutil.copytree(model, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    with pytest.raises(InputError, match=r"encoder\.max_position_embeddings = 2"):
        plan(small)


def test_weights_from_scratch_do_not_begin_at_zero():
    with pytest.raises(InputError, match=r"initializer_range = 0.*; raise it"):
        recipes.load("demo", ["encoder.initializer_range=0"])
