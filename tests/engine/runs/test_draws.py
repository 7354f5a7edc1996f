"""Draws of settings from distributions."""

import math

import pytest

from engine import sweep
from engine.runs.draws import parse_distribution, random_points
from engine.utils.errors import InputError

DRAWS = ["lr=log:1e-5:1e-3", "dropout=uniform:0:0.3", "batch_size=int:8:64"]
LAST = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("lr=log:1e-5:1e-3", {0: 1e-5, 0.25: 3.162e-5, 0.5: 1e-4, LAST: 1e-3}),
        ("dropout=uniform:0:0.3", {0: 0, 0.5: 0.15, 1 / 9: 0.03333, LAST: 0.3}),
        ("eps=uniform:-1e308:1e308", {0: -1e308, 0.5: 0, LAST: 1e308}),
        ("lr=log:0.123456:0.123457", {0: 0.123456, LAST: 0.123457}),  # not rounded out of it
        ("batch_size=int:8:11", {0: 8, 0.249: 8, 0.25: 9, 0.75: 11, LAST: 11}),
        ("seed=int:-9007199254740991:9007199254740991", {0: 1 - 2**53, LAST: 2**53 - 1}),
        ("balance=choice:sum,pcgrad", {0: "sum", 0.49: "sum", 0.5: "pcgrad", LAST: "pcgrad"}),
        ("betas=choice:[0.9,0.99],[0.8,0.9]", {0: [0.9, 0.99], LAST: [0.8, 0.9]}),
        ("x=choice:1,true,0.5,a b", {0: 1, 0.3: True, 0.6: 0.5, 0.9: "a b"}),
    ],
)
def test_values_are_the_quantiles_of_their_distribution(text, at):
    distribution = parse_distribution(text)
    for u, value in at.items():
        assert distribution.value_at(u) == value
        assert type(distribution.value_at(u)) is type(value) or value == 0


def test_draws_are_spread_as_their_distribution():
    """A quarter of them lies in each quarter, within five standard deviations."""
    count = 4000
    points = [dict(item.split("=") for item in point) for point in random_points(DRAWS, count, 7)]
    assert len(points) == count
    quarters = {
        "lr": lambda lr: (math.log10(lr) + 5) / 2,
        "dropout": lambda dropout: dropout / 0.3,
        "batch_size": lambda size: (size - 8) / 57,
    }
    margin = 5 * math.sqrt(count * 0.25 * 0.75)
    shares = {
        key: [min(3, int(4 * place(float(point[key])))) for point in points]
        for key, place in quarters.items()
    }
    for places in shares.values():
        assert all(abs(places.count(quarter) - count / 4) < margin for quarter in range(4))
    both = list(zip(shares["lr"], shares["dropout"], strict=True))  # keys are independent
    assert all(abs(both.count((i, i)) - count / 16) < margin for i in range(4))


def test_draws_follow_from_the_seed_and_the_key_alone():
    points = random_points(DRAWS, 20, 3)
    assert random_points(DRAWS, 8, 3) == points[:8]
    assert random_points(DRAWS, 20, 4) != points
    alone = random_points(DRAWS[1:2], 20, 3)
    assert alone == [point[1:2] for point in points]
    assert random_points(DRAWS[::-1], 20, 3) == [point[::-1] for point in points]
    # Under any version of Python and torch; by a field's old name, too.
    assert points[0] == ("lr=0.000298", "dropout=0.2131", "batch_size=29")
    (new,) = random_points(["max_train_examples=int:1:99999"], 1, 0)
    (old,) = random_points(["limit=int:1:99999"], 1, 0)
    assert new[0].partition("=")[2] == old[0].partition("=")[2]


def test_draws_that_repeat_one_are_one_point():
    points = random_points(["balance=choice:sum,pcgrad", "epochs=int:1:2"], 50, 0)
    assert len(points) == len(set(points)) == 4
    assert random_points(['balance=choice:"sum","pcgrad"'], 9, 0) == random_points(
        ["balance=choice:sum, pcgrad"], 9, 0
    )
    (day,) = random_points(["description=choice:1979-05-27,1979-05-27"], 1, 0)
    assert day == ("description=1979-05-27",)
    (name,) = random_points(["description=choice:é b,é b"], 1, 0)
    assert name == ("description=é b",)
    assert random_points(["description=choice:'1',1"], 9, 0)[0][0] in (
        'description="1"',
        "description=1",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", r"--draw lr: expected KEY=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:"),
        ("lr=", "expected KEY=log:"),
        ("=log:1:2", "expected KEY=log:"),
        ("lr=1e-3", "expected KEY=log:"),
        ("lr=lgo:1:2", "no such distribution: lgo; did you mean log"),
        ("lr=normal:0:1", "no such distribution: normal; known: log, uniform, int, choice"),
        ("lr=log:1", "expected two numbers, LOW:HIGH, not '1'"),
        ("lr=log:1:2:3", "expected two numbers"),
        ("lr=log:a:b", "expected two numbers"),
        ("lr=log:0:1", "LOW = 0 has no logarithm; give one above 0, or uniform"),
        ("lr=log:-1:1", "LOW = -1 has no logarithm"),
        ("lr=uniform:nan:1", "have to be finite"),
        ("lr=uniform:0:1e999", "have to be finite"),
        ("lr=uniform:2:1", "the range from 2 to 1 is empty; give LOW below HIGH"),
        ("lr=log:1:1", "the range from 1 to 1 is empty"),
        ("batch_size=int:8:8", "or a single value by --set"),
        ("batch_size=int:0.5:8", "expected two whole numbers"),
        ("batch_size=int:0:1e300", "expected two whole numbers"),
        ("balance=choice:", "without empty values"),
        ("balance=choice:sum,,pcgrad", "without empty values"),
        ("balance=choice:1,2,", "without empty values"),
        ("balance=choice:sum", "one value is no choice"),
    ],
)
def test_no_distribution(text, message):
    with pytest.raises(InputError, match=message) as refused:
        random_points([text], 3, 0)
    assert str(refused.value).startswith(f"--draw {text}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random", "3"], "--random: name what is drawn"),
        (["--draw", "lr=log:1:2"], "--draw: give the number of draws by --random N"),
        (["--random", "3", "--draw", "lrr=log:1e-3:1"], "lrr.* did you mean lr"),
        (["--random", "3", "--draw", "dropout=uniform:2:3"], "dropout"),
        (["--random", "3", "--draw", "lr=log:1:2", "lr=log:1:2"], "lr is given already"),
        (
            ["--random", "3", "--draw", "order=choice:1,2", "--grid", "task_schedule=cycle"],
            "task_schedule is given already",
        ),
        (
            ["--random", "5001", "--draw", "lr=log:1:2", "--grid", "dropout=0,0.1"],
            "--random 5001: 10002 points; give at most 10000",
        ),
    ],
)
def test_a_random_search_that_is_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep.main(["demo", *options, "--out", str(tmp_path / "runs")])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_no_number_of_draws(count, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["demo", "--random", count, "--draw", "lr=log:1:2", "--out", "x"])
    assert "expected a whole number from 1 on" in capsys.readouterr().err
