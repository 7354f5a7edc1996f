"""Balancing inside the step: every method, its settings, what it remembers."""

import pytest
import torch

import kernels
from engine.gradients.balancing import METHODS, BalancerInput, BalanceSettings, build_method
from engine.utils.errors import InputError
from kernels import balancing

from ..small_models import SEED, TASKS, TRAINED, build_step

LR = 1e-3
SEED_OF_STEP = torch.tensor(SEED << 32)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(make_model, make_batch, name):
    step = build_step(make_model(dropout=0.1).train(), balance=name)
    before = step.parameters.master.clone()
    for number in range(3):
        report = step(make_batch(seed=number), number, LR)
        assert torch.isfinite(report.weights).all()
        assert report.skipped == 0
    assert torch.isfinite(step.parameters.master).all()
    assert not torch.equal(before, step.parameters.master)


def test_weights_are_those_of_the_reported_gram(make_model, make_batch):
    settings = BalanceSettings(
        fixed={"sts": 0.25}, main="quora", aux_weight=0.1, cagrad_c=0.2, fairgrad_alpha=2.0
    )
    order = kernels.draw_order(3, torch.tensor(SEED << 32))
    expected = {
        "sum": balancing.sum,
        "mean": balancing.mean,
        "fixed": lambda _: torch.tensor([1.0, 1.0, 0.25]),
        "proportional": lambda _: torch.tensor([50.0, 30.0, 40.0]) / 120,
        "pcgrad": lambda gram: kernels.pcgrad_weights(gram, order),
        "main_aux": lambda gram: balancing.main_aux(gram, 1, 0.1),
        "cagrad": lambda gram: balancing.cagrad(gram, 0.2),
        "fairgrad": lambda gram: balancing.fairgrad(gram, 2.0),
        "gradvac": lambda gram: balancing.gradvac(gram, order, torch.zeros(3, 3)).weights,
        "torchjd.MeanWeighting": balancing.mean,
    }
    for name, weigh in expected.items():
        if name.startswith("torchjd"):
            pytest.importorskip("torchjd")
        step = build_step(make_model().train(), balance=name, settings=settings)
        report = step(make_batch(), 0, LR)
        torch.testing.assert_close(report.weights, weigh(report.gram), msg=name)


def test_settings_of_methods_are_their_arguments(make_model, make_batch):
    settings = BalanceSettings(
        preferences={"quora": 2.0, "sts": 0.0},
        aligned_mtl_scale_mode="rmse",
        nash_mtl_max_norm=0.5,
        cagrad_c=2.0,
    )
    given = torch.tensor([1.0, 2.0, 0.0])
    expected = {
        "upgrad": lambda gram: balancing.upgrad(gram, given / 3),
        "dual_projection": lambda gram: balancing.dual_projection(gram, given / 3),
        "config": lambda gram: balancing.config(gram, given),
        "aligned_mtl": lambda gram: balancing.aligned_mtl(gram, given / 3, "rmse"),
        "nash_mtl": lambda gram: balancing.nash_mtl(gram, 0.5),
        "cagrad": lambda gram: balancing.cagrad(gram, 2.0),
    }
    for name, weigh in expected.items():
        report = build_step(make_model().train(), balance=name, settings=settings)(
            make_batch(), 0, LR
        )
        torch.testing.assert_close(report.weights, weigh(report.gram), msg=name)
        plain = build_method(name, TRAINED, BalanceSettings()).decide(
            BalancerInput(report.gram, torch.zeros(3, 3), report.losses, {}, SEED_OF_STEP)
        )
        assert not torch.allclose(plain.weights, report.weights), name


def test_equal_preferences_are_the_default():
    gram = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    inputs = BalancerInput(gram @ gram.T, torch.zeros(3, 3), torch.ones(3), {}, SEED_OF_STEP)
    equal = BalanceSettings(preferences=dict.fromkeys(TASKS, 1.0))
    for name in ("upgrad", "dual_projection", "config", "aligned_mtl"):
        plain, same = (
            build_method(name, TRAINED, settings).decide(inputs).weights
            for settings in (BalanceSettings(), equal)
        )
        torch.testing.assert_close(plain, same, msg=name)


