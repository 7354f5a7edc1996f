"""What is suggested for a name that is not known: what is close, and else where to look."""

import pytest

from engine import recipe as recipes
from engine.errors import InputError
from engine.multitask.balance import METHODS, BalanceSettings
from engine.recipe import Recipe
from engine.recipe_tables import EncoderRecipe, TaskRecipe
from engine.wording import FIELDS, close, nearest

TYPOS = {
    **{"batchsize": "batch_size", "batch-size": "batch_size", "batch_sise": "batch_size"},
    **{"Batch_Size": "batch_size", "train_batch_size": "batch_size", "bs": "batch_size"},
    **{"epoch": "epochs", "num_epochs": "epochs", "epohcs": "epochs", "max_step": "max_steps"},
    **{"drop_out": "dropout", "dropuot": "dropout", "dropout_rate": "dropout"},
    **{"learning_rate": "lr", "lrate": "lr", "lrr": "lr", "LR": "lr", "wd": "weight_decay"},
    **{"weightdecay": "weight_decay", "decay": "weight_decay", "warmup_steps": "warmup"},
    **{"warmup_ratio": "warmup", "optim": "optimizer", "optimiser": "optimizer"},
    **{"freeze": "freeze_encoder", "precison": "precision", "clipnorm": "clip_norm"},
    **{"surgey": "surgery", "micro_batch": "micro_batches", "random_seed": "seed"},
    **{"task": "tasks", "phase": "phases", "objective": "objectives", "sink": "sinks"},
}
UNRELATED = [
    *("patience", "head_lr", "ema", "momentum", "early_stopping", "label_smoothing", "alpha"),
    *("gpu", "model", "workers", "nesterov", "temperature", "margin", "amp", "lora_r", "x", "k"),
    *("bf16", "verbose", "max", "test", "name", "", "_", "__", "ä", "0"),
]


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_typical_slip_is_understood(typo, meant):
    assert close(typo, Recipe.model_fields) == [meant]


@pytest.mark.parametrize("word", UNRELATED)
def test_nothing_is_suggested_for_other_words(word):
    assert close(word, Recipe.model_fields) == []
    assert nearest(word, Recipe.model_fields, FIELDS) == f"; {FIELDS} shows all"


def test_several_that_are_as_close_are_all_named():
    assert close("checkpoint", Recipe.model_fields) == ["checkpoint_every", "checkpoint_layers"]
    assert nearest("krum", ["krum_a", "krum_b"]) == "; did you mean krum_a or krum_b?"


def test_every_name_is_close_to_itself():
    for known in (Recipe, TaskRecipe, EncoderRecipe, BalanceSettings):
        for name in known.model_fields:
            assert close(name, known.model_fields) == [name]
    for name in (*METHODS, *recipes.names()):
        assert close(name, METHODS if name in METHODS else recipes.names()) == [name]


@pytest.mark.parametrize(
    ("word", "meant"),
    [("pcgard", "pcgrad"), ("gradvec", "gradvac"), ("nash", "nash_mtl"), ("imtl", "imtl_g")],
)
def test_methods(word, meant):
    assert close(word, METHODS) == [meant]


@pytest.mark.parametrize("word", ["graddrop", "uniform", "random", "rlw", "dwa", "adam"])
def test_words_that_are_like_no_method(word):
    assert close(word, METHODS) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("patience=3", f"unknown key patience; {FIELDS} shows all"),
        ("head_lr=3", f"unknown key head_lr; {FIELDS} shows all"),
        ("batchsize=3", f"unknown key batchsize; did you mean batch_size?; {FIELDS} shows all"),
        ("tasks.sst.feature=single", "unknown key tasks.sst.feature; did you mean features?"),
        ("tasks.sst.pool=cls", "known: features, loss, weight, first, source"),
        ("tasks.sst.source.kid=1", "tasks.sst.source"),
        ("encoder.layers=2", "did you mean num_hidden_layers?"),
        (
            "encoder.dropout=0",
            "did you mean attention_probs_dropout_prob or hidden_dropout_prob?",
        ),
        ("tasks.sst.source.seperator=1", f"unknown key tasks.sst.source.seperator; {FIELDS} shows"),
        ("tasks.sst.source.label=y", "tasks.sst.source.kind: missing; give it a value"),
        ("train=sst", "train = 'sst': expected a list, such as [\"sst\"]"),
        ("train=3", "train = 3: expected a list"),
        ("sinks=wandb", 'expected a list, such as ["wandb"]'),
        ("hidden_size=64", "unknown key hidden_size; did you mean encoder.hidden_size?"),
        ("cagrad_c=0.1", "did you mean balancing.cagrad_c?"),
        ("features=cosine", "did you mean tasks.NAME.features?"),
        ("balancing.cagrad_d=0.1", "did you mean cagrad_c?"),
        ("balance=foo", f"no such method; {FIELDS} shows all"),
        ("phases.one.ema=1", f"no setting of a phase: ema; {FIELDS} shows all"),
        ("train=['stsb']", "did you mean sts?"),
        ("train=['mood']", "known: sst, quora, sts"),
    ],
)
def test_the_line_names_what_is_close_or_the_page(override, expected):
    with pytest.raises(InputError) as error:
        recipes.load("cgs", [override])
    assert expected in str(error.value)
    assert len(str(error.value)) < 200


def test_recipes():
    for name, expected in {
        "cgz": "did you mean cgs?",
        "foo": "not found; --list shows all",
    }.items():
        with pytest.raises(InputError) as error:
            recipes.load(name)
        assert expected in str(error.value)
