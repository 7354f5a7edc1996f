"""A packed batch trains and scores as the padded one does in plain transformers."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from kernels import PackingCollator, accelerate

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = (7, 1, 11, 4)
CLASSES = 3
PADDING = {"input_ids": 1, "token_type_ids": 0, "labels": -100}

Features = list[dict[str, Any]]


def examples(count: int = len(LENGTHS)) -> Features:
    """Examples as a tokenizer gives them."""
    draw = np.random.default_rng(1)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    return [
        {
            "input_ids": draw.integers(4, 60, length).tolist(),
            "token_type_ids": [0] * (length // 2) + [1] * (length - length // 2),
        }
        for length in lengths
    ]


def pad(features: Features) -> dict[str, Tensor]:
    """Make the padded batch."""
    length = max(len(one["input_ids"]) for one in features)
    batch: dict[str, Any] = {key: [] for key in ["attention_mask", *features[0]]}
    for one in features:
        missing = length - len(one["input_ids"])
        batch["attention_mask"].append([1] * (length - missing) + [0] * missing)
        for key, value in one.items():
            is_of_tokens = isinstance(value, list) and len(value) == length - missing
            batch[key].append(value + [PADDING[key]] * missing if is_of_tokens else value)
    labels = {"label": "labels"}
    return {labels.get(key, key): torch.tensor(value) for key, value in batch.items()}


def with_label(one: dict[str, Any], i: int) -> dict[str, Any]:
    return {**one, "label": i % CLASSES}


def with_several_labels(one: dict[str, Any], i: int) -> dict[str, Any]:
    return {**one, "labels": [1.0, float(i % 2), 0.0]}


def with_token_labels(one: dict[str, Any], _: int) -> dict[str, Any]:
    return {**one, "labels": [-100] + [number % CLASSES for number in one["input_ids"][1:]]}


def with_answer(one: dict[str, Any], i: int) -> dict[str, Any]:
    last = len(one["input_ids"]) - 1
    return {**one, "start_positions": i % (last + 1), "end_positions": last}


def with_masked_tokens(one: dict[str, Any], i: int) -> dict[str, Any]:
    """As a collator that masks padded batches gives them."""
    ids, missing = one["input_ids"], 11 - len(one["input_ids"])
    labels = [number if place % 3 == i % 3 else -100 for place, number in enumerate(ids)]
    masked = [number if label == -100 else 3 for number, label in zip(ids, labels, strict=True)]
    return {
        "input_ids": torch.tensor(masked + [1] * missing),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
        "labels": torch.tensor(labels + [-100] * missing),
    }


def stack(features: Features) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in features]) for key in features[0]}


Case = tuple[type[hf.PreTrainedModel], Callable[[dict[str, Any], int], dict[str, Any]], bool]
CASES: dict[str, Case] = {
    "bert-classes": (hf.BertForSequenceClassification, with_label, False),
    "bert-several": (hf.BertForSequenceClassification, with_several_labels, False),
    "roberta-classes": (hf.RobertaForSequenceClassification, with_label, False),
    "bert-tokens": (hf.BertForTokenClassification, with_token_labels, True),
    "roberta-tokens": (hf.RobertaForTokenClassification, with_token_labels, True),
    "bert-masked": (hf.BertForMaskedLM, with_masked_tokens, True),
    "bert-answers": (hf.BertForQuestionAnswering, with_answer, False),
}


MOVE_ALL_LOGITS = ("bert.encoder.layer.1.output.LayerNorm.bias", "qa_outputs.bias")


def model_of(kind: type[hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = kind.config_class(**SIZES, num_labels=2 if "Question" in kind.__name__ else CLASSES)
    config.type_vocab_size = 2
    return kind(config)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_of_answers(
    outputs: dict[str, Tensor], padded: dict[str, Tensor], is_token: Tensor
) -> Tensor:
    """Transformers' loss, which leaves it to the model to find no answer at padding."""
    losses = [
        nn.functional.cross_entropy(
            outputs[f"{end}_logits"].masked_fill(~is_token, -1e30), padded[f"{end}_positions"]
        )
        for end in ("start", "end")
    ]
    return sum(losses, torch.tensor(0.0)) / 2


