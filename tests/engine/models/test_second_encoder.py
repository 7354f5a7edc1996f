"""Another encoder than BERT trains, is exchanged, stored and exported: no name is known outside."""

import ast
import copy
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kernels
from engine import export, train
from engine.config.objective import ObjectiveRecipe
from engine.data.collate import pack
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.distributed import gradient_sync
from engine.gradients.balancing import Balancer, BalanceSettings, TrainedTasks, build_method
from engine.gradients.flat_parameters import FlatParameters
from engine.gradients.groups import ParamGroups
from engine.models import hf_weights
from engine.models.context import Context
from engine.models.multitask import MultitaskModel
from engine.models.registry import MODELS
from engine.optim.adamw import AdamW
from engine.runs.objectives import build_examples, head_settings
from engine.runs.run import open_run
from engine.training.step import MultitaskStep
from engine.utils.json_text import dump_json

from ...conftest import REPOSITORY
from ...kernels.pcgrad_reference import reference_pcgrad
from ..distributed.test_gradient_sync import Watched
from ..gradients.test_one_pass_backward import within_twice
from ..small_models import DECAY, SEED, make_micro_batches, random_split
from . import second_encoder
from .second_encoder import SPEC, PreNormConfig, PreNormEncoder, PreNormLayer

TASKS = ("quora", "sts")
LR, SIZES, STEPS = 1e-3, (6, 4), 3


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in SPEC.model_types:
        monkeypatch.setitem(MODELS, model_type, SPEC)


def build_model(*, adapter_width: int = 0, objectives=None) -> MultitaskModel:
    torch.manual_seed(0)
    model = MultitaskModel(
        PreNormConfig(),
        [FORMATS[task] for task in TASKS],
        dict.fromkeys(TASKS, "shared"),
        pooling="mean",
        dropout_p=0.0,
        adapter_width=adapter_width,
        objectives=objectives,
    )
    for adapter in model.adapters.values():
        adapter.up.weight.data.normal_(0, 0.2)
    return model.train()


def build_step(model: MultitaskModel, surgery: str, freeze_encoder: bool) -> MultitaskStep:
    device = torch.device("cpu")
    flat = FlatParameters(
        model,
        TASKS,
        device=device,
        compute_dtype=torch.float32,
        freeze_encoder=freeze_encoder,
    )
    groups = ParamGroups(flat, TASKS, surgery)
    method = build_method("pcgrad", TrainedTasks(TASKS, (6, 4)), BalanceSettings())
    return MultitaskStep(
        model,
        TASKS,
        flat,
        AdamW(flat, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY),
        groups,
        Balancer(method, groups.sole_tasks, device),
        loss_weights=(1.0, 1.0),
        clip_norm=None,
        seed=SEED,
    )


def gradients(model, batch, names) -> dict[str, Tensor]:
    """``{name: [K, *shape]}`` from K ordinary backward passes."""
    parameters = dict(model.named_parameters())
    rows = {name: torch.zeros(len(names), *p.shape).to(p) for name, p in parameters.items()}
    for k, loss in enumerate(model.losses(model(batch, names), batch, names)):
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                rows[name][k] = gradient
    return rows


def in_dtype(batch, dtype: torch.dtype):
    return replace(batch, labels=tuple(labels.to(dtype) for labels in batch.labels))


STAGES = ("encoder.table", "encoder.blocks.0", "encoder.blocks.1", "encoder.last")
OWN = tuple(f"{kind}.{task}" for kind in ("heads", "adapters") for task in TASKS)


def stage_of(name: str) -> str:
    (stage,) = (one for one in (*STAGES, "pair", *OWN) if name.startswith(f"{one}."))
    return stage


