"""The page on freezing and adapters: its commands and loops, and which weights they change."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine import export, train
from engine.config.recipe import RECIPES
from engine.models.bert import BertConfig
from engine.models.multitask import MultitaskModel
from engine.optim.lr_factors import lr_factors
from engine.predict import Predictor
from engine.runs.run import open_run
from engine.utils.errors import InputError

from ..engine.conftest import SHORT
from ..engine.models.encoder_cases import EncoderCase, write_folder
from ..engine.small_models import DEFAULT_FEATURES
from ..engine.whole_runs import trained_weights
from .pages import Page

transformers = pytest.importorskip("transformers")

PAGE = Page("adapters")
BERT = BertConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=8,
    num_attention_heads=3,
    intermediate_size=80,
    max_position_embeddings=64,
)
SMALL = ["--max-steps", "2", "--set", *SHORT]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with the model that the page calls MODEL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("adapters"))
        case = EncoderCase(config=BERT, stages=(), tables=())
        model = transformers.BertModel(
            transformers.BertConfig(
                **{
                    name: getattr(BERT, name)
                    for name in BERT.__dataclass_fields__
                    if name not in ("layer_norm_eps", "pad_token_id")
                }
            ),
            add_pooling_layer=False,
        )
        write_folder(case, Path("MODEL"), model)
        yield


def run(section: str) -> Path:
    """Train by the command of a section; return the run's folder."""
    (command,) = PAGE.commands(section)
    arguments = shlex.split(command)[3:]
    assert train.main([*arguments, *SMALL]) == 0
    return Path(arguments[-1])


def model_weights() -> dict[str, torch.Tensor]:
    model = transformers.AutoModel.from_pretrained("MODEL", add_pooling_layer=False)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    to = Path(f"exported-{folder.name}")
    assert export.main([str(folder), "--to", str(to)]) == 0
    return load_file(to / "model.safetensors")


def changed(state: dict[str, torch.Tensor]) -> set[str]:
    """The weights of the model that are not as they came."""
    before = model_weights()
    found = {name for name in before if name in state}
    assert len(found) > 8 * 16
    return {name for name in found if not torch.equal(state[name], before[name])}


def test_a_frozen_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("Freeze the encoder")
    assert 'balance = "pcgrad": no effect' in capsys.readouterr().out
    assert not changed(exported(folder))


def test_heads_first() -> None:
    (block,) = PAGE.blocks("toml")
    recipe = (RECIPES / "demo.toml").read_text(encoding="utf-8")
    Path("phases.toml").write_text(f"{recipe}\n{block}", encoding="utf-8")
    arguments = ["phases.toml", "--init", "MODEL", "--out", "runs/phases", "--max-steps", "2"]
    assert train.main([*arguments, "--set", "log_every=1"]) == 0
    phases = open_run(Path("runs/phases")).recipe.in_phases
    assert [phase.freeze_encoder for phase in phases.values()] == [True, False]
    assert [phase.lr for phase in phases.values()] == [1e-3, 2e-5]
    begun = open_run(Path("runs/phases")).initial_model().state_dict()
    moved = {
        name
        for name, weight in trained_weights(Path("runs/phases")).items()
        if not torch.equal(weight, begun[name])
    }
    assert any(name.startswith("encoder.layers.0.") for name in moved)
    assert any(name.startswith("heads.") for name in moved)


def test_lower_rates_below(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("Freeze the first layers")
    assert "layer_lr_decay" not in capsys.readouterr().out  # it has an effect
    assert any(name.startswith("embeddings.") for name in changed(exported(folder)))
    formats = open_run(folder).recipe.formats
    model = MultitaskModel(
        BERT.changed(num_hidden_layers=12),
        list(formats.values()),
        {name: DEFAULT_FEATURES[name] for name in formats},
        pooling="mean",
        dropout_p=0.0,
    )
    factors = lr_factors(model, lr=2e-5, head_lr=1e-3, layer_lr_decay=0.5)
    assert factors["encoder.layers.11"] == 1
    assert factors["encoder.layers.0"] == 1 / 2048
    assert factors["encoder.embeddings"] == 1 / 4096


def batches() -> list[tuple[dict[str, torch.Tensor], ...]]:
    """Two steps of two tasks."""
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        ids = torch.randint(5, 90, (2, 4, 9))
        masks = torch.ones_like(ids)
        labels = (torch.randint(3, (4,)), torch.rand(4))
        made.append(
            tuple(
                {"input_ids": own, "attention_mask": mask, "labels": label}
                for own, mask, label in zip(ids, masks, labels, strict=True)
            )
        )
    return made


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loops() -> None:
    scope = SimpleNamespace(**PAGE.run_python(batches=batches()))
    frozen = ("embeddings.", *(f"encoder.layer.{number}." for number in range(6)))
    moved = changed(scope.encoder.state_dict())
    assert moved
    assert not [name for name in moved if name.startswith(frozen)]

    # PEFT's: the frozen weights are as they came, and the merged ones are not.
    merged = changed(scope.merged.state_dict())
    assert merged == {
        f"encoder.layer.{number}.attention.self.{name}.weight"
        for number in range(8)
        for name in ("query", "value")
    }
    scope.encoder.save_pretrained("own")
    for file in Path("MODEL").glob("*ok*.json"):  # the tokenizer's
        (Path("own") / file.name).write_bytes(file.read_bytes())
    arguments = ["demo", "--init", "own", "--out", "runs/own"]
    assert train.main([*arguments, *SMALL, "freeze_encoder=true"]) == 0


def test_low_rank_updates() -> None:
    folder = run("Low-rank updates (LoRA)")
    own = trained_weights(folder)
    assert any(".lora." in name for name in own)
    moved = changed(exported(folder))  # merged
    assert {name.split(".")[5] for name in moved} == {"query", "value"}
    assert (Path(f"exported-{folder.name}") / "lora/adapter_config.json").is_file()


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("Projected attention layers (adapters)")
    model = open_run(folder).new_model()
    (width, hidden, layers) = 204, BERT.hidden_size, BERT.num_hidden_layers
    for adapter in model.adapters.values():
        matrices = sum(p.numel() for p in adapter.parameters() if p.dim() > 1)
        assert matrices == 2 * width * hidden + 3 * width**2 * layers
    assert round((2 * 204 * 768 + 3 * 204**2 * 12) / 1e6, 1) == 1.8
    with pytest.raises(InputError, match="adapter"):
        export.main([str(folder), "--to", "none"])
    predictor = Predictor(folder)
    with pytest.raises(InputError, match="each task has its own sentence vectors"):
        predictor.embed(["a film"])
    assert predictor("sst", ["a film"])
    capsys.readouterr()
    arguments = ["demo", "--init", str(folder), "--out", "runs/further", *SMALL]
    assert train.main([*arguments, "adapter_width=204"]) == 0
    assert "adapters of sst, quora, sts" in " ".join(capsys.readouterr().out.split())
