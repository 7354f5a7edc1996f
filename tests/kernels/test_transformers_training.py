"""An accelerated model in training: dtypes, checkpoints, several calls, modes, LoRA, hooks."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask

from kernels import accelerate, restore

from .tolerance import assert_within_twice
from .transformers_cases import (
    KINDS,
    SIZES,
    assert_close,
    assert_same_gradients,
    assert_same_outputs,
    base_model,
    batch,
    gradients_of,
    head_model,
    input_ids,
    mask_of,
    places,
    run,
)

CASES = ("left", "none")


def runs(model: PreTrainedModel) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return {case: run(model, batch(model, case), places(model, case)) for case in CASES}


def assert_same_runs(model: PreTrainedModel, expected: dict[str, Any]) -> None:
    found = runs(model)
    for case in CASES:
        assert_same_outputs(found[case][0], expected[case][0], places(model, case), case)
        assert_same_gradients(found[case][1], expected[case][1], case)


# ---- what is replaced ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_of_a_model(kind: str) -> None:
    """Parameters and their names, modules, names of classes, signatures; all comes back."""
    model = base_model(kind)
    norms = [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]
    types = {name: type(module) for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    signatures = {name: inspect.signature(x.forward) for name, x in modules.items()}
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    model.train()
    report = accelerate(model)
    assert report.attention == ("",)
    assert sorted(report.layer_norms) == sorted(norms)
    assert model.training
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(modules[name] is module for name, module in model.named_modules())
    exchanged = [name for name, module in modules.items() if type(module) is not types[name]]
    assert len(exchanged) > len(norms) + 2
    for name, module in modules.items():
        own = types[name]
        if own not in (nn.LayerNorm, nn.Dropout):
            assert type(module).__name__ == own.__name__
            assert type(module).__module__ == own.__module__
            assert inspect.signature(module.forward) == signatures[name]
        assert isinstance(module, own)
    restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert not any("packed" in name for module in modules.values() for name in vars(module))


def test_tied_weights_stay_tied() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES))
    accelerate(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.tie_weights()
    model.resize_token_embeddings(64)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model(torch.full((1, 3), 63)).logits.shape == (1, 3, 64)


def test_parameters_that_were_exchanged_stay() -> None:
    model, other = base_model("bert"), base_model("bert")
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(2)
    expected = runs(other)
    accelerate(model)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_same_runs(model, expected)
    restore(model)
    assert torch.equal(
        runs(model)["left"][0]["pooler_output.0"], expected["left"][0]["pooler_output.0"]
    )


def test_a_model_inside_another_and_without_a_mask() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BertForSequenceClassification(BertConfig(**SIZES)).eval()

    holder = Holder()
    ids = input_ids(holder.inner, "none")
    expected = holder.inner(input_ids=ids).logits
    report = accelerate(holder)
    assert "inner.bert.embeddings.LayerNorm" in report.layer_norms
    torch.testing.assert_close(holder.inner(input_ids=ids).logits, expected)
    restore(holder)
    assert torch.equal(holder.inner(input_ids=ids).logits, expected)


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to accelerate"):
        accelerate(nn.Sequential(nn.LayerNorm(4)))
    model = BertModel(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="not accelerated"):
        restore(model)
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with pytest.raises(ValueError, match="cross attention"):
        accelerate(BertModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)))


def test_other_masks_are_refused() -> None:
    decoder = head_model("bert", "BertLMHeadModel")
    accelerate(decoder)
    with pytest.raises(ValueError, match="masks other than padding and causality"):
        create_causal_mask(
            *(decoder.config, torch.zeros(3, 11, 32), None, None),
            or_mask_function=lambda batch, head, query, key: key == 0,
        )


# ---- dtypes -------------------------------------------------------------------------------------


def assert_gradients_within_twice(
    found: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The 2x rule by norms; one rounding of the largest gradient is allowed besides."""
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        allowed = 2 * (torchs[name].double() - gradient).norm()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * largest
        assert (found[name].double() - gradient).norm() <= max(allowed, rounding), name