def plain_steps(
    model, batches, dtype: torch.dtype, surgery: str, freeze_encoder: bool
) -> dict[str, Tensor]:
    """Train by K backward passes, Algorithm 1 on each part, torch's AdamW; return all weights."""
    model = copy.deepcopy(model).to(dtype)
    trained = {
        name: p
        for name, p in model.named_parameters()
        if not (freeze_encoder and name.startswith("encoder."))
    }
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for number, batch in enumerate(batches):
        rows = gradients(model, in_dtype(batch, dtype), TASKS)
        order = kernels.draw_order(len(TASKS), torch.tensor((SEED << 32) + number))
        parts: dict[str, list[str]] = {}
        for name in trained:
            parts.setdefault(stage_of(name) if surgery == "layer" else "model", []).append(name)
        for names in parts.values():
            part = torch.cat([rows[name].flatten(1) for name in names], dim=1)
            combined = reference_pcgrad(part, order).to(dtype)
            pieces = combined.split([trained[name].numel() for name in names])
            for name, piece in zip(names, pieces, strict=True):
                trained[name].grad = piece.view_as(trained[name])
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("adapter_width", [0, 8])
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize(("surgery", "micro_batches"), [("model", 1), ("layer", 1), ("layer", 2)])
def test_steps_equal_the_plain_way(adapter_width, freeze_encoder, surgery, micro_batches):
    """Distances from float64 by the 2x rule, against the plain way's in fp32."""
    model = build_model(adapter_width=adapter_width)
    model.encoder.checkpoint_layers = micro_batches > 1
    batches = [make_micro_batches(10 * n, SIZES, 1, TASKS)[0] for n in range(STEPS)]
    exact, torchs = (
        plain_steps(model, batches, dtype, surgery, freeze_encoder)
        for dtype in (torch.float64, torch.float32)
    )
    before = copy.deepcopy(model.encoder.state_dict())
    step = build_step(model, surgery, freeze_encoder)
    for number in range(STEPS):
        step(make_micro_batches(10 * number, SIZES, micro_batches, TASKS), number, LR)
    moved = [name for name, p in model.encoder.named_parameters() if not p.equal(before[name])]
    assert bool(moved) != freeze_encoder
    names = list(step.parameters.slots)
    ours, others, exactly = (
        torch.cat([weights[name].flatten().double() for name in names])
        for weights in (dict(model.named_parameters()), torchs, exact)
    )
    assert (ours - exactly).norm() <= 2 * (others - exactly).norm()
    if surgery == "layer":
        stages = {stage_of(name) for name in names}
        assert set(step.groups.names) == stages


def test_rows_equal_k_backward_passes_beside_a_tied_decoder():
    """The head of masked LM reaches the whole of this encoder's table, step after step."""
    texts = [f"the film {n} was fine. i saw it {n} times. it is {n * n}!" for n in range(12)]
    settings = ObjectiveRecipe(kind="masked_lm")
    torch.manual_seed(1)
    model = build_model(objectives={"lm": head_settings("lm", settings, PreNormConfig())})
    names = ("lm", "sts")
    exact, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    device = torch.device("cpu")
    flat = FlatParameters(model, names, device=device, compute_dtype=torch.float32)
    examples = build_examples("lm", settings, texts, Tokenizer.train(texts, 90), 64, 0)
    for number in range(2):
        sources = [examples, random_split("sts", 5, vocab=97, seed=number)]
        batch = pack(sources, [torch.arange(5).numpy()] * 2, number)
        flat.clear_partial_gradients()
        scores = model(batch, names, task_rows=True)
        torch.stack(model.losses(scores, batch, names)).sum().backward()
        references, plain = (gradients(m, batch, names) for m in (exact, same))
        scale = max(row.norm() for row in references.values())
        for name, row in flat.named_views(flat.rows):
            assert within_twice(row, plain[name], references[name], scale), (number, name)
        model.zero_sparse_rows(batch)


def test_no_row_of_its_table_lingers():
    model = build_model()
    step = build_step(model, "model", freeze_encoder=False)
    step(make_micro_batches(0, SIZES, 1, TASKS), 0, LR)
    rows = dict(step.parameters.named_views(step.parameters.rows))
    assert not rows["encoder.table.weight"].any()
    assert rows["encoder.blocks.0.qkv.weight"].any()


def test_its_buckets_leave_stage_by_stage(monkeypatch):
    monkeypatch.setattr(gradient_sync.dist, "get_rank", lambda: 0)
    model = build_model(adapter_width=8)
    step = build_step(model, "model", freeze_encoder=False)
    step.sync = watched = Watched(model, step.parameters)
    step._task_gradients(make_micro_batches(0, SIZES, 1, TASKS))
    assert watched.before_the_end == ["heads", "pair", "encoder.blocks.1", "encoder.blocks.0"]
    assert list(watched.sent)[4:] == ["encoder.table", "vectors"]
    rows = step.parameters.rows
    for bucket in step.parameters.layout.buckets:
        assert torch.equal(watched.sent[bucket.name][:, bucket.columns], rows[:, bucket.columns])


