"""Compare an accelerated model of transformers with the same one before."""

import copy
import importlib
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from kernels import TaskGradients, accelerate, restore

from .tolerance import assert_within_twice

LENGTH = 11
"""Odd, so that no two rows of a batch of three begin at a multiple of a vector's width."""
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,  # a first, a last and one between
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # what is seen at padding then changes the outputs by far
}
MASKS = {
    "none": None,
    "right": [[1] * 4 + [0] * 7, [1] * 11, [1] * 9 + [0] * 2],
    "left": [[0] * 7 + [1] * 4, [1] * 11, [0] * 2 + [1] * 9],
    "both": [[0] * 3 + [1] * 4 + [0] * 4, [1] * 11, [0] + [1] * 9 + [0]],
    "between": [[1, 0] * 5 + [1], [1] * 11, [0] * 2 + [1] * 4 + [0] * 2 + [1] * 3],
    "empty": [[1] * 4 + [0] * 7, [0] * 11, [0] * 2 + [1] * 9],
}


def model_of(kind: str, **options: Any) -> PreTrainedModel:
    """A small encoder with random weights, biases and norms too, the same each time."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**SIZES, **options})).eval()
    return with_random_vectors(model)


def with_random_vectors(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.1, 0.3)
    return model


def mask_of(name: str, length: int = LENGTH) -> Tensor | None:
    """A mask of the table; between its places are as many as a longer row takes."""
    rows = MASKS[name]
    if rows is None:
        return None
    mask = torch.tensor(rows)
    return mask.repeat_interleave(-(-length // LENGTH), 1)[:, :length]


def inputs_of(name: str, length: int = LENGTH) -> dict[str, Tensor]:
    """Random tokens and a mask of the table, over padding that is no padding token."""
    ids = torch.randint(4, 50, (3, length), generator=torch.Generator().manual_seed(1))
    mask = mask_of(name, length)
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def seen(inputs: Mapping[str, Tensor]) -> Tensor:
    """Places whose hidden states are transformers': tokens, and the first of each row."""
    some = inputs.get("input_ids", inputs.get("inputs_embeds"))
    assert some is not None
    mask = inputs.get("attention_mask")
    places = torch.ones(some.shape[:2]) if mask is None else mask.clone()
    places[:, 0] = 1
    return places.bool()


def hidden_and_gradients(
    model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and the gradients of a loss made from those that are transformers'."""
    model.zero_grad()
    hidden = model(**inputs).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.shape[-1]).cos()
    (hidden[seen(inputs)] * weights).square().sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same_hidden(found: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> None:
    places = seen(inputs)
    scale = 1 + expected[places].abs().max().item()
    torch.testing.assert_close(found[places], expected[places], rtol=1e-5, atol=1e-5 * scale)
    assert not found[~places].any()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """That of a key's bias is zero but for rounding, so the largest gradient is the scale."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        ours = found.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            ours, gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found.keys() <= expected.keys()


def assert_same(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Accelerate, and compare hidden states and gradients; restore."""
    expected, gradients = hidden_and_gradients(model, inputs)
    accelerate(model)
    found, found_gradients = hidden_and_gradients(model, inputs)
    assert_same_hidden(found, expected, inputs)
    assert_same_gradients(found_gradients, gradients)
    restore(model)
    assert torch.equal(hidden_and_gradients(model, inputs)[0], expected)


def assert_same_hidden_states_of_all_layers(
    model: PreTrainedModel, inputs: Mapping[str, Tensor]
) -> None:
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        accelerate(model)
        found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_same_hidden(ours, theirs, inputs)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], found.last_hidden_state)


def assert_same_packed_outputs(model: PreTrainedModel) -> None:
    """Padded inputs, and packed ones with rows behind the last sequence, which come to nothing."""
    inputs = inputs_of("right")
    is_token = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    accelerate(model, packed=True)
    lengths = nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0)).int()
    ids = nn.functional.pad(inputs["input_ids"][is_token], (0, 2))[None]
    packed = {"input_ids": ids, "cu_seq_lens_q": lengths, "max_length_q": LENGTH}
    for given in (inputs, packed):
        with torch.no_grad():
            found = model(**given, output_hidden_states=True)
        assert torch.equal(found.cu_seqlens, lengths)
        assert found.max_seqlen == LENGTH
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            tokens = ours[0, : lengths[-1]]
            scale = 1 + theirs[is_token].abs().max().item()
            torch.testing.assert_close(tokens, theirs[is_token], rtol=1e-5, atol=1e-5 * scale)


