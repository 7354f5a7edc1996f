"""Models, batches and comparisons for the tests of `accelerate` on transformers.

A batch has :data:`LENGTH` places in each of its rows; a case of padding says which are tokens.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from kernels import accelerate, restore
from kernels.integrations.transformers_models import FAMILIES

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,  # fewer than a batch's tokens
    "type_vocab_size": 2,
    "initializer_range": 0.2,  # what is seen at padding then changes the outputs by far
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
# What members of the family ask for besides.
OPTIONS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,  # fewer than there are distances
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "distilbert": {"hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "electra": {"embedding_size": 16},
    "ernie": {"use_task_id": True},
    "modernbert": {
        **{f"{name}_token_id": 1 for name in ("bos", "cls", "eos", "sep")},  # within SIZES
        "pad_token_id": 0,
        "local_attention": 8,  # fewer tokens than a row's
        "mlp_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "roc_bert": {"shape_vocab_size": 20, "pronunciation_vocab_size": 20},
    "splinter": {"question_token_id": 50},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}
_BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
# Other configs with which a family's encoder computes otherwise.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeBERTa v3": ("deberta-v2", {"position_biased_input": False, "type_vocab_size": 0}),
    "DeBERTa v2": (
        "deberta-v2",
        {
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": -1,
            "max_relative_positions": 6,
            "norm_rel_ebd": "none",
            "share_att_key": False,
        },
    ),
    "DeBERTa of absolute positions": (
        "deberta-v2",
        {"relative_attention": False, "pos_att_type": [], "embedding_size": 16},
    ),
    "DeBERTa with a convolution": (
        "deberta-v2",
        {"pos_att_type": ["c2p"], "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "ModernBERT with biases": ("modernbert", _BIASES),
    # As far as the farthest place of a row, and one less.
    "ModernBERT of wide windows": ("modernbert", {"local_attention": 20}),
    "ModernBERT of narrower windows": ("modernbert", {"local_attention": 18}),
}
KINDS = sorted(FAMILIES)
LENGTH = 11
ROWS = 3
MASKS = {
    "none": None,
    "ones": [[1] * 11] * 3,
    "right": [[1] * 4 + [0] * 7, [1] * 11, [1] * 9 + [0] * 2],
    "left": [[0] * 7 + [1] * 4, [1] * 11, [0] * 2 + [1] * 9],
    "both": [[0] * 3 + [1] * 4 + [0] * 4, [1] * 11, [0] + [1] * 9 + [0]],
    "between": [[1, 0] * 5 + [1], [1] * 11, [0] * 2 + [1] * 4 + [0] * 2 + [1] * 3],
    "empty row": [[1] * 4 + [0] * 7, [0] * 11, [0] * 2 + [1] * 9],
    "one token": [[1] + [0] * 10, [0] * 10 + [1], [1] * 9 + [0] * 2],
}
# Padding has the ids of padding here, as a tokenizer gives it; elsewhere it has other ids.
_WITH_PADDING_IDS = ("right", "both")
SEQUENCES = (4, 11, 1, 9)
"""Lengths of the sequences of packed inputs."""


def mask_of(case: str, length: int = LENGTH) -> Tensor | None:
    """A mask ``[ROWS, length]``; in longer rows each of its places is repeated."""
    rows = MASKS[case]
    if rows is None:
        return None
    return torch.tensor(rows).repeat_interleave(-(-length // LENGTH), 1)[:, :length]


# ---- models -------------------------------------------------------------------------------------


def classes() -> Iterator[tuple[str, str]]:
    """Every model class of transformers with one of the family's configs: its type and name."""
    for kind in KINDS:
        module = _module(kind)
        for name, found in vars(module).items():
            is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
            if is_model and found.__module__ == module.__name__ and "forward" in vars(found):
                yield kind, name


def _module(kind: str) -> Any:
    config = type(AutoConfig.for_model(kind)).__module__
    return importlib.import_module(config.replace(".configuration_", ".modeling_"))


def is_decoder(name: str) -> bool:
    return name.endswith(("ForCausalLM", "LMHeadModel", "GenerationDecoder"))


def config_of(kind: str, **options: Any) -> Any:
    return AutoConfig.for_model(kind, **SIZES | OPTIONS.get(kind, {}) | options)