@pytest.mark.parametrize("case", CASES)
def test_a_packed_batch_is_the_padded_one(case: str) -> None:
    kind, labelled, is_of_tokens = CASES[case]
    features = [labelled(one, i) for i, one in enumerate(examples())]
    padded = stack(features) if case == "bert-masked" else pad(features)
    packed = PackingCollator()(features)
    assert packed["input_ids"].shape == (1, sum(LENGTHS))
    model = model_of(kind)
    expected = model(**padded)
    is_token = padded["attention_mask"] == 1
    if case == "bert-answers":
        expected["loss"] = loss_of_answers(expected, padded, is_token)
    expected["loss"].backward()
    gradients = gradients_of(model)
    model.zero_grad()
    accelerate(model)
    found = model(**packed)
    found.loss.backward()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        value, other = value.detach(), found[name].detach()
        if is_of_tokens and name == "logits":
            value, other = value[is_token], other[0]
        elif name.endswith("_logits"):
            value, other = value[is_token], other[is_token]
        # Two layers of fp32 sums over at most 60 numbers: 1e-5 is a hundred roundings.
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5 * (1 + value.abs().max()))
    assert gradients_of(model).keys() == gradients.keys()
    for name, gradient in gradients_of(model).items():
        # Where one is zero but for rounding, another tells the size of that: of a key's bias the
        # query's, and of a bias that moves all logits of an answer alike that of its weight.
        like = name.replace("key.bias", "query.bias")
        if case == "bert-answers" and name in MOVE_ALL_LOGITS:
            like = name.replace("bias", "weight")
        scale = gradients[like].norm()
        assert (gradient - gradients[name]).norm() <= 1e-4 * scale, name


def test_tokens_masked_by_transformers(tmp_path: Path) -> None:
    """The lines of the docstring: what a collator for padded batches returns is packed."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer = hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    padded = hf.DataCollatorForLanguageModeling(tokenizer, seed=3)(
        [{"input_ids": one["input_ids"]} for one in examples()]
    )
    batch = PackingCollator()(
        [dict(zip(padded, row, strict=True)) for row in zip(*padded.values(), strict=True)]
    )
    is_token = padded["attention_mask"] == 1
    assert torch.equal(batch["input_ids"][0], padded["input_ids"][is_token])
    assert torch.equal(batch["labels"][0], padded["labels"][is_token])
    assert (batch["labels"] != -100).any()


# ---- trainers -----------------------------------------------------------------------------------


def test_a_trainer_trains_and_evaluates_as_with_padding(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # which the Trainer needs
    rows = [{**with_label(one, i), "text": "unused"} for i, one in enumerate(examples(14))]
    plain = model_of(hf.BertForSequenceClassification)

    def run(collator: Any) -> tuple[list[float], dict[str, float]]:
        model = copy.deepcopy(plain)
        accelerate(model)
        settings = hf.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = hf.Trainer(
            model,
            settings,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda p: {
                "right": float((p.predictions.argmax(1) == p.label_ids).mean()),
                "count": len(p.predictions),
            },
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate()

    losses, scores = run(pad)
    found, found_scores = run(PackingCollator())
    assert len(found) == 4
    assert found == pytest.approx(losses, rel=1e-5)
    for name in ("eval_loss", "eval_right", "eval_count"):
        assert found_scores[name] == pytest.approx(scores[name], rel=1e-5)


class Stream(IterableDataset[dict[str, Any]]):
    """Examples of unknown number."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from (with_label(one, i) for i, one in enumerate(examples()))