def test_gradvac_remembers_cosines(make_model, make_batch):
    step = build_step(make_model().train(), balance="gradvac")
    targets = torch.zeros(3, 3)
    for number in range(3):
        report = step(make_batch(seed=number), number, LR)
        order = kernels.draw_order(3, torch.tensor((SEED << 32) + number))
        weights, targets = balancing.gradvac(report.gram, order, targets)
        torch.testing.assert_close(report.weights, weights)
        torch.testing.assert_close(step.balancer.state["targets"][0], targets)
    assert (targets != 0).any()


def test_gradnorm_starts_from_equal_weights_and_the_first_losses(make_model, make_batch):
    step = build_step(make_model().train(), balance="gradnorm")
    first = step(make_batch(seed=0), 0, LR)
    assert torch.equal(step.balancer.state["first_losses"][0], first.losses)
    second = step(make_batch(seed=1), 1, LR)
    expected = balancing.gradnorm(second.gram, first.weights, second.losses / first.losses)
    torch.testing.assert_close(second.weights, expected)


def test_gradnorm_forgets_nothing_where_a_loss_has_no_ratio(make_model) -> None:
    """A negative one: its weights are none, and the next step begins from those before."""
    balance = build_step(make_model().train(), balance="gradnorm").balancer
    order = torch.arange(3).repeat(3, 1)
    for losses in ([1.0, 1.0, 1.0], [0.5, 2.0, 1.0]):
        balance(torch.eye(3)[None], order, torch.tensor(losses), SEED_OF_STEP)
    before = balance.state["weights"].clone()
    negative = torch.tensor([-1.0, 1.0, 1.0])
    assert balance(torch.eye(3)[None], order, negative, SEED_OF_STEP).isnan().all()
    assert torch.equal(balance.state["weights"], before)


OF_LOSSES = {
    "uw": lambda *inputs: balancing.uw(*inputs, lr=0.5),
    "dwa": lambda *inputs: balancing.dwa(*inputs, temperature=0.5, window=1),
    "imtl_l": lambda *inputs: balancing.imtl_l(*inputs, lr=0.5),
    "imtl": lambda *inputs: balancing.imtl(*inputs, lr=0.5),
    "stch": lambda *inputs: balancing.stch(*inputs, mu=0.3, warmup=2),
    "famo": lambda *inputs: balancing.famo(*inputs, lr=0.5, gamma=0.1),
    "gls": lambda gram, losses, _: (balancing.gls(gram, losses), ()),
    "db_mtl": lambda gram, losses, _: (balancing.db_mtl(gram, losses), ()),
}
OTHERWISE = BalanceSettings(
    uw_lr=0.5,
    dwa_temperature=0.5,
    dwa_window=1,
    imtl_lr=0.5,
    stch_mu=0.3,
    stch_warmup=2,
    famo_lr=0.5,
    famo_gamma=0.1,
)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("name", OF_LOSSES)
def test_methods_of_losses_get_those_whose_gradients_are_balanced(
    make_model, make_batch, name, granularity
):
    """The losses times the tasks' weights; settings are the functions' arguments."""
    factors = (1.0, 3.0, 0.25)
    step = build_step(
        make_model().train(),
        balance=name,
        settings=OTHERWISE,
        loss_weights=factors,
        surgery=granularity,
    )
    balance, seen = step.balancer, []

    def watch(*inputs):
        seen.append((inputs[0], balance(*inputs)))
        return seen[-1][1]

    step.balancer = watch
    sole_tasks = step.groups.sole_tasks
    states = [None] * len(sole_tasks)
    for number in range(4):
        losses = step(make_batch(seed=number), number, LR).losses * torch.tensor(factors)
        grams, weights = seen[-1]
        for group, sole in enumerate(sole_tasks):
            if sole is None:
                expected, states[group] = OF_LOSSES[name](grams[group], losses, states[group])
                torch.testing.assert_close(weights[group], expected)
    for key, tensor in balance.state.items():
        shared = sole_tasks.index(None)
        torch.testing.assert_close(tensor[shared], getattr(states[shared], key))


def test_random_weights_follow_from_the_seed_and_the_step(make_model, make_batch):
    step = build_step(make_model().train(), balance="rlw")
    for number in (0, 1, 5):
        report = step(make_batch(seed=number), number, LR)
        assert torch.equal(report.weights, balancing.rlw(report.gram, (SEED << 32) + number))


STATEFUL = sorted(
    name for name in METHODS if build_method(name, TRAINED, BalanceSettings()).initial_state
)


def test_methods_with_a_state():
    others = {"gradvac", "gradnorm", *(OF_LOSSES.keys() - {"gls", "db_mtl"})}
    assert sorted(others) == STATEFUL


