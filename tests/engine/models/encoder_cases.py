"""The cases that the test of every encoder runs; docs/extending.md shows such a test."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kernels
from engine import export, train
from engine.data.collate import PackedBatch
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.gradients.balancing import TrainedTasks
from engine.models import hf_weights
from engine.models.config import EncoderConfig
from engine.models.context import Context
from engine.models.encoder import Encoder
from engine.models.heads import HeadSettings
from engine.models.layers import Embedding
from engine.models.multitask import MultitaskModel
from engine.models.registry import spec_of
from engine.runs.run import open_run
from engine.utils.json_text import dump_json

from ...kernels.pcgrad_reference import reference_pcgrad
from ..small_models import DECAY, SEED, build_step, make_micro_batches

TASKS = ("quora", "sts")
TRAINED = TrainedTasks(TASKS, (6, 4))
LR, SIZES, STEPS = 1e-3, (6, 4), 3
# Not small against gradients: AdamW divides by their size, so that the rounding of one that is
# nearly zero would be a step.
EPS = 1e-4
CPU = torch.device("cpu")


class EncoderCase(NamedTuple):
    """An encoder of a small shape.

    Attributes:
        config: of a registered model type.  At least 97 entries in the vocabulary and 64 positions;
            ``initializer_range=0.2``, so that tasks conflict and gradients are far from zero.
        stages: the names of its stages, in the order of the forward pass.
        tables: the names of its tables.
    """

    config: EncoderConfig
    stages: Sequence[str]
    tables: Sequence[str]

    def encoder(self, dropout_p: float = 0.0) -> Encoder:
        """An encoder with random weights."""
        torch.manual_seed(0)
        config = self.with_dropout(dropout_p)
        return spec_of(config).encoder(config)

    def with_dropout(self, p: float) -> EncoderConfig:
        """The config with ``p`` as the rate of every dropout."""
        return self.config.changed(hidden_dropout_prob=p, attention_probs_dropout_prob=p)

    def model(
        self, *, adapter_width: int = 0, objectives: dict[str, HeadSettings] | None = None
    ) -> MultitaskModel:
        """A model of two tasks, without dropout."""
        torch.manual_seed(0)
        model = MultitaskModel(
            self.with_dropout(0.0),
            [FORMATS[task] for task in TASKS],
            dict.fromkeys(TASKS, "shared"),
            pooling="mean",
            dropout_p=0.0,
            adapter_width=adapter_width,
            objectives=objectives,
        )
        for adapter in model.adapters.values():
            adapter.up.weight.data.normal_(0, 0.2)  # past its beginning at zero
        return model.train()

    def stage_of(self, parameter: str) -> str:
        """The stage of a model's parameter, by its name."""
        own = (f"{kind}.{task}" for kind in ("heads", "adapters") for task in TASKS)
        stages = (*(f"encoder.{stage}" for stage in self.stages), "pair", *own)
        (stage,) = (stage for stage in stages if parameter.startswith(f"{stage}."))
        return stage


class TrainingVariant(NamedTuple):
    """A way of training.

    Attributes:
        granularity: what PCGrad balances: all gradients together, or each layer's.
        micro_batches: of a step; with several, activations are checkpointed.
        freeze_encoder: train the heads alone.
        adapter_width: of the tasks' adapters; 0 for none.
    """

    granularity: str
    micro_batches: int
    freeze_encoder: bool
    adapter_width: int


every_training_variant = pytest.mark.parametrize(
    "variant",
    [
        TrainingVariant(*balanced, freeze_encoder, adapter_width)
        for balanced in (("model", 1), ("layer", 1), ("layer", 2))
        for freeze_encoder in (False, True)
        for adapter_width in (0, 8)
    ],
    ids=lambda variant: "-".join(map(str, variant)),
)


def gradients(model: MultitaskModel, batch: PackedBatch, tasks: Sequence[str]) -> dict[str, Tensor]:
    """``{name: [K, *shape]}`` from K ordinary backward passes."""
    parameters = dict(model.named_parameters())
    rows = {name: torch.zeros(len(tasks), *p.shape).to(p) for name, p in parameters.items()}
    for k, loss in enumerate(model.losses(model(batch, tasks), batch, tasks)):
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                rows[name][k] = gradient
    return rows


def assert_every_weight_is_reached(model: MultitaskModel, batch: PackedBatch) -> None:
    """Some task has a gradient for each weight; adapters work in every layer."""
    rows = gradients(model, batch, TASKS)
    unreached = [name for name, row in rows.items() if not row.any()]
    assert not unreached, f"no gradient reaches {', '.join(unreached)}"


