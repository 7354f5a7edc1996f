"""Another encoder than BERT trains, is exchanged, stored and exported: no name is known outside.

It is the one of docs/extending.md, as it stands there, and so are the tests of its file.
"""

import ast
import copy
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.objective import ObjectiveRecipe
from engine.data.collate import pack
from engine.data.tokenizer import Tokenizer
from engine.distributed import gradient_sync
from engine.gradients.flat_parameters import FlatParameters
from engine.models.context import Context
from engine.models.layers import Embedding
from engine.models.registry import MODELS
from engine.models.spec import StoredWeights
from engine.runs.objectives import build_examples, head_settings
from engine.utils.errors import InputError

from ...conftest import REPOSITORY
from ...docs.extending import files, run_as, section
from ..distributed.test_gradient_sync import Watched
from ..gradients.test_one_pass_backward import within_twice
from ..small_models import build_step, make_micro_batches, random_split
from . import encoder_cases as cases
from .encoder_cases import SIZES, TASKS

SECTION = section("Add an encoder")
FILE, TEST = files(SECTION)
prenorm = run_as(files(SECTION)[FILE], FILE)
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, prenorm.__name__, prenorm)
    tests_of_the_page = run_as(files(SECTION)[TEST], TEST)
globals().update({n: test for n, test in vars(tests_of_the_page).items() if n.startswith("test_")})
CASE, SPEC = tests_of_the_page.CASE, prenorm.SPEC


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"\*\*The line in the registry.*?```python\n(.*?)```", SECTION, re.DOTALL)
    added = {}
    exec(line, {"MODELS": added, "prenorm": prenorm})
    for model_type, spec in added.items():
        monkeypatch.setitem(MODELS, model_type, spec)


def test_the_page_is_followed():
    assert (FILE, TEST) == ("engine/models/prenorm.py", "tests/engine/models/test_prenorm.py")
    assert MODELS["prenorm"] is SPEC
    names = {name for name in globals() if getattr(tests_of_the_page, name, None)}
    assert len([name for name in names if name.startswith("test_")]) == 4


def test_tensors_are_sorted_as_the_page_says():
    (loop,) = re.findall(r"^  ```python\n(.*?)^  ```", SECTION, re.DOTALL | re.MULTILINE)
    names = ("embeddings.a", "roformer.encoder.layer.0.b", "cls.predictions.c", "classifier.d")
    tensors, found = {name: torch.ones(1) for name in names}, StoredWeights({}, {}, {})
    exec(textwrap.dedent(loop), {"tensors": tensors.items(), "found": found})
    assert [list(kind) for kind in found] == [
        ["embeddings.a", "encoder.layer.0.b"],
        ["cls.predictions.c"],
        ["classifier.d"],
    ]


def test_other_configs_are_refused():
    config = CASE.config.to_huggingface()
    assert SPEC.config.from_huggingface(config) == CASE.config
    with pytest.raises(InputError, match="hidden_act = 'relu': expected 'gelu'"):
        SPEC.config.from_huggingface({**config, "hidden_act": "relu"})
    del config["d_model"]
    with pytest.raises(InputError, match="missing hidden_size"):
        SPEC.config.from_huggingface(config)


def test_rows_equal_k_backward_passes_beside_a_tied_decoder():
    """The head of masked LM reaches the whole of this encoder's table, step after step."""
    texts = [f"the film {n} was fine. i saw it {n} times. it is {n * n}!" for n in range(12)]
    settings = ObjectiveRecipe(kind="masked_lm")
    torch.manual_seed(1)
    model = CASE.model(objectives={"lm": head_settings("lm", settings, CASE.config)})
    names = ("lm", "sts")
    exact, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    flat = FlatParameters(model, names, device=cases.CPU, compute_dtype=torch.float32)
    examples = build_examples("lm", settings, texts, Tokenizer.train(texts, 90), 64, 0)
    for number in range(2):
        sources = [examples, random_split("sts", 5, vocab=97, seed=number)]
        batch = pack(sources, [torch.arange(5).numpy()] * 2, number)
        flat.clear_partial_gradients()
        scores = model(batch, names, task_rows=True)
        torch.stack(model.losses(scores, batch, names)).sum().backward()
        references, plain = (cases.gradients(m, batch, names) for m in (exact, same))
        scale = max(row.norm() for row in references.values())
        for name, row in flat.named_views(flat.rows):
            assert within_twice(row, plain[name], references[name], scale), (number, name)
        model.zero_sparse_rows(batch)