def test_accelerate_passes_whole_batches() -> None:
    library = pytest.importorskip("accelerate")
    expected = PackingCollator()(list(Stream()))
    for data in (list(Stream()), Stream()):
        loader = DataLoader(data, batch_size=4, collate_fn=PackingCollator())
        config = library.utils.DataLoaderConfiguration(dispatch_batches=False)
        (batch,) = library.Accelerator(cpu=True, dataloader_config=config).prepare(loader)
        assert_equal(batch, expected)
    loader = library.Accelerator(cpu=True).prepare(loader)  # an iterable one, by default cut apart
    with pytest.raises(TypeError, match="batch size"):
        next(iter(loader))


def test_a_model_in_data_parallel_refuses_packed_inputs() -> None:
    model = model_of(hf.BertForSequenceClassification)
    accelerate(model)
    replica = model._replicate_for_data_parallel()  # of a child at a time, as DataParallel does
    replica.bert = model.bert._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="DataParallel cuts packed inputs apart"):
        replica.bert(**PackingCollator()(examples()))
    replica.bert(input_ids=torch.ones(2, 3, dtype=torch.long))


def assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(batch) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert batch[name].dtype == value.dtype, name
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value, name


def test_worker_processes_collate() -> None:
    rows = [with_label(one, i) for i, one in enumerate(examples(6))]
    loader = DataLoader(rows, batch_size=4, collate_fn=PackingCollator(), num_workers=2)
    batches = list(loader)
    assert len(batches) == 2
    for batch, features in zip(batches, (rows[:4], rows[4:]), strict=True):
        assert_equal(batch, PackingCollator()(features))
    assert_equal(pickle.loads(pickle.dumps(PackingCollator()))(rows), PackingCollator()(rows))


# ---- forms of examples --------------------------------------------------------------------------


def test_what_a_batch_holds() -> None:
    batch = PackingCollator()(
        [
            {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": 1, "weight": 0.5},
            {"input_ids": [8], "token_type_ids": [0], "labels": 0, "weight": 2},
        ]
    )
    assert next(x for x in batch.values() if isinstance(x, Tensor)) is batch["labels"]
    assert_equal(
        batch,
        {
            "max_length_q": 3,
            "max_length_k": 3,
            "labels": torch.tensor([1, 0]),
            "weight": torch.tensor([0.5, 2.0]),
            "input_ids": torch.tensor([[5, 6, 7, 8]]),
            "token_type_ids": torch.tensor([[0, 0, 1, 0]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 4], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 3, 4], dtype=torch.int32),
        },
    )
    assert batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]


@pytest.mark.parametrize("form", [list, np.asarray, torch.tensor])
@pytest.mark.filterwarnings("error")
def test_lists_arrays_and_tensors_are_the_same(form: Callable[[Any], Any]) -> None:
    rows = [with_token_labels(one, i) for i, one in enumerate(examples())]
    given = [{key: form(value) for key, value in one.items()} for one in rows]
    assert_equal(PackingCollator()(given), PackingCollator()(rows))


def test_small_and_read_only_arrays_become_int64() -> None:
    ids = np.array([5, 6], dtype=np.uint8)
    ids.flags.writeable = False
    batch = PackingCollator()([{"input_ids": ids, "token_type_ids": ids.astype(np.int16)}])
    assert batch["input_ids"].dtype == batch["token_type_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        *((1, torch.int64), (1.5, torch.float32), (True, torch.int64)),
        *((np.int32(1), torch.int64), (np.float64(1), torch.float32)),
        *((torch.tensor(1, dtype=torch.int8), torch.int64), (torch.tensor(1.0), torch.float32)),
    ],
)
@pytest.mark.parametrize("key", ["label", "label_ids", "labels"])
def test_labels_are_those_of_transformers(key: str, label: Any, dtype: torch.dtype) -> None:
    rows = [{"input_ids": [5], key: label}, {"input_ids": [5, 6], key: label}]
    labels = PackingCollator()(rows)["labels"]
    assert labels.shape == (2,)
    assert labels.dtype == dtype


def test_numbers_of_two_kinds_are_floats() -> None:
    rows = [{"input_ids": [5], "label": 1}, {"input_ids": [5], "label": 0.5}]
    assert PackingCollator()(rows)["labels"].tolist() == [1.0, 0.5]


