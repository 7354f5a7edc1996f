"""Packed inputs and packed outputs of every model class, against each sequence by itself."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import PreTrainedModel

from kernels import accelerate
from kernels.integrations import transformers_models
from kernels.integrations.transformers_models import PackedModel

from .transformers_cases import (
    KINDS,
    LENGTH,
    MASKS,
    ROWS,
    SEQUENCES,
    assert_close,
    assert_same_gradients,
    base_model,
    batch,
    classes,
    flat,
    gradients_of,
    has_tokens,
    head_model,
    input_ids,
    is_choice,
    is_splinter_head,
    mask_of,
    places,
    run,
    takes,
)

BOUNDARIES = torch.tensor((0, *SEQUENCES)).cumsum(0).int()
TOTAL, LONGEST = sum(SEQUENCES), max(SEQUENCES)
_TOKEN_HEADS = (
    *("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel"),
    *("ForPreTraining", "GenerationDecoder"),
)


def sequences() -> list[Tensor]:
    """Ids ``[1, length]`` of each of the sequences."""
    random = torch.Generator().manual_seed(4)
    return [torch.randint(4, 50, (1, length), generator=random) for length in SEQUENCES]


def packed_inputs(**besides: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.cat(sequences(), 1),
        "cu_seq_lens_q": BOUNDARIES,
        "cu_seq_lens_k": BOUNDARIES,
        "max_length_q": LONGEST,
        "max_length_k": LONGEST,
        **besides,
    }


def restarting_positions(model: PreTrainedModel) -> Tensor:
    """The positions ``[1, T]`` of the sequences, as a model counts them itself."""
    first = getattr(getattr(model, model.base_model_prefix, model), "embeddings", None)
    padding = getattr(first, "padding_idx", None)
    start = 0 if padding is None else padding + 1
    return start + torch.cat([torch.arange(length) for length in SEQUENCES])[None]


def parts_of(name: str, value: Tensor, packed: bool) -> list[Tensor]:
    """What an output of packed inputs says of each of the sequences."""
    if packed and value.shape[:2] == (1, TOTAL):
        return list(value[0].split(SEQUENCES))
    assert len(value) == len(SEQUENCES), (name, value.shape)
    is_of_places = value.shape[1] == LONGEST
    rows = zip(value, SEQUENCES, strict=True)
    return [row[:length] if is_of_places else row for row, length in rows]


def run_each(model: PreTrainedModel) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Outputs of each sequence by itself, and the gradients of their losses' sum."""
    model.zero_grad()
    found = [flat(model(ids, output_hidden_states=True)) for ids in sequences()]
    found = [{name: value[0] for name, value in outputs.items()} for outputs in found]
    loss_of(found).backward()
    return found, gradients_of(model)