@pytest.mark.parametrize("name", STATEFUL)
def test_a_skipped_step_leaves_no_trace_in_what_is_remembered(make_model, make_batch, name):
    step = build_step(make_model().train(), balance=name)
    step(make_batch(seed=0), 0, LR)
    before = {key: tensor.clone() for key, tensor in step.balancer.state.items()}
    batch = make_batch(seed=1)
    batch.labels[2].fill_(torch.nan)
    assert step(batch, 1, LR).skipped == 1
    for key, tensor in step.balancer.state.items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", STATEFUL)
def test_one_groups_infinite_gradient_leaves_no_trace_in_the_others(make_model, name):
    """The step is skipped as a whole, whether one task uses that group or all do."""
    balance = build_step(make_model().train(), balance=name, surgery="layer").balancer
    groups = len(next(iter(balance.state.values())))
    order, losses = torch.arange(3).repeat(3, 1), torch.tensor([1.0, 2.0, 3.0])
    usual = torch.diag(torch.tensor([1.0, 4.0, 9.0])).repeat(groups, 1, 1) + 0.1
    for factor in (1.0, 0.5):
        balance(usual, order, factor * losses, SEED_OF_STEP)
    before = {key: tensor.clone() for key, tensor in balance.state.items()}
    for group in range(groups):
        grams = usual.clone()
        grams[group, 0, 0] = torch.inf
        balance(grams, order, 0.1 * losses, SEED_OF_STEP)
        for key, tensor in balance.state.items():
            assert torch.equal(tensor, before[key]), (group, key)
    balance(usual, order, 0.1 * losses, SEED_OF_STEP)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in balance.state.items())


def test_a_loss_that_is_not_finite_is_not_remembered(make_model):
    """Its gradient may be finite all the same."""
    balance = build_step(make_model().train(), balance="gradnorm").balancer
    gram = torch.eye(3).expand(1, 3, 3)
    for losses in ([1.0, torch.nan, 1.0], [torch.inf, 1.0, 1.0]):
        balance(gram, torch.arange(3).expand(3, 3), torch.tensor(losses), SEED_OF_STEP)
        assert torch.equal(balance.state["first_losses"], torch.zeros(1, 3))
        assert torch.equal(balance.state["weights"], torch.ones(1, 3))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("main_aux", {"main": "cfimdb"}, "balancing.main: 'cfimdb' is no trained task"),
        ("fixed", {"fixed": {"qqp": 1.0}}, "balancing.fixed: 'qqp' is no trained task"),
        ("upgrad", {"preferences": {"qqp": 1.0}}, "balancing.preferences: 'qqp' is no trained"),
        ("krum", {"krum_byzantine": 1}, "3 tasks are too few"),
        ("krum", {"krum_selected": 4}, "3 tasks are too few"),
    ],
)
def test_settings_that_do_not_fit_the_tasks(name, settings, message):
    assert len(TASKS) == 3
    with pytest.raises(InputError, match=message):
        build_method(name, TRAINED, BalanceSettings(**settings))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("UPGrad", "TorchJD has no such weighting"),  # an aggregator, of the gradients themselves
        ("NoSuchWeighting", "TorchJD has no such weighting"),
        ("CAGradWeighting", ".*missing 1 required positional argument: 'c'"),
        ("Weighting", ".*abstract class"),
        ("ExcessMTLWeighting", "it keeps a state between steps"),
        ("GradVacWeighting", "it keeps a state between steps"),
    ],
)
def test_torchjd_names_that_cannot_be_used(name, reason):
    """The line lists those that can, and every one of them can."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    with pytest.raises(InputError, match=f"^balance torchjd.{name}: {reason}") as error:
        build_method(f"torchjd.{name}", TRAINED, BalanceSettings())
    listed = str(error.value).rpartition("; take one of ")[2].split(", ")
    assert set(listed) >= {"UPGradWeighting", "MeanWeighting", "MGDAWeighting"}
    order, losses = torch.arange(3).expand(3, 3), torch.ones(3)
    for other in vars(aggregation):
        if not other.endswith("Weighting"):
            continue
        try:
            method = build_method(f"torchjd.{other}", TRAINED, BalanceSettings())
        except InputError:
            assert other not in listed
            continue
        inputs = BalancerInput(torch.eye(3), order, losses, {}, SEED_OF_STEP)
        weights = method.decide(inputs).weights
        assert other in listed
        assert weights.shape == (3,)