def plain_steps(
    case: EncoderCase,
    model: MultitaskModel,
    batches: Sequence[PackedBatch],
    dtype: torch.dtype,
    variant: TrainingVariant,
) -> dict[str, Tensor]:
    """Train by K backward passes, Algorithm 1 on each part, torch's AdamW; return all weights."""
    model = copy.deepcopy(model).to(dtype)
    trained = {
        name: p
        for name, p in model.named_parameters()
        if not (variant.freeze_encoder and name.startswith("encoder."))
    }
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    for number, batch in enumerate(batches):
        labels = tuple(labels.to(dtype) for labels in batch.labels)
        rows = gradients(model, replace(batch, labels=labels), TASKS)
        order = kernels.draw_order(len(TASKS), torch.tensor((SEED << 32) + number))
        parts: dict[str, list[str]] = {}
        for name in trained:
            part = case.stage_of(name) if variant.granularity == "layer" else "model"
            parts.setdefault(part, []).append(name)
        for names in parts.values():
            part_rows = torch.cat([rows[name].flatten(1) for name in names], dim=1)
            combined = reference_pcgrad(part_rows, order).to(dtype)
            pieces = combined.split([trained[name].numel() for name in names])
            for name, piece in zip(names, pieces, strict=True):
                trained[name].grad = piece.view_as(trained[name])
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_steps_equal_the_plain_way(case: EncoderCase, variant: TrainingVariant) -> None:
    """Distances of all weights from float64 by the 2x rule, against the plain way's in fp32."""
    model = case.model(adapter_width=variant.adapter_width)
    assert [stage.name for stage in model.encoder.stages()] == list(case.stages)
    model.encoder.checkpoint_layers = variant.micro_batches > 1
    batches = [make_micro_batches(10 * n, SIZES, 1, TASKS)[0] for n in range(STEPS)]
    assert_every_weight_is_reached(model, batches[0])
    exact, torchs = (
        plain_steps(case, model, batches, dtype, variant)
        for dtype in (torch.float64, torch.float32)
    )
    before = copy.deepcopy(model.encoder.state_dict())
    step = build_step(
        model,
        trained=TRAINED,
        surgery=variant.granularity,
        eps=EPS,
        freeze_encoder=variant.freeze_encoder,
    )
    for number in range(STEPS):
        micro_batches = make_micro_batches(10 * number, SIZES, variant.micro_batches, TASKS)
        step(micro_batches, number, LR)
    moved = [name for name, p in model.encoder.named_parameters() if not p.equal(before[name])]
    assert bool(moved) != variant.freeze_encoder
    names = list(step.parameters.slots)
    ours, others, exactly = (
        torch.cat([weights[name].flatten().double() for name in names])
        for weights in (dict(model.named_parameters()), torchs, exact)
    )
    assert (ours - exactly).norm() <= 2 * (others - exactly).norm()
    if variant.granularity == "layer":
        assert set(step.groups.names) == {case.stage_of(name) for name in names}