def run_packed(
    model: PreTrainedModel, arguments: dict[str, Any], packed: bool
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The same of packed inputs."""
    model.zero_grad()
    outputs = flat(model(**arguments, output_hidden_states=True))
    outputs.pop("cu_seqlens.0", None)
    parts = {name: parts_of(name, value, packed) for name, value in outputs.items()}
    found = [{name: of[i] for name, of in parts.items()} for i in range(len(SEQUENCES))]
    loss_of(found).backward()
    return found, gradients_of(model)


def loss_of(found: list[dict[str, Tensor]]) -> Tensor:
    values = [value.double().flatten() for outputs in found for value in outputs.values()]
    losses = [(x * torch.linspace(-1, 1, len(x))).sum() + x.square().sum() for x in values]
    return torch.stack(losses).sum()


@pytest.mark.parametrize(("kind", "name"), list(classes()))
def test_packed_inputs_of_every_class(kind: str, name: str) -> None:
    model = head_model(kind, name)
    if is_choice(model) or is_splinter_head(model) or name == "RoCBertForPreTraining":
        accelerate(model)
        with pytest.raises(ValueError, match="packed inputs are refused"):
            model(torch.full((1, TOTAL), 50), cu_seq_lens_q=BOUNDARIES, max_length_q=LONGEST)
        return
    expected, expected_gradients = run_each(model)
    accelerate(model)
    is_base = isinstance(model, PackedModel)
    cases = {"boundaries": packed_inputs()}
    if takes(model, "position_ids"):
        positions = {"position_ids": restarting_positions(model)}
        cases["both"] = packed_inputs(**positions)
        cases["positions"] = {"input_ids": cases["both"]["input_ids"], **positions}
    for case, arguments in cases.items():
        found, gradients = run_packed(
            model, arguments, packed=is_base or name.endswith(_TOKEN_HEADS)
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for output, value in theirs.items():
                assert_close(ours[output], value, what=f"{case}, {output}")
        assert_same_gradients(gradients, expected_gradients, case)


def test_losses_of_pretraining() -> None:
    """Labels of packed tokens, and one of each sequence."""
    model = head_model("bert", "BertForPreTraining")
    labels = torch.randint(4, 50, (1, TOTAL))
    is_next = torch.tensor([0, 1, 1, 0])
    of_tokens = zip(sequences(), labels.split(SEQUENCES, 1), is_next.split(1), strict=True)
    logits = [(model(ids), own, label) for ids, own, label in of_tokens]
    tokens = torch.cat([out.prediction_logits[0] for out, _, _ in logits])
    pairs = torch.cat([out.seq_relationship_logits for out, _, _ in logits])
    expected = nn.functional.cross_entropy(tokens, labels[0])
    expected = expected + nn.functional.cross_entropy(pairs, is_next)
    accelerate(model)
    found = model(**packed_inputs(), labels=labels, next_sentence_label=is_next).loss
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_outputs_of_padded_inputs(kind: str) -> None:
    """Rows are the tokens alone; pooled outputs are those of first places, as padded."""
    model = base_model(kind)
    expected = {case: run(model, batch(model, case), places(model, case))[0] for case in MASKS}
    accelerate(model, packed=True)
    for case in MASKS:
        outputs = model(**batch(model, case), output_hidden_states=True)
        where = places(model, case).tokens
        lengths = where.sum(1)
        assert outputs.cu_seqlens.dtype == torch.int32
        assert outputs.cu_seqlens.diff().tolist() == lengths.tolist()
        assert outputs.max_seqlen >= lengths.max()
        assert type(outputs) in model.output_classes.values()  # torch.compile makes none
        for i, state in enumerate([*outputs.hidden_states, outputs.last_hidden_state]):
            name = f"hidden_states.{i}" if i < 3 else "last_hidden_state.0"
            assert_close(state[0], expected[case][name][where], what=f"{case}, {name}")
        if "pooler_output.0" in expected[case]:
            rows = has_tokens(model, where)
            found, padded = outputs.pooler_output, expected[case]["pooler_output.0"]
            assert_close(found[rows], padded[rows], what=case)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_boundaries_are_the_last_field(kind: str) -> None:
    """Other fields have the places of transformers' outputs, and so has all of a tuple."""
    model = base_model(kind)
    arguments = batch(model, "right") | {"output_hidden_states": True}
    plain = model(**arguments)
    accelerate(model, packed=True)
    outputs = model(**arguments)
    assert isinstance(outputs, type(plain))
    assert list(outputs) == [*plain, "cu_seqlens"]
    for i, name in enumerate(outputs):
        assert outputs[i] is outputs[name] is getattr(outputs, name)
    assert outputs.to_tuple()[-1] is outputs.cu_seqlens
    assert len(model(**arguments, return_dict=False)) == len(plain)
    empty = model(torch.zeros(0, 5, dtype=torch.int64))
    assert type(empty)(dict(empty)).max_seqlen == 0


@pytest.mark.parametrize("name", ["DebertaV2ForTokenClassification", "BertForTokenClassification"])
def test_tuples_of_heads_have_no_boundaries(name: str) -> None:
    """DeBERTa's code puts what is left of its encoder's tuple behind the logits."""
    model = head_model("deberta-v2" if name.startswith("De") else "bert", name)
    calls = [{}, {"output_hidden_states": True}]
    plain = [model(sequences()[1], return_dict=False, **call) for call in calls]
    accelerate(model)
    for call, theirs in zip(calls, plain, strict=True):
        found = model(**packed_inputs(**call), return_dict=False)
        assert len(found) == len(theirs)
        assert_close(found[0][0, 4:15], theirs[0][0])


_MADE_ANEW: dict[str, Callable[[Any], Any]] = {
    "tree_map": lambda outputs: _pytree.tree_map(lambda x: x.clone(), outputs),
    "pickle": lambda outputs: pickle.loads(pickle.dumps(outputs)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "of a dict": lambda outputs: type(outputs)(dict(outputs)),
    # as torch.nn.parallel's gather does
    "of pairs": lambda outputs: type(outputs)((k, x.clone()) for k, x in outputs.items()),
}


@pytest.mark.parametrize("how", list(_MADE_ANEW))
def test_outputs_made_anew_keep_their_boundaries(how: str) -> None:
    model = base_model("bert")
    accelerate(model, packed=True)
    with torch.no_grad():
        outputs = model(**batch(model, "right"))
    found = _MADE_ANEW[how](outputs)
    assert type(found) is type(outputs)
    assert list(found) == list(outputs)
    assert found.cu_seqlens.dtype == torch.int32
    assert found[-1].tolist() == outputs["cu_seqlens"].tolist()
    assert found.max_seqlen == found.cu_seqlens.diff().max() <= outputs.max_seqlen
    assert torch.equal(found[0], outputs[0])


def test_outputs_are_unpickled_where_their_class_is_not_made_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = base_model("bert")
    plain = type(model(**batch(model, "right")))
    accelerate(model, packed=True)
    outputs = model(**batch(model, "right"))
    with torch.no_grad():
        written = pickle.dumps(model(**batch(model, "right")))
    monkeypatch.setattr(transformers_models, "_output_classes", {})
    found = pickle.loads(written)
    assert type(found) is not type(outputs)
    assert isinstance(found, plain)
    assert found.max_seqlen == outputs.max_seqlen
    assert torch.equal(found.cu_seqlens, outputs.cu_seqlens)
    assert len(_pytree.tree_leaves(found)) == len(outputs)


def test_mixed_precision_of_accelerate_keeps_boundaries() -> None:
    library = pytest.importorskip("accelerate")
    model = base_model("bert")
    accelerate(model, packed=True)
    expected = model(**batch(model, "right"))
    library.state.AcceleratorState._reset_state()  # which would keep the precision of other tests
    try:
        prepared = library.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        found = prepared(**batch(model, "right"))
    finally:
        library.state.AcceleratorState._reset_state()
    assert found.last_hidden_state.dtype == torch.float32
    assert not torch.equal(found.last_hidden_state, expected.last_hidden_state)  # it was bfloat16
    assert found.cu_seqlens.dtype == torch.int32
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert found.max_seqlen == found.cu_seqlens.diff().max()


def test_packed_logits_of_padded_inputs() -> None:
    model = head_model("bert", "BertForTokenClassification")
    expected = model(**batch(model, "between")).logits
    accelerate(model, packed=True)
    found = model(**batch(model, "between")).logits
    assert_close(found[0], expected[places(model, "between").tokens])


def test_packed_outputs_under_a_head_of_places_are_refused() -> None:
    for name in ("BertForSequenceClassification", "BertForQuestionAnswering"):
        model = head_model("bert", name)
        with pytest.raises(ValueError, match=f"packed: a {name} looks at places of a padded"):
            accelerate(model, packed=True)
        assert not isinstance(model.bert, PackedModel)


def test_packed_inputs_as_tuples_and_without_boundaries_of_keys() -> None:
    model = base_model("bert")
    expected = [model(ids)[0][0] for ids in sequences()]
    accelerate(model)
    ids, boundaries = torch.cat(sequences(), 1), BOUNDARIES
    for arguments in (
        {"cu_seq_lens_q": boundaries, "max_length_q": LONGEST},
        {"cu_seq_lens_q": boundaries},
        {"cu_seq_lens_q": boundaries.long(), "attention_mask": torch.ones_like(ids)},
    ):
        hidden, pooled = model(ids, **arguments, return_dict=False)
        assert_close(hidden[0], torch.cat(expected))
        assert pooled.shape == (len(SEQUENCES), 32)


def test_embedded_packed_inputs_and_types() -> None:
    for kind in ("bert", "roberta"):
        model = base_model(kind)
        embedded = torch.randn(1, TOTAL, 32)
        types = torch.randint(2, (1, TOTAL))
        pairs = zip(embedded.split(SEQUENCES, 1), types.split(SEQUENCES, 1), strict=True)
        expected = [model(inputs_embeds=x, token_type_ids=y)[0][0] for x, y in pairs]
        accelerate(model)
        found = model(
            inputs_embeds=embedded,
            token_type_ids=types,
            cu_seq_lens_q=BOUNDARIES,
            max_length_q=LONGEST,
        )
        assert_close(found[0][0], torch.cat(expected))


def test_rows_behind_the_last_sequence() -> None:
    """A stream of a fixed size, as a collator fills it up: what is behind changes nothing."""
    model = base_model("bert")
    expected = run_each(model)
    accelerate(model)
    ids = torch.cat([*sequences(), torch.full((1, 5), 7)], 1)
    model.zero_grad()
    outputs = model(ids, cu_seq_lens_q=BOUNDARIES, max_length_q=LONGEST)
    assert outputs.last_hidden_state.shape == (1, TOTAL + 5, 32)
    hidden = outputs.last_hidden_state[:, :TOTAL]
    assert_close(hidden[0], torch.cat([x["last_hidden_state.0"] for x in expected[0]]))
    assert not outputs.last_hidden_state[:, TOTAL:].any()
    assert_close(outputs.pooler_output, torch.stack([x["pooler_output.0"] for x in expected[0]]))


def test_positions_that_count_one_sequence() -> None:
    """Positions from elsewhere than the first one, of a single row, are no packed input.

    All the same are those of a model without an order, in each of transformers' attentions but
    flash attention, which takes each token for a sequence.
    """
    model = base_model("bert")
    counts = [range(11), range(3, 14), [0] * 11, [2] * 11, range(11, 0, -1)]
    cases = [
        {"input_ids": sequences()[1], "position_ids": torch.tensor([*count])[None]}
        for count in counts
    ]
    expected = [model(**arguments).last_hidden_state for arguments in cases]
    accelerate(model)
    for arguments, hidden in zip(cases, expected, strict=True):
        assert_close(model(**arguments).last_hidden_state, hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_tokens_and_positions_of_ones_own(kind: str) -> None:
    """RoBERTa does not count its padding tokens; BERT reads a buffer, which may be changed."""
    model = base_model(kind)
    buffer = getattr(model.embeddings, "position_ids", None)
    if buffer is not None:
        buffer.copy_(buffer.flip(-1))
    types = getattr(model.embeddings, "token_type_ids", None)
    if types is not None:
        types[:, ::2] = 1
    tokens = [ids.clone() for ids in sequences()]
    for ids in tokens:
        ids[:, ::3] = model.config.pad_token_id or 0
    expected = torch.cat([model(ids).last_hidden_state for ids in tokens], 1)
    accelerate(model)
    found = model(torch.cat(tokens, 1), cu_seq_lens_q=BOUNDARIES).last_hidden_state
    assert_close(found, expected)
    assert_close(model(tokens[1]).last_hidden_state, expected[:, 4:15])


def test_positions_restart_in_a_decoder() -> None:
    model = head_model("bert", "BertLMHeadModel")
    expected = [model(ids).logits[0] for ids in sequences()]
    accelerate(model)
    found = model(torch.cat(sequences(), 1), position_ids=restarting_positions(model)).logits
    assert_close(found[0], torch.cat(expected))


def test_inputs_of_whole_sequences() -> None:
    """X-MOD's languages, one for each sequence."""
    model = base_model("xmod")
    languages = torch.tensor([0, 1, 1, 0])
    each = zip(sequences(), languages.split(1), strict=True)
    expected = [model(ids, lang_ids=own).last_hidden_state[0] for ids, own in each]
    accelerate(model)
    found = model(**packed_inputs(lang_ids=languages)).last_hidden_state[0]
    assert_close(found, torch.cat(expected), what="last hidden state")


@pytest.mark.parametrize("kind", ["boundaries", "positions"])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM", "BertGenerationDecoder"])
def test_losses_of_next_tokens_do_not_cross_sequences(name: str, kind: str) -> None:
    family = {"B": "bert", "R": "roberta"}[name[0]] if "Gen" not in name else "bert-generation"
    model = head_model(family, name)
    total = 0
    for ids in sequences():
        if ids.shape[1] > 1:  # one token predicts none
            total = total + model(ids, labels=ids).loss * (ids.shape[1] - 1)
    expected = total / (TOTAL - len(SEQUENCES))
    expected.backward()
    gradients = gradients_of(model)
    accelerate(model)
    arguments = packed_inputs()
    if kind == "positions":
        arguments = {
            "input_ids": arguments["input_ids"],
            "position_ids": restarting_positions(model),
        }
    model.zero_grad()
    loss = model(**arguments, labels=arguments["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_same_gradients(gradients_of(model), gradients, kind)


def test_inputs_of_one_dimension() -> None:
    """Transformers takes positions and token types ``[S]`` for those of every row."""
    model = base_model("bert")
    arguments = batch(model, "right") | {
        "position_ids": torch.arange(LENGTH).flip(0),
        "token_type_ids": torch.arange(LENGTH) % 2,
    }
    assert ROWS != LENGTH
    expected = model(**arguments).last_hidden_state
    accelerate(model)
    where = mask_of("right").bool()
    assert_close(model(**arguments).last_hidden_state[where], expected[where], what="tokens")


# ---- errors -------------------------------------------------------------------------------------


def test_what_is_not_supported_is_refused() -> None:
    model = head_model("bert", "BertLMHeadModel")
    ids, mask = input_ids(model, "left"), mask_of("left")
    cache = model(ids, use_cache=True).past_key_values
    accelerate(model)
    hidden = torch.randn(3, 11, 32)
    refused = {
        "output_attentions: the prob": {"output_attentions": True},
        "past_key_values, use_cache: caches": {"use_cache": True},
        "caches are not": {"past_key_values": cache},
        "encoder_hidden_states: cross": {"encoder_hidden_states": hidden},
        "encoder_attention_mask: cross": {"encoder_attention_mask": mask},
        r"expected \[3, 11\], of padding alone, got \[3, 1, 11, 11\]": {
            "attention_mask": torch.ones(3, 1, 11, 11)
        },
        "of padding alone, got dict": {"attention_mask": {"full_attention": mask}},
        r"expected \[3, 11\], got \[3, 9\]": {"attention_mask": mask[:, :9]},
        r"cu_seq_lens_q: expected packed inputs \[1, tokens\], got \[3, 11\]": {
            "cu_seq_lens_q": BOUNDARIES
        },
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    wrong = {
        "cu_seq_lens_q: expected to start at 0": {"cu_seq_lens_q": BOUNDARIES + 1},
        "cu_seq_lens_q: expected ascending": {"cu_seq_lens_q": BOUNDARIES[[0, 2, 1, 3, 4]]},
        "cu_seq_lens_q: expected to end within": {"cu_seq_lens_q": 2 * BOUNDARIES},
        "max_length_q: expected at least the longest, 11, got 10": {"max_length_q": 10},
        "cu_seq_lens_q: expected to end at the 27 rows of inputs_embeds, got 25": {
            "input_ids": None,
            "inputs_embeds": torch.randn(1, TOTAL + 2, 32),
        },
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**packed_inputs() | arguments)
    with pytest.raises(ValueError, match="attention_mask: packed inputs have no padding"):
        model(**packed_inputs(attention_mask=torch.zeros(1, TOTAL)))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_wrong_inputs_are_transformers(kind: str) -> None:
    model = base_model(kind)
    accelerate(model)
    ids = torch.full((2, 5), 7)
    embedded = torch.randn(2, 5, 32)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match=r"(?i)input_ids"):
            model(**arguments)
    with pytest.raises(TypeError, match="is given twice"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="arguments, got 30"):
        model(*[None] * 30)
