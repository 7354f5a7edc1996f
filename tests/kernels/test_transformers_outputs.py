"""Every model class of the family gives transformers' outputs and gradients for every padding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, BertModel, PreTrainedModel

from kernels import accelerate

from .transformers_cases import (
    KINDS,
    LENGTH,
    MASKS,
    ROWS,
    SIZES,
    VARIANTS,
    assert_accelerated_runs_are_the_same,
    assert_close,
    assert_same_gradients,
    assert_same_outputs,
    base_model,
    batch,
    classes,
    flat,
    gradients_of,
    head_model,
    input_ids,
    mask_of,
    places,
    run,
    takes,
)


@pytest.mark.parametrize(("kind", "name"), list(classes()))
def test_outputs_of_every_class(kind: str, name: str) -> None:
    assert_accelerated_runs_are_the_same(head_model(kind, name))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_outputs_of_other_configs(variant: str) -> None:
    kind, options = VARIANTS[variant]
    assert_accelerated_runs_are_the_same(base_model(kind, **options))


def test_a_head_that_takes_the_mean_of_tokens() -> None:
    name = "ModernBertForSequenceClassification"
    model = head_model("modernbert", name, classifier_pooling="mean")
    # That of no tokens is no number.
    assert_accelerated_runs_are_the_same(model, [case for case in MASKS if case != "empty row"])


def test_the_family_has_heads() -> None:
    names = [name for _, name in classes()]
    assert len(names) >= 100
    for head in ("QuestionAnswering", "MultipleChoice", "TokenClassification", "MaskedLM"):
        assert sum(name.endswith(head) for name in names) >= 10


# ---- inputs -------------------------------------------------------------------------------------


def inputs_of(kind: str) -> dict[str, dict[str, Tensor]]:
    """Arguments besides the mask, for each kind of input that a family takes."""
    model = base_model(kind)
    ids = input_ids(model, "left")
    random = torch.Generator().manual_seed(2)

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=random)

    cases = {"inputs_embeds": {"inputs_embeds": torch.randn(ROWS, LENGTH, _embedded(model))}}
    table = {
        "token_type_ids": integers(2, ROWS, LENGTH),
        "position_ids": 2 + integers(20, ROWS, LENGTH),
        "task_type_ids": integers(3, ROWS, LENGTH),
        "lang_ids": torch.tensor([1, 0, 1]),
    }
    if takes(model, "input_shape_ids"):
        shapes = {
            name: integers(20, ROWS, LENGTH)
            for name in ("input_shape_ids", "input_pronunciation_ids")
        }
        cases["shapes"] = {"input_ids": ids, **shapes}
    for name, value in table.items():
        if takes(model, name):
            cases[name] = {"input_ids": ids, name: value}
    if takes(model, "position_ids"):
        cases["shared positions"] = {"input_ids": ids, "position_ids": 12 - torch.arange(11)[None]}
    return cases


def _embedded(model: torch.nn.Module) -> int:
    width: int = model.get_input_embeddings().weight.shape[1]
    return width


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind(kind: str) -> None:
    model = base_model(kind)
    inputs = inputs_of(kind)
    cases = [(name, mask) for name in inputs for mask in ("none", "left", "between")]

    def runs(name: str, mask: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        arguments = inputs[name] | {"attention_mask": mask_of(mask)}
        return run(model, arguments, places(model, mask))

    expected = {case: runs(*case) for case in cases}
    plain = model(input_ids(model, "left"), attention_mask=mask_of("left"))[0]
    for name in inputs:  # each has an effect
        assert not torch.equal(expected[name, "left"][0]["last_hidden_state.0"], plain), name
    accelerate(model)
    for name, mask in cases:
        outputs, gradients = runs(name, mask)
        what = f"{name}, {mask}"
        assert_same_outputs(outputs, expected[name, mask][0], places(model, mask), what)
        assert_same_gradients(gradients, expected[name, mask][1], what)


def test_masks_of_other_dtypes() -> None:
    model = base_model("bert")
    ids, mask = input_ids(model, "both"), mask_of("both")
    expected = flat(model(ids, mask))
    accelerate(model)
    for dtype in (torch.bool, torch.int32, torch.float32):
        found = flat(model(ids, mask.to(dtype)))
        assert_same_outputs(found, expected, places(model, "both"), str(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_outputs(kind: str) -> None:
    """Tuples, with and without all hidden states; arguments in their places; `forward` itself."""
    model = base_model(kind)
    ids, mask = input_ids(model, "right"), mask_of("right")
    arguments = {"input_ids": ids, "attention_mask": mask}
    calls = [
        lambda: model(**arguments, return_dict=False),
        lambda: model(**arguments, return_dict=False, output_hidden_states=True),
        lambda: model(ids, attention_mask=mask),
        lambda: model.forward(**arguments),
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        accelerate(model)
        found = [call() for call in calls]
        model.config.return_dict = False
        as_configured = model(**arguments)
    where = places(model, "right")
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, tuple):
            assert len(ours) == len(theirs)
            ours, theirs = (
                {f"hidden_states_{i}": x for i, x in enumerate(o)} for o in (ours, theirs)
            )
        # The pooled output of a tuple has no name.
        named = [{n: x for n, x in flat(o).items() if x.dim() == 3} for o in (ours, theirs)]
        assert_same_outputs(*named, where, "")
    assert isinstance(as_configured, tuple)


def test_a_batch_without_rows() -> None:
    model = base_model("bert")
    accelerate(model)
    for mask in (None, torch.ones(0, 5)):
        model.zero_grad()
        outputs = model(torch.zeros(0, 5, dtype=torch.int64), mask, output_hidden_states=True)
        assert outputs.last_hidden_state.shape == (0, 5, 32)
        assert outputs.pooler_output.shape == (0, 32)
        assert [tuple(state.shape) for state in outputs.hidden_states] == [(0, 5, 32)] * 3
        outputs.last_hidden_state.sum().backward()


def test_a_batch_of_padding_alone() -> None:
    """Which has first places for a base model, and no row at all for question answering."""
    mask = torch.zeros(2, 5)
    for name in ("BertModel", "BertForQuestionAnswering"):
        model = head_model("bert", name)
        expected = model(torch.full((2, 5), 7), mask)
        accelerate(model)
        found = model(torch.full((2, 5), 7), mask)
        if name == "BertModel":
            assert_close(found.pooler_output, expected.pooler_output)
        else:
            assert (found.start_logits == torch.finfo(torch.float32).min).all()


# ---- spans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_predicted_spans_are_of_tokens(side: str) -> None:
    """transformers finds the best place of all, padding's too; these kernels that of tokens."""
    torch.manual_seed(3)
    model = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    ids = torch.randint(4, 50, (64, 24))
    mask = (torch.arange(24) < torch.randint(4, 25, (64, 1))).long()
    mask = mask if side == "right" else mask.flip(1)
    starts = mask.argmax(1)
    ends = starts + mask.sum(1) - 1

    def outputs():
        labels = {"start_positions": starts, "end_positions": ends}
        return model(ids, attention_mask=mask, **labels)

    with torch.no_grad():
        plain = outputs()
        assert (mask.gather(1, plain.start_logits.argmax(1, keepdim=True)) == 0).any()
        accelerate(model)
        found = outputs()
    loss = 0.0
    for name, labels in (("start_logits", starts), ("end_logits", ends)):
        lowest = torch.finfo(torch.float32).min
        of_tokens = plain[name].masked_fill(mask == 0, lowest)
        assert torch.equal(found[name].argmax(1), of_tokens.argmax(1))
        assert (found[name][mask == 0] == lowest).all()
        loss = loss + torch.nn.functional.cross_entropy(of_tokens, labels) / 2
    assert_close(found.loss, loss)


