"""Copies, pickles, children and siblings of an accelerated model."""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from kernels import FusedLayerNorm, accelerate, restore
from kernels.integrations import transformers_patch

from .transformers_cases import KINDS, SIZES, assert_close, base_model, flat, head_model

ROOT = Path(__file__).parents[2]
IDS = torch.randint(4, 50, (3, 11), generator=torch.Generator().manual_seed(0))
# Padding on the right, none, and on the left.
MASK = torch.tensor([[1] * 4 + [0] * 7, [1] * 11, [0] * 5 + [1] * 6])


def python(script: str, folder: Path) -> None:
    """Run a script in a process of its own, which finds this package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, env=environment)


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def is_accelerated(model: nn.Module) -> bool:
    """Whether all of it is; an error if a part only is."""
    found = {
        isinstance(module, FusedLayerNorm)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
    }
    found |= {
        module.config._attn_implementation == transformers_patch.IMPLEMENTATION
        for module in model.modules()
        if hasattr(module, "config")
    }
    assert len(found) == 1
    return found.pop()


def test_saved_models_in_another_process(tmp_path: Path) -> None:
    """One of each family, and a head, in a process that imports nothing of ours itself."""
    models = [base_model(kind) for kind in KINDS] + [head_model("bert", "BertForQuestionAnswering")]
    with torch.no_grad():
        expected = [flat(model(IDS, attention_mask=MASK)) for model in models]
    for model in models:
        accelerate(model)
    torch.save((models, IDS, MASK), tmp_path / "saved")
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "models, ids, mask = torch.load('saved', weights_only=False)\n"
        "import kernels\n"
        "with torch.no_grad():\n"
        "    outs = [dict(model(ids, attention_mask=mask)) for model in models]\n"
        "    for model in models: kernels.restore(model)\n"
        "    plain = [dict(model(ids, attention_mask=mask)) for model in models]\n"
        "assert not any('packed' in name for name in vars(models[0]))\n"
        "torch.save((outs, plain), 'out')"
    )
    python(script, tmp_path)
    found, plain = torch.load(tmp_path / "out")
    for model, outs, again, outputs in zip(models, found, plain, expected, strict=True):
        for name, value in outputs.items():
            label = f"{type(model).__name__}, {name}"
            assert_close(again[name[:-2]], value, what=label)
            if name.startswith(("start_logits", "end_logits", "last_hidden_state")):
                assert_close(outs[name[:-2]][MASK == 1], value[MASK == 1], what=label)
            else:
                assert_close(outs[name[:-2]], value, what=label)


@pytest.mark.parametrize("part", ["model", "layer"])
def test_unpickling_registers(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was imported first: here both libraries are, but nothing is registered."""
    model = classifier()
    accelerate(model)
    saved = pickle.dumps(model if part == "model" else model.bert.encoder.layer[0])
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(registry._global_mapping, transformers_patch.IMPLEMENTATION)
    with pytest.raises((KeyError, ValueError), match=transformers_patch.IMPLEMENTATION):
        logits(model)
    pickle.loads(saved)
    logits(model)