def test_it_is_read_trained_and_exported(tmp_path):
    config = PreNormConfig(vocab_size=256)
    torch.manual_seed(0)
    state = PreNormEncoder(config).state_dict()
    texts = [f"the film {n} was fine, i saw it {n} times" for n in range(40)]
    (tmp_path / "model").mkdir()
    Tokenizer.train(texts, 256).save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(dump_json(config.to_huggingface()))
    save_file(
        hf_weights.to_huggingface_state(state, config), tmp_path / "model" / "model.safetensors"
    )
    arguments = ["demo", "--init", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    settings = [
        "max_train_examples=64",
        "epochs=1",
        "balance_granularity=layer",
        "log_layer_cosines_every=1",
        "precision=fp32",
    ]
    assert train.main([*arguments, "--max-steps", "2", "--set", *settings]) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    trained, _ = open_run(tmp_path / "run").trained_model(torch.device("cpu"))
    assert hf_weights.read_config(tmp_path / "out").hidden_size == 32
    assert found.keys() == {f"model.{name}" for name in state}
    for name, tensor in trained.encoder.state_dict().items():
        assert torch.equal(found[f"model.{name}"], tensor)
        assert not torch.equal(tensor, state[name]), name


class Bare(PreNormEncoder):
    """With a parameter that no layer of this engine holds."""

    def __init__(self, config: PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[0].gain = torch.nn.Parameter(torch.ones(1))


class Stray(PreNormEncoder):
    """With a parameter that is in no stage."""

    def stages(self):
        return super().stages()[:-1]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Bare, r"encoder\.blocks\.0\.gain: a parameter that tasks share, of a PreNormLayer"),
        (Stray, r"encoder\.last\.weight: in no stage"),
    ],
)
def test_parameters_without_a_description_are_refused(monkeypatch, encoder, message):
    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, encoder=encoder))
    with pytest.raises(TypeError, match=message):
        build_model().parameter_specs(TASKS)


def test_checkpointing_runs_every_stage_but_the_first_twice():
    model = build_model()
    (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
    calls = []
    for stage in model.encoder_stages():
        stage.module.register_forward_pre_hook(lambda module, _: calls.append(type(module)))
    model.encoder.checkpoint_layers = True
    model.encoder(batch.input_ids, Context.of(batch)).sum().backward()
    assert calls.count(PreNormLayer) == 4
    assert calls[0] is type(model.encoder.word_table)
    assert calls.count(calls[0]) == 1


_NAMES = re.compile(
    r"(encoder|pair)\.(?!\w+($| = ))|(heads|adapters|embeddings|layers)\.(?!safetensors)"
)
_PARTS_OF_BERT = {"embeddings", "layers", "token_type", "qkv", "intermediate"}


def _names_of_parts(path: Path) -> Iterator[str]:
    """Yield what looks like the name of a model's part, in strings and encoders' attributes."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and _NAMES.match(node.value):
                yield node.value
        elif isinstance(node, ast.Attribute) and node.attr in _PARTS_OF_BERT:
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr == "encoder":
                yield ast.unparse(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                is_rows = isinstance(target, ast.Attribute) and target.attr == "rows"
                if is_rows and ast.unparse(target) != "self.rows":
                    yield ast.unparse(node)


# What files say and will go on to say: a recipe, metrics.jsonl, heads.safetensors.
_NAMES_IN_FILES = {
    "config/tables.py": {"encoder."},
    "reporting/run_data.py": {"heads.", "adapters."},
    "exporting/folder.py": {"pair."},
}


def test_nothing_outside_the_models_knows_their_parts_by_name():
    engine = REPOSITORY / "engine"
    found = {
        path.relative_to(engine).as_posix(): set(_names_of_parts(path))
        for path in engine.rglob("*.py")
        if "models" not in path.relative_to(engine).parts
    }
    assert {path: names for path, names in found.items() if names} == _NAMES_IN_FILES


def test_the_page_on_extending_shows_this_encoder(monkeypatch):
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("\n## Add an encoder\n")[2].partition("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shown, here = (
        _without_imports(text) for text in (file, Path(second_encoder.__file__).read_text())
    )
    assert shown == here
    module = ModuleType("engine.models.prenorm")
    module.__package__ = "engine.models"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, "engine/models/prenorm.py", "exec"), vars(module))
    models = {}
    exec(line, {"MODELS": models, "prenorm": module})
    assert models == {"prenorm": module.SPEC}


def _without_imports(code: str) -> list[str]:
    """Return the statements of a module but its docstring and imports."""
    imports = (ast.Import, ast.ImportFrom)
    return [ast.unparse(node) for node in ast.parse(code).body[1:] if not isinstance(node, imports)]