def test_padding_is_left_out_on_either_side() -> None:
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [1, 2, 9, 9]},
        {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1], "labels": [1]},
        {"input_ids": [9, 0, 0, 0], "attention_mask": [1, 0, 0, 0], "labels": []},
    ]
    batch = PackingCollator()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[1, 2, 1, -100, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4, 5]
    assert batch["max_length_q"] == 2


def test_values_of_examples_and_of_tokens() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "box": [[1, 2]] * 3, "task": [1, 2], "none": None},
        {"input_ids": [8], "box": [[3, 4]], "task": [3, 4], "none": None},
    ]
    batch = PackingCollator()(rows)
    assert batch["box"].tolist() == [[[1, 2], [1, 2], [1, 2], [3, 4]]]
    assert batch["task"].tolist() == [[1, 2], [3, 4]]
    assert "none" not in batch


ONE = {"input_ids": [5, 6]}
WRONG: dict[str, tuple[Any, str]] = {
    "none": ([], "features: expected one example or more, got none"),
    "a batch": (dict(ONE), "features[0]: expected a mapping such as a tokenizer gives, got str"),
    "no ids": ([{"labels": 1}], "features: expected 'input_ids', got 'labels'"),
    "nothing": ([{}], "features: expected 'input_ids', got nothing"),
    "a key": ([ONE, {**ONE, "x": 1}], "features[0]: has no 'x', but features[1] does"),
    "a value": ([{**ONE, "x": 1}, {**ONE, "x": None}], "features[1]: has no 'x'"),
    "two labels": ([{**ONE, "label": 1, "labels": 1}], "'label' and 'labels' both are labels"),
    "no tokens": ([ONE, {"input_ids": []}], "features[1]['input_ids']: no tokens"),
    "padding": (
        [{"input_ids": [0, 0], "attention_mask": [0, 0]}],
        "features[0]['input_ids']: no tokens",
    ),
    "choices": ([{"input_ids": [[5, 6], [7]]}], "several choices for an example cannot be packed"),
    "a batch of one": (
        [{"input_ids": torch.ones(1, 3)}],
        "features[0]['input_ids']: expected the ids of one sequence, got [1, 3]",
    ),
    "a number": ([{"input_ids": 5}], "expected the ids of one sequence, got []"),
    "floats": ([{"input_ids": [0.5]}], "features[0]['input_ids']: expected integers"),
    "words": ([{"input_ids": ["a"]}], "features[0]['input_ids']: expected numbers, got list"),
    "a hole": ([{"input_ids": [5, None]}], "features[0]['input_ids']: expected numbers, got list"),
    "text": (
        [ONE | {"text": "ab" * 99}],
        "features[0]['text']: expected numbers, got str 'abababababababababababababababababab...; "
        "remove the column or convert it",
    ),
    "a mask": (
        [{**ONE, "attention_mask": [1]}],
        "features[0]['attention_mask']: expected [2] as input_ids, got [1]",
    ),
    "labels": (
        [{**ONE, "labels": [1, 2, 3]}],
        "features[0]['labels']: expected one label for each of 2 tokens, got 3",
    ),
    "shapes": (
        [{**ONE, "x": [1, 2, 3]}, {**ONE, "x": [1]}],
        "features[1]['x']: expected [3] as in features[0], or one for each token",
    ),
    "answers": (
        [{**ONE, "attention_mask": [0, 1], "start_positions": 1}],
        "features[0]['start_positions']: places in an example with padding ahead of tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_examples(case: str) -> None:
    features, message = WRONG[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PackingCollator()(features)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_token_counts_of_tasks() -> None:
    batch = PackingCollator()([{"input_ids": [1] * length} for length in (3, 1, 4, 2)])
    assert PackingCollator.token_counts(batch, [1, 0, 3]) == [3, 0, 7]
    for examples in ([2, 1], [5], [5, -1], []):
        with pytest.raises(ValueError, match="examples: expected counts of 4 examples in all"):
            PackingCollator.token_counts(batch, examples)