def assert_no_gradient_row_lingers(case: EncoderCase) -> None:
    """The gradient rows of tables, and of nothing else, are zero after a step.

    A plan of the lookups, which batches for a GPU have, changes no bit.
    """
    masters = []
    for planned in (False, True):
        model = case.model()
        tables = {n for n, module in model.encoder.named_modules() if isinstance(module, Embedding)}
        assert tables == set(case.tables)
        step = build_step(model, trained=TRAINED)
        (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
        step(model.with_lookup_plan(batch) if planned else batch, 0, LR)
        rows = dict(step.parameters.named_views(step.parameters.rows))
        zero = {name for name, row in rows.items() if name.startswith("encoder.") and not row.any()}
        assert zero == {f"encoder.{table}.weight" for table in case.tables}
        masters.append(step.parameters.master)
    assert torch.equal(*masters)


def packed(lengths: Sequence[int], config: EncoderConfig, seed: int) -> tuple[Tensor, Context]:
    """Random token ids of sentences, their second halves of token type 1, and the context."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    positions = [torch.arange(length) for length in lengths]
    types = [(own > length // 2).long() for own, length in zip(positions, lengths, strict=True)]
    context = Context(
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        max_seqlen=max(lengths),
        position_ids=torch.cat(positions),
        token_type_ids=torch.cat(types),
        seed=torch.tensor(seed),
    )
    return ids, context


def dropouts_used(call: Callable[[], object]) -> list[int]:
    """Return the ``rng_offset`` of every kernel that drops something during a call."""
    used: list[int] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def run(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            if given.get("dropout_p", given.get("p")) and given.get("training", True):
                used.append(given["rng_offset"])
            return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        functions = {name: getattr(kernels, name) for name in kernels.__all__}
        for name, function in functions.items():
            is_function = inspect.isfunction(function)
            if is_function and "rng_offset" in inspect.signature(function).parameters:
                patch.setattr(kernels, name, recording(function))
        call()
    return used


def assert_dropouts_have_ids_of_their_own(case: EncoderCase) -> None:
    """No two share an id, none has one of the heads', and nothing but the seed decides."""
    encoder = case.encoder(dropout_p=0.5).train()
    ids, context = packed((5, 17, 1), encoder.config, seed=1)
    used = dropouts_used(lambda: encoder(ids, context))
    assert used, "hidden_dropout_prob and attention_probs_dropout_prob have no effect"
    assert len(set(used)) == len(used), f"shared dropout ids: {sorted(used)}"
    assert max(used) < encoder.num_dropouts, f"beyond num_dropouts: {sorted(used)}"
    one, same = encoder(ids, context), encoder(ids, context)
    other = encoder(ids, replace(context, seed=torch.tensor(2)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not dropouts_used(lambda: encoder.eval()(ids, context))


def write_folder(case: EncoderCase, folder: Path, model: nn.Module | None = None) -> Path:
    """Write a model folder with random weights, of this shape.

    Args:
        case: the encoder.
        folder: new.
        model: transformers' of the same shape; None for a folder in this engine's own layout.
    """
    torch.manual_seed(0)
    source = case.encoder() if model is None else model
    for parameter in source.parameters():
        if parameter.requires_grad:  # no bias may be zero, no norm one
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    if model is None:
        state = hf_weights.to_huggingface_state(source.state_dict(), case.config)
        state |= spec_of(case.config).untrained(case.config)
        (folder / "config.json").write_text(dump_json(case.config.to_huggingface()))
        save_file(state, folder / "model.safetensors")
    else:
        model.save_pretrained(folder)
    texts = [f"the film {n} was fine, i saw it {n} times" for n in range(40)]
    Tokenizer.train(texts, 90).save(folder)
    return folder


def assert_exported_as_it_was_read(case: EncoderCase, folder: Path, out: Path) -> None:
    """A frozen encoder leaves a run as it came, and a trained one with the trained weights.

    Args:
        case: the encoder.
        folder: of a model without heads (:func:`write_folder`).
        out: a folder for the runs.
    """
    before = load_file(folder / "model.safetensors")
    stored = [name for _, names, _ in spec_of(case.config).weights(case.config) for name in names]
    for freeze_encoder in (True, False):
        run, to = (out / f"{name}-{freeze_encoder}" for name in ("run", "export"))
        settings = ["max_train_examples=64", "epochs=1", "precision=fp32"]
        settings += ["balance_granularity=layer", f"freeze_encoder={str(freeze_encoder).lower()}"]
        if not freeze_encoder:
            settings.append("log_layer_cosines_every=1")
        arguments = ["demo", "--init", str(folder), "--out", str(run), "--max-steps", "2"]
        assert train.main([*arguments, "--set", *settings]) == 0
        assert export.main([str(run), "--to", str(to)]) == 0
        assert hf_weights.read_config(to) == hf_weights.read_config(run)
        after = load_file(to / "model.safetensors")
        lacking, further = (
            sorted(a.keys() - b.keys()) for a, b in ((before, after), (after, before))
        )
        assert not lacking, f"exported without {lacking}: SPEC needs `untrained`"
        assert not further, f"exported with {further}, which the folder has not"
        assert set(stored) <= after.keys()
        card, spec = (to / "README.md").read_text(), spec_of(case.config)
        assert f"tags: [{case.config.model_type}, " in card
        assert f"One {spec.name} encoder trained on" in card
        assert spec.untrained_note in " ".join(card.split())
        assert bool(spec.untrained_note) == ("`last_hidden_state`;" in card)
        trained, _ = open_run(run).trained_model(CPU)
        state = hf_weights.load_encoder_state(to, case.config)
        for name, tensor in trained.encoder.state_dict().items():
            assert torch.equal(state[name], tensor), name
        for name in stored:
            assert torch.equal(before[name], after[name]) == freeze_encoder, name


def assert_agrees_with_transformers(folder: Path) -> None:
    """Hidden states and gradients, by the 2x rule against transformers' in fp32.

    Args:
        folder: with a model of transformers (:func:`write_folder`).
    """
    from transformers import AutoModel

    config = hf_weights.read_config(folder)
    lengths = (5, 17, 1, 64)
    ids, context = packed(lengths, config, seed=1)
    projection = torch.randn(len(ids), config.hidden_size, dtype=torch.float64)

    def ours() -> tuple[Tensor, dict[str, Tensor]]:
        encoder = spec_of(config).encoder(config).eval()
        encoder.load_state_dict(hf_weights.load_encoder_state(folder, config))
        hidden = encoder(ids, context)
        (hidden * projection.to(hidden)).sum().backward()
        found = {name: p.grad for name, p in encoder.named_parameters()}
        return hidden.detach(), hf_weights.to_huggingface_state(found, config)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval().to(dtype)
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        states = []
        for own, types in zip(
            ids.split(lengths), context.token_type_ids.split(lengths), strict=True
        ):
            given = {"token_type_ids": types[None]} if takes_types else {}
            states.append(model(input_ids=own[None], **given).last_hidden_state[0])
        hidden = torch.cat(states)
        (hidden * projection.to(hidden)).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return hidden.detach(), found

    exact, torchs, engines = theirs(torch.float64), theirs(torch.float32), ours()
    assert exact[1].keys() == engines[1].keys()

    def errors(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        gradients = [found[1][name].double() - exact[1][name] for name in exact[1]]
        of_gradients = torch.cat([error.flatten() for error in gradients]).norm()
        return (found[0].double() - exact[0]).norm(), of_gradients

    for error, allowed in zip(errors(engines), errors(torchs), strict=True):
        assert error <= 2 * allowed
