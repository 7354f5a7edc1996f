"""Layers whose products, dropouts and norms are fused, and where they may not be."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import accelerate
from kernels.integrations import transformers_layers

from . import family_cases as cases

OPTIONS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},  # hidden states are wider than embeddings
    "distilbert": {"hidden_dim": 48},
    "nomic_bert": {},
}
KINDS = sorted(OPTIONS)
DROPOUTS = {
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout"),
    "nomic_bert": ("hidden_dropout_prob", "attention_dropout"),
}
# Norms in one pass with what is added before them; ALBERT's layers are one and the same.
FUSED = {"albert": 2 * 3, "distilbert": 2 * 3, "nomic_bert": 2 * 3}


def _model(kind: str, **options: Any) -> Any:
    return cases.model_of(kind, **OPTIONS[kind], **options)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect a number for every norm that is fused."""
    calls: list[int] = []
    fused = transformers_layers.dropout_add_layer_norm

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(transformers_layers, "dropout_add_layer_norm", counting)
    return calls


@pytest.mark.parametrize("mask", list(cases.MASKS))
@pytest.mark.parametrize("kind", KINDS)
def test_same_hidden_states_and_gradients(kind: str, mask: str) -> None:
    cases.assert_same(_model(kind), cases.inputs_of(mask))


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_of_a_layer_is_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(kind)
    accelerate(model)
    calls = _count(monkeypatch)
    model(**cases.inputs_of("right"))
    assert len(calls) == FUSED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_few_elements_are_torchs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 2**15)
    calls = _count(monkeypatch)
    cases.assert_same(_model(kind), cases.inputs_of("right"))
    cases.assert_same_task_gradients(_model(kind))
    assert not calls
    cases.assert_same_under_autocast(_model(kind), cases.inputs_of("right"))
    calls.clear()
    model = _model(kind).bfloat16()  # which torch's norm would round after each step
    accelerate(model)
    model(**cases.inputs_of("right"))
    assert calls


def test_dropout_of_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 2**15)
    x, residual = torch.randn(2, 1, 5, 8)
    drop, norm = transformers_layers.Dropout(0.5), transformers_layers.LayerNorm(8)
    for training in (True, False):
        torch.manual_seed(1)
        drop.train(training)
        found = transformers_layers.add_and_norm(x, residual, None, drop, norm)
        torch.manual_seed(1)
        dropped = nn.functional.dropout(x, 0.5, training)
        expected = nn.functional.layer_norm(residual + dropped, (8,), eps=norm.eps)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["albert", "distilbert"])
def test_a_chunked_feed_forward_stays_chunked(kind: str) -> None:
    """Eleven tokens a row, of which chunks of one are a divisor for every packing."""
    model = _model(kind, chunk_size_feed_forward=1)
    inputs = cases.inputs_of("right")
    sizes: list[int] = []
    accelerate(model)
    name = "ffn" if kind == "albert" else "lin1"
    for module_name, module in model.named_modules():
        if module_name.endswith(name) and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    assert set(sizes) == {1}
    expected = _model(kind)(**inputs).last_hidden_state
    cases.assert_same_hidden(found, expected, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_are_watched_or_replaced_are_called(kind: str) -> None:
    """A hook that changes outputs, on each module in turn, changes the model as it did before."""
    inputs = cases.inputs_of("right")
    names = [name for name, _ in _model(kind).named_modules() if "layer" in name]
    leaves = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
    for name in [n for n in leaves if ".1." not in n and ".2." not in n]:
        model = _model(kind)
        hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: output * 1.5)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            accelerate(model)
            cases.assert_same_hidden(model(**inputs).last_hidden_state, expected, inputs)
        hook.remove()


class _Adapter(nn.Module):
    """What stands for a linear layer that is adapted: it is one no more."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * x[..., : self.base.out_features].roll(1, -1)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("albert", ["query", "dense", "ffn_output"]),
        ("distilbert", ["q_lin", "out_lin", "lin2"]),
    ],
)
def test_adapters_are_called(kind: str, names: list[str]) -> None:
    model = _model(kind)
    for parent in list(model.modules()):
        for name in names:
            if isinstance(getattr(parent, name, None), nn.Linear):
                setattr(parent, name, _Adapter(getattr(parent, name)))
    cases.assert_same(model, cases.inputs_of("right"))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_all_layers(kind: str) -> None:
    cases.assert_same_hidden_states_of_all_layers(_model(kind), cases.inputs_of("both"))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_outputs(kind: str) -> None:
    cases.assert_same_packed_outputs(_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    cases.assert_same_under_autocast(_model(kind), cases.inputs_of("right"))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["distilbert", "nomic_bert"])  # ALBERT has no checkpoints
def test_checkpointed_layers(kind: str, use_reentrant: bool) -> None:
    model = _model(kind, **dict.fromkeys(DROPOUTS[kind], 0.0))
    cases.assert_same_with_checkpointed_layers(model, cases.inputs_of("both"), use_reentrant)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_accelerated(kind: str) -> None:
    cases.assert_copies_stay_accelerated(_model(kind), cases.inputs_of("left"))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_mode_of_the_model(kind: str) -> None:
    model = _model(kind, **dict.fromkeys(DROPOUTS[kind], 0.3))
    accelerate(model)
    inputs = cases.inputs_of("right")
    with torch.no_grad():
        train = [model.train()(**inputs).last_hidden_state for _ in range(2)]
        evaluation = [model.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*evaluation)


@pytest.mark.parametrize("kind", KINDS)
def test_task_gradients(kind: str) -> None:
    cases.assert_same_task_gradients(_model(kind))


@pytest.mark.parametrize("bound", [0, 2**15])
def test_dropout_of_everything(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", bound)
    x, residual = torch.randn(2, 1, 5, 8)
    drop, norm = transformers_layers.Dropout(1.0), transformers_layers.LayerNorm(8)
    found = transformers_layers.add_and_norm(x, residual, nn.Linear(8, 8), drop, norm)
    torch.testing.assert_close(found, nn.functional.layer_norm(residual, (8,), eps=norm.eps))