def assert_same_under_autocast(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Not further from float64 than twice what transformers makes in bfloat16."""
    places = seen(inputs)
    exact, exact_gradients = hidden_and_gradients(model.double(), inputs)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, gradients = hidden_and_gradients(model, inputs)
        accelerate(model)
        found, found_gradients = hidden_and_gradients(model, inputs)
    assert found.dtype == hidden.dtype
    assert_within_twice(found[places], hidden[places], exact[places])
    largest = max(gradient.norm() for gradient in exact_gradients.values())
    for name, gradient in exact_gradients.items():
        allowed = 2 * (gradients[name].double() - gradient).norm()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * largest
        assert (found_gradients[name].double() - gradient).norm() <= max(allowed, rounding), name


def assert_same_with_checkpointed_layers(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], use_reentrant: bool
) -> None:
    """A model in training mode, without dropout, whose layers are computed again."""
    expected, gradients = hidden_and_gradients(model.train(), inputs)
    accelerate(model)
    # Of two names, transformers 5.17 has the second and later versions warn of it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(model, next(name for name in names if hasattr(model, name)))
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # which reentrant checkpoints need
    found, found_gradients = hidden_and_gradients(model, inputs)
    assert_same_hidden(found, expected, inputs)
    assert_same_gradients(found_gradients, gradients)


def assert_copies_stay_accelerated(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    plain = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(copied(**inputs).last_hidden_state, expected)
            restore(copied)
            assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]


def assert_same_task_gradients(model: PreTrainedModel) -> None:
    """Two tasks, of one example and of two, in one batch: each has the gradients of its own."""
    inputs, sizes = inputs_of("right"), (1, 2)

    def losses(hidden: Tensor) -> list[Tensor]:
        return [part[:, 0].square().sum() for part in hidden.split(sizes)]

    expected = []
    for task in range(2):
        model.zero_grad()
        losses(model(**inputs).last_hidden_state)[task].backward()
        expected.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    model.zero_grad()
    accelerate(model)
    collector = TaskGradients(model, 2)
    with collector.batch(sizes):
        hidden = model(**inputs).last_hidden_state
    torch.autograd.backward(losses(hidden))
    views = dict(collector.named_views())
    for task, gradients in enumerate(expected):
        assert_same_gradients({name: views[name][task] for name in gradients}, gradients)


def _module_of(kind: str) -> Any:
    config = type(AutoConfig.for_model(kind)).__module__
    return importlib.import_module(config.replace(".configuration_", ".modeling_"))


def heads_of(kind: str) -> list[str]:
    """Names of transformers' model classes of a type, without encoders."""
    module = _module_of(kind)
    models = [name for name in module.__all__ if issubclass(getattr(module, name), PreTrainedModel)]
    return [name for name in models if not name.endswith(("PreTrainedModel", "Model"))]


def head_of(kind: str, name: str, **options: Any) -> PreTrainedModel:
    """A small model with a head."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return with_random_vectors(getattr(_module_of(kind), name)(config).eval())


def assert_same_heads(model: PreTrainedModel) -> None:
    """Compare what a head gives where its place is a token, and its gradients.

    Padding is on the right, since heads look at the first place; logits of spans are compared with
    padding masked.
    """
    inputs = inputs_of("right")
    name = type(model).__name__
    mask = inputs["attention_mask"].bool()
    if name.endswith("MultipleChoice"):
        inputs = {key: torch.stack([x, x.roll(1, 0)], 1) for key, x in inputs.items()}

    def outputs_and_gradients() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        outputs = dict(model(**inputs).items())
        per_token = {k: x[mask] if x.shape[:2] == mask.shape else x for k, x in outputs.items()}
        torch.stack([x.square().sum() for x in per_token.values()]).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {k: x.detach() for k, x in per_token.items()}, gradients

    expected, gradients = outputs_and_gradients()
    accelerate(model)
    found, found_gradients = outputs_and_gradients()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = 1 + value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * scale)
    assert_same_gradients(found_gradients, gradients)
    if name.endswith("QuestionAnswering"):
        logits = model(**inputs).start_logits
        assert (logits[~mask] == torch.finfo(logits.dtype).min).all()
    restore(model)
