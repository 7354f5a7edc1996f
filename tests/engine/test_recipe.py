"""Recipes: what they say, how they are overridden, that they survive being written."""

import pytest

from engine import recipe as recipes
from engine.train import main


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_survives_being_written(name, tmp_path):
    recipe = recipes.load(name)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert recipes.load(str(tmp_path / "again.toml")) == recipe


def test_the_papers_settings():
    for name in ("vgs", "cgs", "sst-finetune", "qqp-finetune", "sts-finetune"):
        recipe = recipes.load(name)
        assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.dropout) == (1e-5, 32, 10, 0.5)
        assert recipe.weight_decay == 0  # Adam
        assert recipe.paper
    assert recipes.load("cgs").pooling == "mean"
    assert recipes.load("cgs").tasks["sts"].features == "cosine"
    assert recipes.load("vgs").pooling == "cls"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("lr=3e-4", "lr", 3e-4),
        ("epochs = 3", "epochs", 3),
        ("batch_size=8", "batch_size", 8),
        ("dropout=0", "dropout", 0),
        ("precision=bf16", "precision", "bf16"),
        ("precision=fp16", "precision", "fp16"),
        ("balance=sum", "balance", "sum"),
        ("optimizer=adamw", "optimizer", "adamw"),
        ("optimizer=lamb", "optimizer", "lamb"),
        ("micro_batches=4", "micro_batches", 4),
        ("checkpoint_layers=true", "checkpoint_layers", True),
        ("checkpoint_every=50", "checkpoint_every", 50),
        ("log_every=1", "log_every", 1),
        ("betas=[0.8, 0.99]", "betas", (0.8, 0.99)),
        ('data="a b"', "data", "a b"),
        ("data=/some/where", "data", "/some/where"),
    ],
)
def test_any_field_can_be_set(override, field, value):
    assert getattr(recipes.load("cgs", [override]), field) == value


def test_nested_fields_can_be_set():
    recipe = recipes.load("cgs", ["tasks.quora.features=difference", "encoder.hidden_size=64"])
    assert recipe.tasks["quora"].features == "difference"
    assert recipe.tasks["sts"].features == "cosine"
    assert recipe.encoder.hidden_size == 64


def test_what_an_override_quotes_it_reads_back():
    for value in ("plain", 'with "quotes"', "back\\slash", "", "line\nbreak"):
        assert recipes.load("cgs", [recipes.override("data", value)]).data == value


def test_list_shows_every_recipe(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
