"""An export has the updates merged, and alone as an adapter that PEFT loads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from engine import export, train
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from ..conftest import SHORT

# transformers and PEFT warn of what they deprecate themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["the plot was dull .", "a superb film"]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
    "initializer_range": 0.3,
}
DISTILLED = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
# Their special tokens are others than those of the small vocabulary.
ROTARY = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
FAMILIES = {
    "bert": SHAPE,
    "distilbert": SHAPE | DISTILLED,
    "electra": SHAPE | {"embedding_size": 32},
    "modernbert": SHAPE | ROTARY | {"pad_token_id": 0},
}
ALL = ("query", "key", "value", "attention_output", "intermediate", "output")


class Exported(NamedTuple):
    """A model, a run that trained updates of it, and what it was exported to."""

    base: Path
    run: Path
    folder: Path

    @property
    def config(self) -> dict:
        """Of the adapter."""
        return json.loads((self.folder / "lora" / "adapter_config.json").read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of the adapter."""
        return load_file(self.folder / "lora" / "adapter_model.safetensors")

    def merged_states(self) -> Tensor:
        """The hidden states of the model with merged weights."""
        return states(hf.AutoModel.from_pretrained(self.folder), self.folder)

    def base_model(self) -> hf.PreTrainedModel:
        """The model that the run began from."""
        return hf.AutoModel.from_pretrained(self.base)


def states(model: torch.nn.Module, tokenizer: Path) -> Tensor:
    given = hf.AutoTokenizer.from_pretrained(tokenizer)(TEXTS, return_tensors="pt", padding=True)
    mask = given["attention_mask"]
    with torch.inference_mode():
        out = model.eval()(input_ids=given["input_ids"], attention_mask=mask)
    return out.last_hidden_state[mask.bool()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Train two steps of updates of a model of a family, and export them; once each."""
    made: dict[tuple, Exported] = {}

    def make(family: str, layers: tuple[str, ...]) -> Exported:
        if (family, layers) not in made:
            folder = tmp_path_factory.mktemp(family)
            found = made[family, layers] = Exported(*(folder / n for n in ("base", "run", "to")))
            torch.manual_seed(0)
            config = hf.AutoConfig.for_model(family, **FAMILIES[family])
            hf.AutoModel.from_config(config).save_pretrained(found.base)
            texts = [f"the film {n} was fine, i saw it {n} times" for n in range(40)]
            Tokenizer.train([*texts, *TEXTS], 300).save(found.base)
            arguments = ["demo", "--init", str(found.base), "--out", str(found.run)]
            settings = [*SHORT, "lora_rank=3", "lora_alpha=7.5", "lr=1e-2", "precision=fp32"]
            settings.append(f"lora_targets={list(layers)}")
            assert train.main([*arguments, "--max-steps", "2", "--set", *settings]) == 0
            assert export.main([str(found.run), "--to", str(found.folder)]) == 0
        return made[family, layers]

    return make


CASES = pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("bert", ("query", "value")),
        ("bert", ALL),
        ("distilbert", ALL),
        ("electra", ("key", "output")),
        ("modernbert", ("value", "query")),
        ("modernbert", ALL),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)


@CASES
def test_peft_loads_the_adapter(exported, family, layers):
    peft = pytest.importorskip("peft")
    found = exported(family, layers)
    model = peft.PeftModel.from_pretrained(found.base_model(), found.folder / "lora")
    assert isinstance(model, peft.PeftModelForFeatureExtraction)
    ours = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(ours) == len(found.tensors) / 2
    merged = found.merged_states()
    assert (states(model, found.folder) - merged).abs().max() < 1e-5 * merged.abs().max()
    assert (states(found.base_model(), found.folder) - merged).abs().max() > 1e-3
    again = peft.get_peft_model_state_dict(model)
    assert again.keys() == found.tensors.keys()
    with torch.inference_mode():
        alone = states(model.merge_and_unload(), found.folder)
    assert (alone - merged).abs().max() < 1e-5 * merged.abs().max()


def assert_pattern(config: dict, name: str) -> Iterator[float]:
    """Alpha and rank of a module, as PEFT takes them: the pattern's, or those of all."""
    yield config["alpha_pattern"].get(name, config["lora_alpha"])
    yield config["rank_pattern"].get(name, config["r"])


@CASES
def test_the_adapters_formula_gives_the_merged_weights(exported, family, layers):
    """``W + (alpha / r) B A`` of every module that the adapter names, and no other weight."""
    found = exported(family, layers)
    config, tensors = found.config, found.tensors
    base = found.base_model()
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == found.base.name
    modules = dict(base.named_modules())
    for name in config["target_modules"]:
        down, up = (tensors.pop(f"base_model.model.{name}.lora_{m}.weight") for m in "AB")
        alpha, rank = assert_pattern(config, name)
        assert up.shape[1] == len(down) == rank
        modules[name].weight.data += alpha / rank * (up @ down)
    assert not tensors
    merged = found.merged_states()
    assert (states(base, found.folder) - merged).abs().max() < 1e-5 * merged.abs().max()


def test_names_are_those_of_the_model_type(exported):
    def modules(family: str, layers: tuple[str, ...]) -> set[str]:
        names = exported(family, layers).config["target_modules"]
        return {name.partition(".0.")[2] for name in names if ".0." in name}

    assert modules("bert", ("query", "value")) == {"attention.self.query", "attention.self.value"}
    lin = {f"attention.{kind}_lin" for kind in ("q", "k", "v", "out")}
    assert modules("distilbert", ALL) == lin | {"ffn.lin1", "ffn.lin2"}
    assert modules("modernbert", ALL) == {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"}


def test_joined_updates_keep_their_factor(exported):
    """Query and value are one matrix of ModernBERT: rank and alpha are those of both."""
    config = exported("modernbert", ("value", "query")).config
    assert set(config["rank_pattern"].values()) == {6}
    assert set(config["alpha_pattern"].values()) == {15}
    plain = exported("bert", ("query", "value")).config
    assert (plain["r"], plain["lora_alpha"], plain["rank_pattern"]) == (3, 7.5, {})


def test_a_run_that_does_not_say_what_it_began_from(exported, tmp_path):
    found = exported("bert", ("query", "value"))
    file = found.run / "config.json"
    content = file.read_text()
    file.write_text(content.replace('"init_model_type": "bert"', '"init_model_type": "gpt2"'))
    try:
        with pytest.raises(InputError, match=r"config\.json: init_model_type = 'gpt2'"):
            export.main([str(found.run), "--to", str(tmp_path / "to")])
    finally:
        file.write_text(content)
    assert not (tmp_path / "to").exists()
