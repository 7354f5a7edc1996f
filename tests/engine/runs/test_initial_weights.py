"""``--init RUN``: what a run takes from another one, what begins anew, and what is said of it."""

import shutil
from pathlib import Path

import pytest
import torch

from engine import sweep, train
from engine.config import recipe as recipes
from engine.models.multitask import MultitaskModel
from engine.runs.initial_weights import compare
from engine.runs.run import begin, open_run
from engine.utils.errors import InputError

from ..cli.test_bad_input import refuse
from ..conftest import SHORT, TINY
from ..test_phases import cut_at
from ..whole_runs import assert_same_run

CPU = torch.device("cpu")
WIDE = (
    "adapter_width=4",
    "tasks.quora.head=shared",
    "objectives.text.kind=masked_lm",
    "objectives.text.max_per_source=16",
    "train=['sst','quora','sts','text']",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run with adapters, a layer that heads share, and an objective."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    rates = ["encoder.hidden_dropout_prob=0.2", "lr=1e-2"]
    options = ["demo", "--out", str(folder), "--max-steps", "2", "--set", *TINY, *WIDE, *rates]
    assert train.main(options) == 0
    return folder


def planned(source: Path, *settings: str, recipe: str = "demo"):
    """A run with ``--init``, as it would begin."""
    return begin(recipes.load(recipe, [f"init={source}", *SHORT, *settings]), Path("not-written"))


def begins_anew(model: MultitaskModel, source: Path) -> set[str]:
    """Names of heads, adapters and shared layers whose weights are not those of the other run."""
    trained, _ = open_run(source).trained_model(CPU, torch.float32)
    theirs = trained.state_dict()
    own = {
        name for name, tensor in model.state_dict().items() if not _same(tensor, theirs.get(name))
    }
    return {".".join(name.split(".")[:2]) for name in own}


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def test_a_run_of_the_same_recipe_takes_everything(source):
    run = planned(source, *WIDE)
    assert begins_anew(run.initial_model(), source) == set()
    assert run.config == open_run(source).config  # with its dropout rates
    assert run.recipe.encoder.hidden_dropout_prob == 0.2
    assert run.tokenizer.vocab_size == open_run(source).tokenizer.vocab_size
    assert run.line_on_init == (
        f"--init {source}: taken from step 2: tokenizer, encoder, heads of sst, quora, text, "
        "adapters of sst, quora, sts"
    )


@pytest.mark.parametrize(
    ("settings", "anew", "said"),
    [
        (
            ("adapter_width=4", "tasks.sts.head=concat", "tasks.quora.head=shared"),
            {"heads.sts"},
            "heads of sst, quora, adapters of sst, quora, sts; begin anew: sts (head ",
        ),
        (
            (*WIDE, "adapter_width=8", "objectives.text.kind=masked_lm_next"),
            {"adapters.sst", "adapters.quora", "adapters.sts", "heads.text"},
            "; begin anew: text (kind masked_lm there), adapters (width 4 there); left there: "
            "adapters, with which its encoder was trained",
        ),
        (
            ("tasks.sts.head=shared", "tasks.quora.head=concat"),
            {"heads.sts", "heads.quora", "pair.weight", "pair.bias"},
            "; begin anew: quora (head shared there), sts (head ",
        ),
        (
            (*WIDE, "objectives.more.kind=simcse", "pooling=cls"),
            {"heads.sst", "heads.quora", "pair.weight", "pair.bias"},
            "encoder, heads of text, adapters of sst, quora, sts; begin anew: sst (pooling mean "
            "there), quora (pooling mean there)",
        ),
    ],
)
def test_what_begins_anew(source, settings, anew, said):
    run = planned(source, *settings)
    model, drawn = run.initial_model(), run.new_model().state_dict()
    found = begins_anew(model, source)
    assert {name for name in found if drawn_again(model, drawn, name)} == found
    assert found == anew
    assert said in run.line_on_init


def drawn_again(model: MultitaskModel, drawn: dict[str, torch.Tensor], name: str) -> bool:
    """Whether all weights of a module are those that the run's seed draws."""
    own = {n: t for n, t in model.state_dict().items() if n.startswith(name)}
    return all(torch.equal(tensor, drawn[n]) for n, tensor in own.items())


TOPICS = (
    "tasks.topics.head=single",
    "tasks.topics.source.kind=classification",
    "tasks.topics.source.text=['text']",
    "tasks.topics.source.files={train='a.csv'}",
)


@pytest.mark.parametrize(
    ("own", "other", "why"),
    [
        (("classes=['a','b','c']",), ("classes=['a','b','c']",), ""),
        (("classes=['a','b','c']",), ("classes=['b','a','c']",), "other labels there"),
        (("classes=['a','b','c']",), ("classes=3",), "other labels there"),
        (("classes=3",), ("classes=4",), "other labels there"),
        (("classes=2",), ("classes=3",), "another kind of task there"),
        (
            ("kind=regression", "range=[0,5]"),
            ("kind=regression", "range=[1,5]"),
            "another range there",
        ),
        (("kind=regression", "range=[0,5]"), ("classes=6",), "another kind of task there"),
        (
            ("kind=pair_classification", "text=['a','b']", "classes=3"),
            ("classes=3",),
            "another kind of task there",
        ),
    ],
)
def test_heads_of_one_name_that_mean_something_else(own, other, why):
    one, two = (
        recipes.load(
            "demo",
            [
                *TOPICS,
                *(f"tasks.topics.source.{setting}" for setting in settings),
                *(["tasks.topics.head=cross"] if "kind=pair_classification" in settings else []),
            ],
        )
        for settings in (own, other)
    )
    taken = compare(one, two)
    assert taken.anew == ({"topics": why} if why else {})
    assert ("topics" in taken.heads) == (not why)
    assert compare(one, recipes.load("demo")).anew == {"topics": "not there"}
    error = recipes.load("demo", ["tasks.sts.head=difference", "tasks.sts.loss=cross_entropy"])
    plain = recipes.load("demo", ["tasks.sts.head=difference"])
    assert compare(plain, error).anew == {"sts": "loss cross_entropy there"}


def test_it_is_resumed_without_the_other_run(source, tmp_path, monkeypatch, capsys):
    gone = shutil.copytree(source, tmp_path / "gone")
    settings = ["--set", *SHORT, "schedule=constant", "checkpoint_every=1", "freeze_encoder=true"]

    def run(name: str, *options: str) -> Path:
        where = ["--init", str(gone), "--out", str(tmp_path / name), *options]
        assert train.main(["demo", *where, *settings]) == 0
        return tmp_path / name

    whole = run("whole")
    said = "encoder, heads of sst; begin anew: quora (head shared there); left there: adapters"
    assert said in capsys.readouterr().out
    cut_at(2, monkeypatch, lambda: run("cut"))
    capsys.readouterr()
    shutil.rmtree(gone)
    assert_same_run(run("cut", "--resume"), whole)
    assert "taken from" not in capsys.readouterr().out
    options = ["--init", str(gone), "--out", str(tmp_path / "other")]
    assert f"--init {gone}: no such folder" in refuse(capsys, train, "demo", *options)


def test_dry_runs_say_what_would_be_taken(source, tmp_path, capsys):
    options = ["--init", str(source), "--out", str(tmp_path / "run"), "--dry-run"]
    assert train.main(["sst-finetune", *options, "--set", *SHORT, "pooling=mean"]) == 0
    assert "taken from step 2: tokenizer, encoder, heads of sst" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_runs_that_cannot_be_begun_from(source, tmp_path, capsys):
    def refused(settings: tuple[str, ...] = (), command=train, *options: str) -> str:
        where = ["--init", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *options]
        line = refuse(capsys, command, "demo", *where, "--set", *SHORT, *settings)
        assert not (tmp_path / "out" / "recipe.toml").exists()
        return line

    run = shutil.copytree(source, tmp_path / "run")
    line = refused(("encoder.hidden_size=64",))
    assert f"encoder.hidden_size = 64: --init {run} has 32" in line
    line = refused((), sweep, "--grid", "encoder.hidden_size=32,64")
    assert f"encoder.hidden_size = 64: --init {run} has 32" in line
    assert f"lora_rank = 2: --init {run} is a run" in refused(("lora_rank=2",))
    (best,) = run.glob("checkpoints/best-*")
    (best / "model.safetensors").write_bytes(b"spoilt")
    assert "best-00000002/model.safetensors: damaged" in refused()
    shutil.rmtree(run / "checkpoints")
    assert f"{run}: no checkpoint yet; train it first" in refused()
    (run / "recipe.toml").write_text("[")
    assert "recipe.toml: not TOML" in refused()


def test_what_is_no_run_and_no_model_is_told_so(tmp_path):
    """A folder of a run, a folder within one, low-rank updates alone."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    for name, message in (
        ("lora", "holds low-rank updates without their model; merge them into it"),
        ("runs", "config.json: not found; give a model folder, which holds it, or the folder of a"),
    ):
        with pytest.raises(InputError, match=message):
            begin(recipes.load("demo", [f"init={tmp_path / name}"]), tmp_path / "run")
