"""ModernBERT on packed tokens: layers with a window, its feed-forward network, configs, heads."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert

import kernels
from kernels import accelerate, restore
from kernels.integrations import layer_norm_compat, transformers_layers, transformers_modernbert

from .transformers_cases import (
    MASKS,
    SEQUENCES,
    VARIANTS,
    assert_accelerated_runs_are_the_same,
    assert_close,
    assert_same_gradients,
    base_model,
    batch,
    gradients_of,
    head_model,
)


# Five places see each other through the window of 4 on each side, six do not; and both sides of 8,
# of a window with its own place, 9, and of two of them.
@pytest.mark.parametrize("length", [5, 6, 7, 8, 9, 10, 16, 17, 18, 19, 23])
def test_rows_of_other_lengths(length: int) -> None:
    assert_accelerated_runs_are_the_same(base_model("modernbert"), length=length)


class Calls(NamedTuple):
    """Windows that the packed attention was given, and calls of the padded one."""

    windows: list[tuple[int, int]]
    padded: list[int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    noted = Calls([], [])
    packed, padded = (
        transformers_layers.flash_attn_varlen_func,
        transformers_layers.windowed_attention,
    )

    def attend(*arguments: Any, **options: Any) -> Any:
        noted.windows.append(arguments[10])
        return packed(*arguments, **options)

    def attend_padded(*arguments: Any) -> Any:
        noted.padded.append(arguments[3])
        return padded(*arguments)

    monkeypatch.setattr(transformers_layers, "flash_attn_varlen_func", attend)
    monkeypatch.setattr(transformers_layers, "windowed_attention", attend_padded)
    return noted


@pytest.mark.parametrize(("name", "window"), [("wide", (-1, -1)), ("narrower", (9, 9))])
def test_a_window_wider_than_the_batch(name: str, window: tuple[int, int], calls: Calls) -> None:
    """Is no window: ten places to each side of eleven."""
    kind, options = VARIANTS[f"ModernBERT of {name} windows"]
    model = base_model(kind, **options)
    accelerate(model)
    model(**batch(model, "right"))
    assert calls == Calls([(-1, -1), window], [])


@pytest.mark.parametrize("case", MASKS)
def test_places_between_tokens_count(case: str, calls: Calls) -> None:
    """Where there are any, local layers are computed on padded tensors, and only there.

    The first place is computed where it is padding, too, so that padding on the left is between.
    """
    model = base_model("modernbert")
    accelerate(model)
    model(**batch(model, case))
    has_gaps = case in ("left", "both", "between", "empty row", "one token")
    windows = [(-1, -1)] if has_gaps else [(-1, -1), (4, 4)]
    assert calls == Calls(windows, [4] * has_gaps)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("length", [127, 128, 129, 256, 257])
def test_lengths_at_the_edges_of_a_models_window(length: int, packed: bool) -> None:
    """Of 128, as the published models have it: each query sees 64 tokens to each side."""
    options = {"local_attention": 128, "max_position_embeddings": 300}
    model = base_model("modernbert", **options)
    lengths = (length, 70, length - 1)
    ids = torch.randint(4, 50, (3, length))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask}
    expected = model(**given).last_hidden_state[mask.bool()]
    (expected * torch.linspace(-1, 1, expected.shape[-1])).sum().backward()
    gradients = gradients_of(model)
    model.zero_grad()
    accelerate(model)
    if packed:
        boundaries = torch.tensor((0, *lengths)).cumsum(0).int()
        given = {
            "input_ids": ids[mask.bool()][None],
            **{"cu_seq_lens_q": boundaries, "max_length_q": length},
        }
    found = model(**given).last_hidden_state
    found = found[0] if packed else found[mask.bool()]
    (found * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
    assert_close(found, expected)
    assert_same_gradients(gradients_of(model), gradients)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_inputs_under_a_head_that_pools(pooling: str) -> None:
    """A mean needs a mask, which they do not have."""
    name = "ModernBertForSequenceClassification"
    model = head_model("modernbert", name, classifier_pooling=pooling)
    accelerate(model)
    boundaries = torch.tensor((0, *SEQUENCES)).cumsum(0).int()
    given = {
        "input_ids": torch.full((1, sum(SEQUENCES)), 7),
        "cu_seq_lens_q": boundaries,
        "max_length_q": max(SEQUENCES),
    }
    if pooling == "mean":
        with pytest.raises(ValueError, match="packed inputs are refused under this head"):
            model(**given)
    else:
        assert model(**given).logits.shape == (len(SEQUENCES), 2)


def test_masks_of_the_callers_own_are_refused() -> None:
    model = base_model("modernbert")
    accelerate(model)
    mask = {"full_attention": None}
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(**batch(model, "none") | {"attention_mask": mask})


# ---- the feed-forward network -------------------------------------------------------------------


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of this package's gated GELU."""
    calls: list[dict[str, Any]] = []
    own = transformers_modernbert.geglu

    def noting(x: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return own(x, **options)

    monkeypatch.setattr(transformers_modernbert, "geglu", noting)
    return calls


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def assert_same_behind(model: Any) -> None:
    """Accelerated, a model gives what it gave before."""
    inputs = batch(model, "none")
    expected = hidden_states(model, inputs)
    accelerate(model)
    torch.testing.assert_close(hidden_states(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_feed_forward_network_takes_its_activation_in_one_pass(gated: list) -> None:
    model = base_model("modernbert")
    assert_same_behind(model)
    assert [options["training"] for options in gated] == [False] * len(model.layers)
    restore(model)
    assert type(model.layers[0].mlp) is modeling_modernbert.ModernBertMLP
    hidden_states(model, batch(model, "none"))
    assert len(gated) == len(model.layers)


def test_dropout_of_a_feed_forward_network(gated: list) -> None:
    """The module's own rate and mode, and the bits of a dropout behind."""
    model = base_model("modernbert", mlp_dropout=0.25)
    accelerate(model)
    mlp, x = model.layers[0].mlp.train(), torch.randn(1, 9, 32)
    torch.manual_seed(3)
    found = mlp(x)
    assert gated == [{"dropout_p": 0.25, "training": True}]
    torch.manual_seed(3)
    expected = mlp.Wo(kernels.dropout(kernels.geglu(mlp.Wi(x)), 0.25))
    assert torch.equal(found, expected)
    mlp.drop.eval()
    assert torch.equal(mlp(x), mlp.Wo(kernels.geglu(mlp.Wi(x))))


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "silu", "gelu_python", "relu"])
def test_other_activations_are_transformers_own(name: str, gated: list) -> None:
    assert_same_behind(base_model("modernbert", hidden_activation=name))
    assert not gated


@pytest.mark.parametrize("part", ["mlp", "mlp.Wi", "mlp.Wo", "mlp.act", "mlp.drop", "mlp_norm"])
def test_parts_with_hooks_are_called(part: str, gated: list) -> None:
    model = base_model("modernbert")
    hooked = model.layers[1].get_submodule(part)
    hooked.register_forward_hook(lambda _m, _a, output: output * 1.5)
    assert_same_behind(model)
    assert len(gated) == (1 if part in ("mlp.act", "mlp.drop") else 2)


class Adapter(nn.Module):
    """A linear layer with a product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["Wi", "Wo"])
def test_adapters_and_parametrised_weights_are_called(name: str, gated: list) -> None:
    model = base_model("modernbert")
    first, second = (layer.mlp for layer in model.layers)
    setattr(first, name, Adapter(getattr(first, name)))
    nn.utils.parametrizations.weight_norm(getattr(second, name))
    assert_same_behind(model)
    assert len(gated) == 2


def test_few_elements_are_torchs(monkeypatch: pytest.MonkeyPatch, gated: list) -> None:
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 2**15)
    assert_same_behind(base_model("modernbert"))
    assert not gated


def test_every_norm_is_this_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no bias: that of embeddings, two of a layer but for the first, and the last."""
    biases: list[Tensor | None] = []
    norm = layer_norm_compat.layer_norm

    def noting(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        biases.append(bias)
        return norm(x, weight, bias, eps)

    add_norm = transformers_modernbert.dropout_add_layer_norm

    def noting_sum(*arguments: Any, **options: Any) -> Any:
        biases.append(arguments[3])
        return add_norm(*arguments, **options)

    monkeypatch.setattr(layer_norm_compat, "layer_norm", noting)
    monkeypatch.setattr(transformers_modernbert, "dropout_add_layer_norm", noting_sum)
    model = base_model("modernbert")
    assert_same_behind(model)
    assert biases == [None] * (2 * len(model.layers) + 1)


def test_a_norm_behind_attention_that_is_not_plain_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a hook or a class of its own; the next one still takes the residual in its pass."""
    sums: list[Any] = []
    add_norm = transformers_modernbert.dropout_add_layer_norm

    def noting(*arguments: Any, **options: Any) -> Any:
        sums.append(arguments)
        return add_norm(*arguments, **options)

    monkeypatch.setattr(transformers_modernbert, "dropout_add_layer_norm", noting)
    model = base_model("modernbert")
    called: list[Tensor] = []
    norm = model.layers[0].mlp_norm
    norm.register_forward_hook(lambda _module, _inputs, out: called.append(out))
    assert_same_behind(model)
    assert len(called) == 2
    assert len(sums) == len(model.layers) - 1