def assert_runs_within_twice(
    model: PreTrainedModel, case: str, prepare: Callable[[nn.Module], object], under: Any
) -> None:
    """Compare with transformers in the dtype of a context or of the model, both with float64."""
    where = places(model, case)
    exact, exact_gradients = run(model.double(), batch(model, case), where)
    prepare(model.float())

    def in_dtype() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with under():
            return run(model, batch(model, case), where)

    expected, expected_gradients = in_dtype()
    accelerate(model)
    found, found_gradients = in_dtype()
    for name, value in exact.items():
        assert found[name].dtype == expected[name].dtype
        kept = where.computed if value.dim() == 3 else slice(None)
        assert_within_twice(found[name][kept], expected[name][kept], value[kept])
    assert_gradients_within_twice(found_gradients, expected_gradients, exact_gradients)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# xmod's adapters fail without us there, too.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "xmod"])
def test_under_autocast(kind: str) -> None:
    """Nomic's queries and keys are float32 there, from its rotation, and its values bfloat16."""
    for case in CASES:
        assert_runs_within_twice(base_model(kind), case, lambda model: model, autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_dtypes_of_16_bits(kind: str, dtype: torch.dtype) -> None:
    for case in CASES:
        assert_runs_within_twice(
            base_model(kind), case, lambda model: model.to(dtype), torch.enable_grad
        )


def test_span_logits_of_16_bits() -> None:
    model = head_model("bert", "BertForQuestionAnswering").half()
    accelerate(model)
    logits = model(**batch(model, "left")).start_logits
    assert logits.dtype == torch.float16
    assert (logits[mask_of("left") == 0] == torch.finfo(torch.float16).min).all()


# ---- checkpoints, modes, several calls ----------------------------------------------------------


def checkpoint(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Of two names, transformers 5.17 has the second and later versions warn of it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(model, next(name for name in names if hasattr(model, name)))
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_with_checkpointed_layers(kind: str, use_reentrant: bool) -> None:
    model = base_model(kind)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{kind} has no checkpoints")
    expected = runs(model)
    accelerate(model)
    checkpoint(model, use_reentrant)
    model.train()  # dropout's p is 0
    assert_same_runs(model, expected)


def test_under_autocast_and_with_checkpointed_layers() -> None:
    for use_reentrant in (True, False):
        assert_runs_within_twice(
            base_model("bert"),
            "left",
            lambda model, reentrant=use_reentrant: checkpoint(model.train(), reentrant),
            autocast,
        )


def dropouts() -> list[tuple[str, str]]:
    """Every dropout of every family's encoder, by the name of its probability in the config."""
    of_heads = ("classifier", "pooler", "qa", "seq_classif", "summary")
    return [
        (kind, name)
        for kind in KINDS
        for name, value in vars(AutoConfig.for_model(kind)).items()
        if "dropout" in name and value is not None and not name.startswith(of_heads)
    ]


@pytest.mark.parametrize(("kind", "name"), dropouts())
def test_dropout_follows_the_mode_of_the_model(kind: str, name: str) -> None:
    model = base_model(kind, **{name: 0.3})
    accelerate(model)
    arguments = batch(model, "right")
    train = [model.train()(**arguments)[0] for _ in range(2)]
    assert not torch.equal(*train)
    evaluation = [model.eval()(**arguments)[0] for _ in range(2)]
    assert torch.equal(*evaluation)
    torch.manual_seed(5)
    first = model.train()(**arguments)[0]
    torch.manual_seed(5)
    assert torch.equal(model(**arguments)[0], first)


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2"])
def test_dropout_of_probabilities_by_its_own_mode(kind: str) -> None:
    """As transformers' layers there call it; what is put in its place drops nothing."""
    model = base_model(kind, attention_probs_dropout_prob=0.3)
    accelerate(model)
    arguments = batch(model, "right")

    def spread() -> float:
        one, other = (model(**arguments)[0] for _ in range(2))
        return (one - other).abs().max().item()

    names = ("attn.dropout", "self.dropout")
    drops = [module for name, module in model.named_modules() if name.endswith(names)]
    assert len(drops) == 2
    for drop in drops:
        drop.train()
    assert spread() > 0
    model.train()
    for drop in drops:
        drop.eval()
    assert spread() == 0
    model.train()
    for module in model.modules():
        if getattr(module, "dropout", None) in drops:
            module.dropout = nn.Identity()
    assert spread() == 0


def test_dropout_drops_as_often_as_it_says() -> None:
    model = BertModel(BertConfig(**SIZES | {"hidden_dropout_prob": 0.3}))
    accelerate(model)
    seen: list[Tensor] = []
    model.embeddings.dropout.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.train()(torch.full((20, 20), 7))
    dropped = (seen[0] == 0).float().mean().item()
    deviation = (0.3 * 0.7 / seen[0].numel()) ** 0.5
    assert abs(dropped - 0.3) < 5 * deviation


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind: str) -> None:
    model = base_model(kind)
    arguments = batch(model, "left")
    expected = model(**arguments)[0].detach()
    accelerate(model)
    where = places(model, "left").computed
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model(**arguments)[0]
        assert not found.requires_grad
        assert_close(found[where], expected[where])
    with torch.inference_mode():
        packed = model(arguments["input_ids"][:1, -4:], cu_seq_lens_q=torch.tensor([0, 4]))[0]
    assert packed.shape == (1, 4, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_several_calls_in_one_graph(kind: str) -> None:
    model = base_model(kind)

    def both() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for case in ("left", "right", "none"):
            hidden = model(**batch(model, case))[0]
            losses.append(hidden[places(model, case).computed].double().square().mul(0.1).sum())
        torch.stack(losses).sum().backward()
        return gradients_of(model)

    expected = both()
    accelerate(model)
    assert_same_gradients(both(), expected)


def test_some_parameters_are_frozen() -> None:
    model = base_model("bert")

    def freeze(model: nn.Module) -> None:
        model.embeddings.requires_grad_(False)
        model.encoder.layer[0].requires_grad_(False)
        model.encoder.layer[1].attention.self.key.weight.requires_grad_(False)
        model.encoder.layer[1].output.LayerNorm.bias.requires_grad_(False)
        model.encoder.layer[1].output.dense.weight.requires_grad_(False)

    freeze(model)
    expected = runs(model)
    accelerate(model)
    assert_same_runs(model, expected)


def test_second_derivatives_are_refused() -> None:
    model = base_model("bert")
    accelerate(model)
    embedded = torch.randn(2, 5, 32, requires_grad=True)
    loss = model(inputs_embeds=embedded)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate|second derivative"):
        gradient.square().sum().backward()


# ---- modules of a user's ------------------------------------------------------------------------


def test_hooks_are_called_once() -> None:
    """Those of linear layers, norms, dropouts, attention and layers, with what they change."""
    model = base_model("bert")
    modules = dict(model.named_modules())
    hooked = [
        name for name, module in modules.items() if name and type(module) is not nn.ModuleList
    ]
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    expected = runs(model)
    accelerate(model)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handles = [getattr(modules[name], register)(count(name)) for name in hooked]
        calls.clear()
        model.train()(**batch(model, "right"))
        # A layer's attention probabilities are never made, so that their dropout is not called.
        silent = {name for name in hooked if name.endswith("attention.self.dropout")}
        assert calls == dict.fromkeys(set(hooked) - silent, 1)
        assert_same_runs(model.eval(), expected)
        for handle in handles:
            handle.remove()
    assert_same_runs(model, expected)


PARTS = ("attention.self.query", "attention.self", "attention.output.dense", "output.LayerNorm")


@pytest.mark.parametrize("part", [*PARTS, "output"])
def test_what_hooks_change(part: str) -> None:
    model = base_model("bert")
    layer = model.encoder.layer[0].get_submodule(part)

    def double(_module: nn.Module, _inputs: object, out: Any) -> Any:
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    layer.register_forward_hook(double)
    expected = runs(model)
    accelerate(model)
    assert_same_runs(model, expected)


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
def test_backward_hooks(kind: str) -> None:
    model = base_model("bert")
    accelerate(model)
    calls: list[str] = []
    for name in ("query", "dense", "LayerNorm"):
        module = next(m for n, m in model.named_modules() if n.endswith(name))
        getattr(module, f"register_{kind}_hook")(lambda *_, name=name: calls.append(name))
    run(model, batch(model, "right"), places(model, "right"))
    assert sorted(calls) == ["LayerNorm", "dense", "query"]


class LowRank(nn.Module):
    """A linear layer with a low-rank update, as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


class WidenedLinear(nn.Linear):
    """A linear layer of a class of its own, as quantized ones are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


WITH_QUERIES = [
    kind for kind in KINDS if any(n.endswith("query") for n, _ in base_model(kind).named_modules())
]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("names", [("query", "value"), ("query", "key", "value", "dense")])
@pytest.mark.parametrize("kind", WITH_QUERIES)
def test_adapters(kind: str, names: tuple[str, ...], before: bool) -> None:
    """Linear layers within, whether they are replaced before or after `accelerate`."""
    plain, model = base_model(kind), base_model(kind)

    def adapt(model: nn.Module) -> None:
        torch.manual_seed(6)
        model.requires_grad_(False)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if name in names and type(child) is nn.Linear:
                    setattr(module, name, LowRank(child))

    adapt(plain)
    expected = runs(plain)
    if before:
        adapt(model)
    accelerate(model)
    if not before:
        adapt(model)
    found = runs(model)
    assert any("down" in name for name in found["left"][1])
    for case in CASES:
        assert_same_outputs(found[case][0], expected[case][0], places(model, case), case)
        assert_same_gradients(found[case][1], expected[case][1], case)


def test_linear_layers_of_other_classes_and_parametrized_ones() -> None:
    for change in ("class", "weight norm", "spectral norm", "no bias"):
        model = base_model("bert")
        attention, output = model.encoder.layer[0].attention.self, model.encoder.layer[0].output
        if change == "class":
            attention.key.__class__ = output.dense.__class__ = WidenedLinear
        elif change == "weight norm":
            nn.utils.parametrizations.weight_norm(attention.value)
            nn.utils.parametrizations.weight_norm(output.dense)
        elif change == "spectral norm":
            nn.utils.parametrizations.spectral_norm(attention.query)
        else:
            attention.query.bias = None
            output.dense.bias = None
        expected = runs(model)
        accelerate(model)
        assert_same_runs(model, expected)


def test_a_layer_norm_without_weights() -> None:
    model = base_model("bert")
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
    model.encoder.layer[1].output.LayerNorm = nn.LayerNorm(32, bias=False)
    model.embeddings.LayerNorm = nn.Identity()
    expected = runs(model)
    accelerate(model)
    assert_same_runs(model, expected)


def test_layers_that_were_taken_out() -> None:
    model = base_model("bert")
    model.encoder.layer = model.encoder.layer[:1]
    model.pooler = None
    expected = runs(model)
    accelerate(model)
    assert_same_runs(model, expected)


def test_ten_steps_of_an_optimizer() -> None:
    """Ten steps end where those of transformers do."""

    def train(model: PreTrainedModel) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(10):
            arguments = batch(model, "both")
            labels = torch.tensor([0, 1, 1])
            loss = model(**arguments, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    name = "BertForSequenceClassification"
    expected = train(head_model("bert", name))
    model = head_model("bert", name)
    accelerate(model)
    assert train(model) == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


# ---- others -------------------------------------------------------------------------------------


def test_a_sentence_transformers_model(real_encoder: Path) -> None:
    """A Transformer, a Pooling and a Normalize module, with pretrained weights."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(real_encoder), device="cpu").eval()
    sentences = ["A man is playing a guitar.", "Someone makes music", "It rains."]

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        embeddings = model(model.preprocess(sentences))["sentence_embedding"]
        loss = (embeddings @ embeddings.T).square().sum()
        loss.backward()
        return loss.detach(), gradients_of(model)

    encoded = model.encode(sentences, convert_to_tensor=True)
    loss, gradients = loss_and_gradients()
    report = accelerate(model)
    assert len(report.attention) == 1
    assert len(report.layer_norms) == 1 + 2 * 6
    torch.testing.assert_close(model.encode(sentences, convert_to_tensor=True), encoded)
    found, found_gradients = loss_and_gradients()
    torch.testing.assert_close(found, loss)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # That of a key's bias is zero but for rounding, of which the query's tells the size.
        scale = gradients[name.replace("key.bias", "query.bias")].norm()
        assert (found_gradients[name] - gradient).norm() <= 1e-4 * scale, name
    restore(model)
    assert torch.equal(model.encode(sentences, convert_to_tensor=True), encoded)


def test_importing_the_kernels_does_not_import_transformers() -> None:
    check = "import sys, kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