def head_model(kind: str, name: str, **options: Any) -> PreTrainedModel:
    """A model of a class, in evaluation mode, with biases and norms that are not the first ones."""
    torch.manual_seed(0)
    config = config_of(kind, is_decoder=is_decoder(name), **options)
    model = getattr(_module(kind), name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def base_model(kind: str, **options: Any) -> PreTrainedModel:
    """The encoder of a family without a head: the first of its classes."""
    return head_model(kind, next(name for found, name in classes() if found == kind), **options)


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def is_splinter_head(model: nn.Module) -> bool:
    return hasattr(model, "splinter_qass")


def is_choice(model: nn.Module) -> bool:
    return type(model).__name__.endswith("MultipleChoice")


# ---- batches ------------------------------------------------------------------------------------


def input_ids(model: PreTrainedModel, case: str, length: int = LENGTH) -> Tensor:
    """Ids ``[ROWS, length]``."""
    ids = torch.randint(4, 50, (ROWS, length), generator=torch.Generator().manual_seed(1))
    mask = mask_of(case, length)
    if is_splinter_head(model):  # spans are selected for these tokens
        first = ids.new_zeros(ROWS, 1) if mask is None else mask.argmax(1, keepdim=True)
        ids.scatter_(1, first, model.config.question_token_id)
    if mask is not None and case in _WITH_PADDING_IDS:
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    return ids


def batch(model: PreTrainedModel, case: str, length: int = LENGTH) -> dict[str, Any]:
    """The arguments of a forward pass; for multiple choice two choices a question."""
    mask = mask_of(case, length)
    arguments = {"input_ids": input_ids(model, case, length), "attention_mask": mask}
    return as_choices(arguments) if is_choice(model) else arguments


def as_choices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Make ``[ROWS, 2, LENGTH]`` of the arguments."""
    return {
        name: value if value is None else torch.stack([value, value.roll(1, 0)], 1)
        for name, value in arguments.items()
    }


# ---- comparisons --------------------------------------------------------------------------------


class Places(NamedTuple):
    """Places of a batch ``[B, S]``, bool.

    Attributes:
        tokens: those of tokens.
        computed: those whose hidden states are what transformers gives.
        compared: those whose logits are compared.
    """

    tokens: Tensor
    computed: Tensor
    compared: Tensor


def places(model: PreTrainedModel, case: str, length: int = LENGTH) -> Places:
    mask = mask_of(case, length)
    tokens = torch.ones(ROWS, length, dtype=torch.bool) if mask is None else mask.bool()
    if is_choice(model):
        tokens = torch.stack([tokens, tokens.roll(1, 0)], 1).flatten(0, 1)
    computed = tokens.clone()
    name = type(model).__name__
    if not name.endswith("QuestionAnswering") or is_splinter_head(model):
        computed[:, 0] = True
    return Places(tokens, computed, computed & has_tokens(model, tokens)[:, None])


def has_tokens(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Rows ``[B]`` whose first place transformers computes as these kernels do.

    Where a row has no token at all, eager attention averages what it masks, torch's gives zeros.
    """
    is_eager = getattr(model, "_attention_before", model.config._attn_implementation) == "eager"
    return tokens.any(1) if is_eager else torch.ones_like(tokens[:, 0])


def flat(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All that a forward pass returns: logits, hidden states, what is pooled."""
    found: dict[str, Tensor] = {}
    for name, value in outputs.items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(tensor, Tensor):
                found[f"{name}.{i}"] = tensor
    return found


def compared(name: str, value: Tensor, where: Places) -> Tensor:
    """The elements of an output that are the same as transformers'."""
    if name.startswith(("start_logits", "end_logits")):
        rows = where.tokens.any(1)
        return value.movedim(-1, 1)[where.tokens & rows[:, None]]
    if value.shape[:2] == where.tokens.shape:
        return value[where.compared]
    rows = where.compared[:, 0] | where.tokens[:, 0]
    count = len(value)  # a row for each question of multiple choice
    return value[rows.unflatten(0, (count, -1)).all(1)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Errors are at most ``tolerance`` of the largest number, and of each.

    Two layers of fp32 sums over at most 48 numbers: 1e-5 is a hundred roundings.
    """
    assert found.dtype == expected.dtype
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        *(found, expected),
        rtol=tolerance,
        atol=tolerance * (1 + scale),
        msg=lambda message: f"{what}: {message}",
    )


def assert_same_outputs(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Places, what: str
) -> None:
    """Outputs are transformers', hidden states at padding zeros, and no span lies there."""
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        label = f"{what}, {name}"
        assert found[name].shape == value.shape, label
        pair = (compared(name, x, where) for x in (found[name], value))
        assert_close(*pair, what=label)
        if name.startswith(("last_hidden_state", "hidden_states")):
            assert not found[name][~where.computed].any(), label
        if name.startswith(("start_logits", "end_logits")):
            padding = found[name].movedim(-1, 1)[~where.tokens]
            assert (padding < 0.9 * torch.finfo(value.dtype).min).all(), label


def loss_of(outputs: Mapping[str, Tensor], where: Places) -> Tensor:
    """A loss over tokens and over what is pooled, in which each number has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in outputs.items():
        chosen = compared(name, value, where).double()
        if chosen.numel():
            weights = torch.linspace(-1, 1, chosen.numel(), dtype=torch.float64)
            total = total + (chosen.flatten() * weights).mean() + chosen.square().mean()
    return total


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = ""
) -> None:
    """Errors are at most 1e-4 of a gradient's largest number.

    The gradients of keys' biases are zero but for rounding, whose size the largest gradient tells.
    """
    assert found.keys() == expected.keys(), what
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item() if gradient.numel() else 0.0
        allowed = 1e-4 * gradient.abs().max().item() + 1e-6 * largest
        assert error <= allowed, f"{what}, {name}: {error:.2e} against {allowed:.2e}"


def run(
    model: PreTrainedModel, arguments: Mapping[str, Any], where: Places
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs with all hidden states, and the gradients of a loss over them."""
    model.zero_grad()
    outputs = flat(model(**arguments, output_hidden_states=True))
    loss_of(outputs, where).backward()
    return {name: value.detach() for name, value in outputs.items()}, gradients_of(model)


def assert_accelerated_runs_are_the_same(
    model: PreTrainedModel, cases: Iterable[str] = MASKS, length: int = LENGTH
) -> None:
    """Run every case of padding, accelerate, and run them again; then restore."""
    where = {case: places(model, case, length) for case in cases}
    expected = {case: run(model, batch(model, case, length), where[case]) for case in where}
    accelerate(model)
    for case, (outputs, gradients) in expected.items():
        found, found_gradients = run(model, batch(model, case, length), where[case])
        assert any(key.startswith("hidden_states") for key in found)
        assert_same_outputs(found, outputs, where[case], case)
        assert_same_gradients(found_gradients, gradients, case)
    restore(model)
    last = next(reversed(where))
    again, _ = run(model, batch(model, last, length), where[last])
    assert all(torch.equal(value, again[key]) for key, value in expected[last][0].items())
