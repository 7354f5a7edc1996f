"""The group that others are compared with: found by its settings, or refused in one line."""

import pytest

from engine.runs.baseline import find_baselines, place_of, read_settings, split_settings
from engine.utils.errors import InputError


def places(*groups: str, series: str = "") -> dict:
    return {
        (f"{series}:" if series else "") + group: place_of(
            group, split_settings(group.partition("/")[2]) if "/" in group else (), series
        )
        for group in groups
    }


METHODS = places("r/balance=sum", "r/balance=pcgrad", "r/balance=sum,tasks.a.weight=2")


def test_settings_are_split_at_keys_and_read_as_values():
    text = 'balance=sum,betas=[0.9,0.99],train=["a","b"], surgery = layer'
    assert read_settings(split_settings(text)) == {
        "balance": "sum",
        "betas": [0.9, 0.99],
        "train": ["a", "b"],
        "balance_granularity": "layer",
    }


@pytest.mark.parametrize(
    "settings",
    [
        ("balancing.fixed={sst=1,sts=2}", "lr=1"),
        ("lr=1", "balancing.fixed={a={b=1,c=2},d=[1,2]}", "x=[{a=1},{b=2}]"),
        ("description='[,a=1'", "lr=1"),
        ("description='x,a=1'", "lr=1"),
        ("description=don't", "lr=1"),
        ("data=[odd", "lr=1", "b={x"),
        ('train=["a","b"]', "best_of=a"),
        ("",),
    ],
)
def test_commas_within_brackets_or_quotes_belong_to_values(settings):
    assert split_settings(",".join(settings)) == settings


@pytest.mark.parametrize("asked", ["lr=1e-3", "lr=0.001", " lr = 1.0e-3 "])
def test_values_are_compared_as_such(asked):
    groups = places("r/lr=1e-3", "r/lr=1e-4")
    assert set(find_baselines(asked, groups).values()) == {"r/lr=1e-3"}


def test_of_several_the_one_without_other_settings():
    assert set(find_baselines("balance=sum", METHODS).values()) == {"r/balance=sum"}
    found = find_baselines("tasks.a.weight=2", METHODS)
    assert set(found.values()) == {"r/balance=sum,tasks.a.weight=2"}


def test_each_recipe_has_its_own():
    groups = places("r/balance=sum", "r/balance=mgda", "s/balance=sum", "s/balance=mgda")
    assert find_baselines("balance=sum", groups) == {
        group: f"{group[0]}/balance=sum" for group in groups
    }


def test_the_nearest_counts():
    one = places("r/balance=sum", "r/balance=pcgrad", "alone", series="x")
    two = places("r/balance=mgda", "s/lr=1", series="y")
    found = find_baselines("balance=sum", one | two)
    assert set(found.values()) == {"x:r/balance=sum"}
    both = one | two | places("r/balance=sum", series="y")
    del both["x:alone"], both["y:s/lr=1"]
    assert find_baselines("balance=sum", both)["y:r/balance=mgda"] == "y:r/balance=sum"
    with pytest.raises(InputError, match=r"several groups .* \(x:r/balance=sum, y:r/balance=sum\)"):
        find_baselines("balance=sum", both | places("s", series="z"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("balanse=sum", "no group is told by balanse; did you mean balance"),
        ("balance=cagrad", "no group has these settings; values of balance: sum, pcgrad"),
        ("balance", r"balance: expected KEY=VALUE,…"),
        ("=sum", "expected KEY=VALUE"),
        ("balance=", "expected KEY=VALUE"),
        ("balance=sum,balance=pcgrad", "balance is given already"),
        ("balance=sum,balance=sum", "balance is given already"),
        ("balance_granularity=layer,surgery=layer", "balance_granularity is given already"),
        ("balance=sum,", "expected KEY=VALUE|no group has these"),
    ],
)
def test_what_is_refused(asked, message):
    with pytest.raises(InputError, match=f"^--compare-to .*{message}") as error:
        find_baselines(asked, METHODS)
    assert "\n" not in str(error.value)


def test_several_or_none_with_settings():
    groups = places("r/balance=sum,batch_size=8", "r/balance=sum,batch_size=16")
    with pytest.raises(InputError, match=r"several groups have these settings .*; give more"):
        find_baselines("balance=sum", groups)
    with pytest.raises(InputError, match="told by lr; they have no settings of their own"):
        find_baselines("lr=1", places("r", "s"))