def loss_and_gradients(
    model: PreTrainedModel, arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def test_losses_of_heads() -> None:
    """Labels at padding are ignored, as transformers' own examples have them.

    A decoder's padding is on the right: what predicts the first token would be padding otherwise.
    """
    labels = {
        "BertForMaskedLM": torch.randint(4, 50, (ROWS, LENGTH)),
        "BertForTokenClassification": torch.randint(2, (ROWS, LENGTH)),
        "BertLMHeadModel": torch.randint(4, 50, (ROWS, LENGTH)),
        "BertForSequenceClassification": torch.tensor([0, 1, 1]),
        "BertForNextSentencePrediction": torch.tensor([0, 1, 1]),
        "BertForMultipleChoice": torch.tensor([0, 1, 1]),
    }
    for name, wanted in labels.items():
        model = head_model("bert", name)
        arguments = batch(model, "right" if name == "BertLMHeadModel" else "both")
        if wanted.dim() == 2:
            wanted = wanted.masked_fill(arguments["attention_mask"] == 0, -100)

        expected = loss_and_gradients(model, arguments | {"labels": wanted})
        accelerate(model)
        found = loss_and_gradients(model, arguments | {"labels": wanted})
        assert_close(found[0], expected[0], what=name)
        assert_same_gradients(found[1], expected[1], name)


def test_a_decoder_of_the_default_config() -> None:
    """Its use_cache, which is on, is quietly off."""
    model = head_model("bert", "BertLMHeadModel")
    assert model.config.use_cache
    accelerate(model)
    outputs = model(**batch(model, "between"))
    assert outputs.past_key_values is None
    assert isinstance(model.bert, BertModel)
