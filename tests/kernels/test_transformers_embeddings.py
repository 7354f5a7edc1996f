"""Embeddings of transformers in one operator, where they may be, and their gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from kernels import TaskGradients, accelerate, embedding_layer_norm, restore
from kernels.integrations import transformers_embeddings, transformers_layers

from . import transformers_cases as cases

FUSED = (
    *("albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra"),
    *("mpnet", "nomic_bert", "roberta", "roberta-prelayernorm", "splinter", "xlm-roberta", "xmod"),
)
OTHERS = sorted(set(cases.KINDS) - set(FUSED))
"""Those with norms elsewhere, further tables, or one table alone."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all ids that the operator gets from a model's embeddings."""
    found: list[torch.Size] = []
    fused = transformers_embeddings.embedding_layer_norm

    def noting(word_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(word_ids.shape)
        return fused(word_ids, *args, **kwargs)

    monkeypatch.setattr(transformers_embeddings, "embedding_layer_norm", noting)
    return found


def embeddings_of(model: PreTrainedModel) -> Any:
    return model.embeddings


@pytest.mark.parametrize("kind", cases.KINDS)
def test_embeddings_of_words_places_and_types_are_fused(kind: str, calls: list) -> None:
    model = cases.base_model(kind)
    accelerate(model)
    model(**cases.batch(model, "right"))
    tokens = sum(map(sum, cases.MASKS["right"]))
    assert calls == ([(1, tokens)] if kind in FUSED else [])
    assert kind in FUSED or kind in OTHERS
    restore(model)
    model(**cases.batch(model, "right"))
    assert len(calls) == (kind in FUSED)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_small_batches_take_torchs_layers(
    kind: str, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, dropouts and norms of few elements."""
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 2**15)
    cases.assert_accelerated_runs_are_the_same(cases.base_model(kind), ["right", "both"])
    assert calls == []


def test_ernie_without_types_of_tasks_has_berts_embeddings(calls: list) -> None:
    model = cases.base_model("ernie", use_task_id=False)
    cases.assert_accelerated_runs_are_the_same(model, ["right", "both"])
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_embedded_inputs_are_not_looked_up(kind: str, calls: list) -> None:
    model = cases.base_model(kind)
    words = embeddings_of(model).word_embeddings
    arguments = cases.batch(model, "right")
    embedded = {
        "inputs_embeds": words(arguments["input_ids"]).detach(),
        "attention_mask": arguments["attention_mask"],
    }
    where = cases.places(model, "right")
    expected, _ = cases.run(model, embedded, where)
    accelerate(model)
    found, _ = cases.run(model, embedded, where)
    cases.assert_same_outputs(found, expected, where, "")
    assert calls == []


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class _Adapter(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return 1.5 * super().forward(index)


def _doubled(_m: nn.Module, _a: object, output: Tensor) -> Tensor:
    return 2 * output


def _adapt(embeddings: Any) -> None:
    embeddings.word_embeddings.__class__ = _Adapter


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook of words": lambda e: e.word_embeddings.register_forward_hook(_doubled),
    "hook of positions": lambda e: e.position_embeddings.register_forward_hook(_doubled),
    "hook of the norm": lambda e: e.LayerNorm.register_forward_hook(_doubled),
    "hook of dropout": lambda e: e.dropout.register_forward_hook(_doubled),
    "parametrised": lambda e: parametrize.register_parametrization(
        e.token_type_embeddings, "weight", _Doubled()
    ),
    "adapter": _adapt,
    "max_norm": lambda e: setattr(e.word_embeddings, "max_norm", 0.5),
    "by frequency": lambda e: setattr(e.word_embeddings, "scale_grad_by_freq", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_watched_or_do_more_are_called(change: str, calls: list) -> None:
    model, where = cases.base_model("roberta"), None
    CHANGES[change](embeddings_of(model))
    where = cases.places(model, "both")
    arguments = cases.batch(model, "right" if change == "by frequency" else "both")
    arguments["input_ids"] = cases.input_ids(model, "none")  # padding counts for a frequency
    if change == "by frequency":
        arguments["attention_mask"], where = None, cases.places(model, "none")
    expected, gradients = cases.run(model, arguments, where)
    accelerate(model)
    found, found_gradients = cases.run(model, arguments, where)
    cases.assert_same_outputs(found, expected, where, "")
    cases.assert_same_gradients(found_gradients, gradients)
    assert calls == []


def test_a_hook_of_the_embeddings_themselves_is_called(calls: list) -> None:
    model = cases.base_model("bert")
    embeddings_of(model).register_forward_hook(_doubled)
    cases.assert_accelerated_runs_are_the_same(model, ["both"])
    assert len(calls) == 1


def test_sparse_gradients_stay_sparse(calls: list) -> None:
    model = cases.base_model("bert")
    accelerate(model)
    embeddings_of(model).word_embeddings.sparse = True
    model(**cases.batch(model, "both")).last_hidden_state.square().sum().backward()
    assert embeddings_of(model).word_embeddings.weight.grad.is_sparse
    assert calls == []


def test_dropout_is_that_of_separate_layers() -> None:
    """With the same seed: the operator drops what the module does."""
    model = cases.base_model("bert", hidden_dropout_prob=0.3).train()
    accelerate(model)
    arguments = {"input_ids": cases.input_ids(model, "none")[:1], "position_ids": torch.arange(11)}
    arguments["position_ids"] = arguments["position_ids"][None]
    embeddings, found = embeddings_of(model), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(embeddings(**arguments))
        embeddings.dropout.register_forward_hook(lambda *_: None)
    assert 0.1 < (found[0] == 0).float().mean() < 0.5
    torch.testing.assert_close(*found)


# ---- padding ------------------------------------------------------------------------------------


def masked_language_model(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose decoder shares the word table, and a batch with padding ids that are seen."""
    name = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[kind]
    model = cases.head_model(kind, name)
    words = model.get_input_embeddings()
    assert words.weight is model.get_output_embeddings().weight
    ids = cases.input_ids(model, "none")
    ids[:, 3], ids[1, 7] = words.padding_idx, words.padding_idx
    return model, {"input_ids": ids}


def losses(logits: Tensor) -> list[Tensor]:
    return [part.log_softmax(-1)[..., 7].square().mean() for part in logits.split((1, 2))]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_shared_table_keeps_the_decoders_gradient_of_padding(kind: str) -> None:
    model, arguments = masked_language_model(kind)
    expected = []
    for task in range(3):
        model.zero_grad()
        by_task = losses(model(**arguments).logits)
        torch.stack(by_task).sum().backward() if task == 2 else by_task[task].backward()
        expected.append(cases.gradients_of(model))
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert expected[0][name][model.get_input_embeddings().padding_idx].abs().max() > 0
    accelerate(model)
    model.zero_grad()
    torch.stack(losses(model(**arguments).logits)).sum().backward()
    cases.assert_same_gradients(cases.gradients_of(model), expected[2])
    model.zero_grad()
    collector = TaskGradients(model, 2)
    with collector.batch((1, 2)):
        logits = model(**arguments).logits
    torch.autograd.backward(losses(logits))
    views = dict(collector.named_views())
    for task, gradients in enumerate(expected[:2]):
        cases.assert_same_gradients({name: views[name][task] for name in gradients}, gradients)


# ---- task gradients -----------------------------------------------------------------------------


def task_losses(hidden: Tensor) -> list[Tensor]:
    return [part[:, 0].square().sum() for part in hidden.split((1, 2))]


def gradients_by_task(model: PreTrainedModel, arguments: dict[str, Any]) -> list[dict[str, Tensor]]:
    found = []
    for task in range(2):
        model.zero_grad()
        task_losses(model(**arguments).last_hidden_state)[task].backward()
        found.append(cases.gradients_of(model))
    model.zero_grad()
    return found


def assert_views(collector: TaskGradients, expected: list[dict[str, Tensor]]) -> None:
    views = dict(collector.named_views())
    for task, gradients in enumerate(expected):
        own = {name: gradient for name, gradient in gradients.items() if name in views}
        cases.assert_same_gradients({name: views[name][task] for name in own}, own, str(task))


@pytest.mark.parametrize(
    "frozen",
    ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "embeddings"],
)
def test_task_gradients_with_frozen_parameters(frozen: str, calls: list) -> None:
    model = cases.base_model("roberta")
    for name, parameter in model.embeddings.named_parameters():
        parameter.requires_grad_(frozen not in (name.split(".")[0], "embeddings"))
    arguments = cases.batch(model, "both")
    expected = gradients_by_task(model, arguments)
    accelerate(model)
    collector = TaskGradients(model, 2)
    with collector.batch((1, 2)):
        hidden = model(**arguments).last_hidden_state
    torch.autograd.backward(task_losses(hidden))
    assert_views(collector, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("late", ["token_type_embeddings", "LayerNorm"])
def test_parameters_that_nobody_follows_get_autograds_gradient(late: str) -> None:
    """Those that are trained only after the collector was made."""
    model = cases.base_model("bert")
    arguments = cases.batch(model, "both")
    expected = gradients_by_task(model, arguments)
    accelerate(model)
    getattr(model.embeddings, late).requires_grad_(False)
    collector = TaskGradients(model, 2)
    getattr(model.embeddings, late).requires_grad_()
    with collector.batch((1, 2)):
        hidden = model(**arguments).last_hidden_state
    torch.autograd.backward(task_losses(hidden))
    assert_views(collector, expected)
    for name, gradient in cases.gradients_of(model).items():
        assert late in name
        total = expected[0][name] + expected[1][name]
        torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-5)


def test_a_task_alone() -> None:
    model = cases.base_model("bert")
    arguments = cases.batch(model, "none")
    model(**arguments).last_hidden_state.square().sum().backward()
    expected = cases.gradients_of(model)
    model.zero_grad()
    accelerate(model)
    collector = TaskGradients(model, 3)
    with collector.task(1):
        hidden = model(**arguments).last_hidden_state
    hidden.square().sum().backward()
    views = dict(collector.named_views())
    cases.assert_same_gradients({name: views[name][1] for name in expected}, expected)
    assert all(not view[::2].any() for view in views.values())
    assert collector.tasks_reaching(model.embeddings.word_embeddings.weight) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operator_within_a_batch_of_padded_rows(dtype: torch.dtype) -> None:
    """The public function, called by a model of one's own: rows of examples, not a stream."""
    model = cases.base_model("bert").embeddings.to(dtype)
    leaves = [*(getattr(model, n).weight for n in transformers_embeddings.Embeddings.tables)]
    leaves += [model.LayerNorm.weight, model.LayerNorm.bias]
    ids = [torch.randint(0, 2, (3, 4)) for _ in range(3)]
    expected = []
    for task in range(2):
        out = embedding_layer_norm(*ids, *leaves, padding_idx=(0, None, -1))
        expected.append(torch.autograd.grad(task_losses(out)[task], leaves))
    collector = TaskGradients(model, 2)
    with collector.batch((1, 2)):
        out = embedding_layer_norm(*ids, *leaves, padding_idx=(0, None, -1))
    assert out.shape == (3, 4, 32)
    torch.autograd.backward(task_losses(out))
    for task, gradients in enumerate(expected):
        for leaf, gradient in zip(leaves, gradients, strict=True):
            own = collector.rows[task, collector.columns(leaf)].view_as(leaf)
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)