def test_importing_registers_where_transformers_is(monkeypatch: pytest.MonkeyPatch) -> None:
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    for registry in registries:
        monkeypatch.setitem(registry, transformers_patch.IMPLEMENTATION, None)
        monkeypatch.delitem(registry, transformers_patch.IMPLEMENTATION)
    spec = importlib.util.spec_from_file_location(
        "kernels.integrations.once_more", transformers_patch.__file__
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [registry[transformers_patch.IMPLEMENTATION] for registry in registries] == [
        *(module._attend, module._mask)
    ]
    model = BertModel(
        BertConfig(**SIZES, attn_implementation=transformers_patch.IMPLEMENTATION)
    ).eval()
    with pytest.raises(ValueError, match="accelerate the model"):
        model(input_ids=IDS)
    restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_folder_is_a_plain_model(tmp_path: Path) -> None:
    model = classifier()
    expected = logits(model)
    accelerate(model)
    model.save_pretrained(tmp_path)
    assert transformers_patch.IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"]
    loaded, report = BertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert not is_accelerated(loaded)
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_is_restored_by_itself(again: Callable[[nn.Module], nn.Module]) -> None:
    model = classifier()
    expected = logits(model)
    accelerate(model)
    other = again(model)
    assert is_accelerated(other)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(other)
    restore(other)
    assert not is_accelerated(other)
    assert is_accelerated(model)
    assert torch.equal(logits(other), expected)
    restore(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(other)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_every_family(kind: str) -> None:
    """They give the same bits, as what they are copied from does afterwards, and learn alone."""
    model = base_model(kind)
    accelerate(model)
    expected = flat(model(IDS, attention_mask=MASK))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {n: type(m) for n, m in other.named_modules()} == {
            n: type(m) for n, m in model.named_modules()
        }
        found = flat(other(IDS, attention_mask=MASK))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    again = flat(model(IDS, attention_mask=MASK))
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_of_every_family(kind: str, tmp_path: Path) -> None:
    model = base_model(kind)
    with torch.no_grad():
        expected = flat(model(IDS, attention_mask=MASK))
    name = type(model).__name__
    accelerate(model)
    model.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert transformers_patch.IMPLEMENTATION not in written
    assert json.loads(written)["architectures"] == [name]
    loaded = type(model).original_class.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == name
    with torch.no_grad():
        found = flat(loaded(IDS, attention_mask=MASK))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        accelerate(loaded)
        again, here = loaded(IDS, attention_mask=MASK)[0], model(IDS, attention_mask=MASK)[0]
    assert torch.equal(again, here)


def test_what_the_class_of_an_accelerated_model_makes_is_plain(tmp_path: Path) -> None:
    model = base_model("bert")
    expected, plain = model(IDS)[0], type(model)
    accelerate(model)
    model.save_pretrained(tmp_path)
    config = BertConfig(**SIZES)
    others = [
        type(model)(config),
        type(model)(config, add_pooling_layer=False),
        type(model)._from_config(config),
        type(model).from_pretrained(tmp_path),
    ]
    for other in others:
        assert type(other) is plain
        assert not is_accelerated(other)
    assert others[1].pooler is None
    assert torch.equal(others[-1].eval()(IDS)[0], expected)


def test_a_replica_of_data_parallel_training() -> None:
    model = base_model("bert")
    accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(IDS, MASK)[0], model(IDS, MASK)[0])


def test_states_go_between_plain_and_accelerated_models() -> None:
    model, other = classifier(), classifier()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = logits(model)
    accelerate(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    accelerate(other)
    assert torch.equal(logits(other), logits(model))


def test_a_child_and_then_its_parent() -> None:
    model = nn.Module()
    model.inner = classifier()
    model.norm = nn.LayerNorm(4)
    expected = logits(model.inner)
    child = accelerate(model.inner.bert)
    assert child.attention == ("",)
    assert model.inner.config._attn_implementation == "sdpa"
    report = accelerate(model)
    assert report == (("inner",), ("norm",))
    assert is_accelerated(model)
    torch.testing.assert_close(logits(model.inner), expected)
    restore(model.inner.bert)
    assert not is_accelerated(model.inner.bert)
    assert model.inner.config._attn_implementation == transformers_patch.IMPLEMENTATION
    torch.testing.assert_close(logits(model.inner), expected)
    restore(model)
    assert not is_accelerated(model)
    assert torch.equal(logits(model.inner), expected)


def test_a_parent_and_then_its_child() -> None:
    model = classifier()
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model.bert)
    expected = logits(model)
    for part in (model.bert.encoder, model.bert.encoder.layer[0], model.bert.encoder.layer):
        with pytest.raises(ValueError, match="is a part of an accelerated encoder"):
            restore(part)
    assert is_accelerated(model)
    restore(model.bert)
    assert not is_accelerated(model.bert)
    assert model.config._attn_implementation == transformers_patch.IMPLEMENTATION
    torch.testing.assert_close(logits(model), expected)
    assert accelerate(model).attention == ("", "bert")
    assert torch.equal(logits(model), expected)
    restore(model)
    assert not is_accelerated(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_that_share_a_config(implementation: str) -> None:
    config = BertConfig(**SIZES, attn_implementation=implementation)
    first, second = BertModel(config).eval(), BertModel(config).eval()
    assert first.config is second.config
    accelerate(first)
    assert is_accelerated(first)
    assert not is_accelerated(second)
    assert second.config is config
    assert config._attn_implementation == implementation
    accelerate(second)
    restore(first)
    assert not is_accelerated(first)
    assert is_accelerated(second)
    restore(second)
    for model in (first, second):
        assert model.config._attn_implementation == implementation


class Pair(nn.Module):
    """Two models and, like them, a config."""

    def __init__(self, config: BertConfig, models: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = models


class PairOfItsFamily(BertPreTrainedModel):
    """The same, a BERT itself."""

    def __init__(self, config: BertConfig, models: tuple[nn.Module, nn.Module]) -> None:
        super().__init__(config)
        self.first, self.second = models


def pooled(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK)[-1]


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
@pytest.mark.parametrize("parent", [Pair, PairOfItsFamily])
def test_models_that_share_a_config_under_one_parent(
    parent: type[nn.Module],
    kind: type[nn.Module],
    implementation: str,
    again: Callable[[nn.Module], nn.Module],
) -> None:
    config = BertConfig(**SIZES, attn_implementation=implementation)
    outside = kind(config).eval()
    pair = parent(config, (kind(config), kind(config))).eval()
    expected = [pooled(pair.first), pooled(pair.second)]
    accelerate(pair)
    assert not is_accelerated(outside)
    pair = again(pair)
    assert is_accelerated(pair)
    restore(pair.first)
    assert not is_accelerated(pair.first)
    assert is_accelerated(pair.second)
    assert torch.equal(pooled(pair.first), expected[0])
    torch.testing.assert_close(pooled(pair.second), expected[1])
    assert accelerate(pair.first).attention[0] == ""
    restore(pair.second)
    assert is_accelerated(pair.first)
    assert not is_accelerated(pair.second)
    restore(pair)
    assert not is_accelerated(pair)
    assert {
        module.config._attn_implementation for module in pair.modules() if hasattr(module, "config")
    } == {implementation}
    assert torch.equal(pooled(pair.second), expected[1])


def test_each_of_several_models_gets_a_config_of_its_own() -> None:
    config = BertConfig(**SIZES)
    models = nn.ModuleList([BertModel(config), classifier(), BertModel(config)])
    accelerate(models)
    configs = [model.config for model in models] + [config]
    assert len({id(own) for own in configs}) == len(configs)
    for model in models:
        assert {id(own.config) for own in model.modules() if hasattr(own, "config")} == {
            id(model.config)
        }


def test_a_model_made_from_an_accelerated_config() -> None:
    model = BertModel(BertConfig(**SIZES)).eval()
    accelerate(model)
    other = BertModel(model.config).eval()
    accelerate(other)
    restore(other)
    assert not is_accelerated(other)
    assert is_accelerated(model)


def test_the_encoder_of_an_encoder_decoder_pair() -> None:
    configs = BertConfig(**SIZES), BertConfig(**SIZES)
    pair = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs)).eval()
    with pytest.raises(ValueError, match="decoder has cross attention"):
        accelerate(pair)
    assert not is_accelerated(pair)
    arguments = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}
    with torch.no_grad():
        expected = pair(**arguments).logits
        accelerate(pair.encoder)
        assert is_accelerated(pair.encoder)
        assert not is_accelerated(pair.decoder)
        torch.testing.assert_close(pair(**arguments).logits, expected)
        restore(pair)
        assert torch.equal(pair(**arguments).logits, expected)