def test_its_buckets_leave_stage_by_stage(monkeypatch):
    monkeypatch.setattr(gradient_sync.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gradient_sync.dist, "get_world_size", lambda: 2)
    model = CASE.model(adapter_width=8)
    step = build_step(model, trained=cases.TRAINED)
    step.sync = watched = Watched(model, step.parameters)
    step._task_gradients(make_micro_batches(0, SIZES, 1, TASKS))
    assert watched.before_the_end == ["heads", "pair", "encoder.blocks.1", "encoder.blocks.0"]
    assert list(watched.sent)[4:] == ["encoder.table", "vectors"]
    rows = step.parameters.rows
    for bucket in step.parameters.layout.buckets:
        assert torch.equal(watched.sent[bucket.name][:, bucket.columns], rows[:, bucket.columns])


class Bare(prenorm.PreNormEncoder):
    """With a parameter that no layer of this engine holds."""

    def __init__(self, config: prenorm.PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[0].gain = torch.nn.Parameter(torch.ones(1))


class Stray(prenorm.PreNormEncoder):
    """With a parameter that is in no stage."""

    def stages(self):
        return super().stages()[:-1]


class Forgetful(prenorm.PreNormEncoder):
    """With a table that its lookups leave out."""

    def __init__(self, config: prenorm.PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[0].positions = Embedding(config.max_position_embeddings, config.hidden_size)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Bare, r"encoder\.blocks\.0\.gain: a parameter that tasks share, of a PreNormLayer"),
        (Stray, r"encoder\.last\.weight: in no stage"),
        (Forgetful, r"Forgetful\.lookups leaves out blocks\.0\.positions, whose gradient rows"),
    ],
)
def test_parameters_without_a_description_are_refused(monkeypatch, encoder, message):
    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, encoder=encoder))
    with pytest.raises(TypeError, match=message):
        CASE.model().parameter_specs(TASKS)


class FewDropouts(prenorm.PreNormEncoder):
    """With one dropout more than it says."""

    @property
    def num_dropouts(self):
        return super().num_dropouts - 1


class OneId(prenorm.PreNormEncoder):
    """With the same ids in both layers."""

    def __init__(self, config: prenorm.PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[1].dropout_id = 0


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (FewDropouts, r"beyond num_dropouts: \[0, 1, 2, 3, 4, 5\]"),
        (OneId, r"shared dropout ids: \[0, 0, 1, 1, 2, 2\]"),
    ],
)
def test_dropouts_that_share_an_id_are_found(monkeypatch, encoder, message):
    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, encoder=encoder))
    with pytest.raises(AssertionError, match=message):
        cases.assert_dropouts_have_ids_of_their_own(CASE)


def test_a_tensor_that_an_export_lacks_is_found(monkeypatch, tmp_path):
    """The folder has a pooler, of which the spec says nothing in ``untrained``."""

    def sort_weights(_config, tensors):
        encoder = dict(tensors)
        return StoredWeights(encoder, {}, {"pooler.weight": encoder.pop("pooler.weight")})

    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, sort_weights=sort_weights))
    file = cases.write_folder(CASE, tmp_path / "model") / "model.safetensors"
    save_file(load_file(file) | {"pooler.weight": torch.ones(1)}, file)
    with pytest.raises(AssertionError, match=r"without \['pooler.weight'\]"):
        cases.assert_exported_as_it_was_read(CASE, file.parent, tmp_path)


class OneAdapter(prenorm.PreNormEncoder):
    """With the first layer's adapters in both layers."""

    def __init__(self, config: prenorm.PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[1].number = 0


def test_adapters_that_a_layer_leaves_out_are_found(monkeypatch):
    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, encoder=OneAdapter))
    variant = cases.TrainingVariant("model", 1, freeze_encoder=False, adapter_width=8)
    with pytest.raises(AssertionError, match=r"no gradient reaches adapters\.quora\.qkv\.1\."):
        cases.assert_steps_equal_the_plain_way(CASE, variant)


class Buffered(prenorm.PreNormEncoder):
    """With values that are not trained."""

    def __init__(self, config: prenorm.PreNormConfig) -> None:
        super().__init__(config)
        self.blocks[0].register_buffer("sines", torch.arange(9.0).sin(), persistent=False)


def test_buffers_keep_their_dtype_when_weights_are_cast(monkeypatch):
    monkeypatch.setitem(MODELS, "prenorm", replace(SPEC, encoder=Buffered))
    model = CASE.model()
    model.cast(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.encoder.blocks[0].sines, torch.arange(9.0).sin())


def test_checkpointing_runs_every_stage_but_the_first_twice():
    model = CASE.model()
    (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
    calls = []
    for stage in model.encoder_stages():
        stage.module.register_forward_pre_hook(lambda module, _: calls.append(type(module)))
    model.encoder.checkpoint_layers = True
    model.encoder(batch.input_ids, Context.of(batch)).sum().backward()
    assert calls.count(prenorm.PreNormLayer) == 4
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