def test_a_refusal_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accelerated before, too."""
    config = BertConfig(**SIZES)
    models = nn.ModuleList([BertModel(config), BertModel(config), classifier()]).eval()
    accelerate(models[0])
    before = [model.config for model in models]
    monkeypatch.setattr(type(models[2]), "_can_set_attn_implementation", classmethod(lambda _: 0))
    with pytest.raises(ValueError, match="2 has an attention of its own code"):
        accelerate(models)
    assert all(model.config is own for model, own in zip(models, before, strict=True))
    assert [is_accelerated(model) for model in models] == [True, False, False]


def test_modules_of_a_model_share_its_config_still() -> None:
    model = classifier()
    shared = model.config
    accelerate(model)
    configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert configs == {id(model.config)}
    assert model.config is not shared
    assert model.config.to_dict() == shared.to_dict()


def test_norms_stay_the_modules_that_they_are() -> None:
    model = classifier()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    calls: list[int] = []
    norms[0].register_forward_hook(lambda *_: calls.append(1))
    accelerate(model)
    assert [module for module in model.modules() if isinstance(module, FusedLayerNorm)] == norms
    logits(model)
    assert calls == [1]
    restore(model)
    assert {type(norm) for norm in norms} == {nn.LayerNorm}


def test_a_config_that_names_this_attention() -> None:
    """As that of a model that was made from an accelerated model's config."""
    model = classifier()
    accelerate(model)
    other = AutoModel.from_config(model.config).eval()
    with pytest.raises(ValueError, match="accelerate the model"):
        other(IDS)
    report = accelerate(other)
    assert report.attention == ("",)
    assert len(report.layer_norms) == 5
    assert other(IDS).pooler_output.isfinite().all()
    restore(other)
    assert other.config._attn_implementation == "sdpa"


def test_an_attention_of_its_own_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ValueError, match="BertForSequenceClassification has an attention of its"):
        accelerate(model)
    assert not is_accelerated(model)


def test_config_json_may_name_this_attention(tmp_path: Path) -> None:
    config = BertConfig(**SIZES).to_dict() | {
        "attn_implementation": transformers_patch.IMPLEMENTATION
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model.config._attn_implementation == transformers_patch.IMPLEMENTATION
