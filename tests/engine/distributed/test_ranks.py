"""Runs on several ranks against the same run on one."""

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.manifest import read_manifest
from engine.config.recipe import load
from engine.distributed.ranks import Ranks
from engine.models.hf_weights import to_huggingface_state
from engine.runs.run import begin, open_run
from engine.train import main
from engine.training.build import build_trainer
from engine.utils.errors import InputError, LostRankError

from ..conftest import SHORT, TINY
from ..launch import launch

pytestmark = pytest.mark.long

EXACTLY = (
    "max_train_examples=640",  # one evaluation, at the end
    "schedule=constant",
    "warmup=0",
    "dropout=0",
    "encoder.hidden_dropout_prob=0",
    "encoder.attention_probs_dropout_prob=0",
)
CASES = {
    "sharded": ("max_steps=6",),
    "replicated": (
        *("distribute=replicated", "balance_granularity=tensor", "max_steps=3"),
        *("eval_every=1", "average_best=2"),
    ),
    "uneven": (
        *("batch_size=7", "max_steps=3", "clip_norm=0.5", "weight_decay=0.1"),
        *("layer_lr_decay=0.5", "head_lr=1e-2", "ema_decay=0.5"),
    ),
    "torch's optimizer": ("distribute=replicated", "optimizer=sgd", "max_steps=2"),
    "a task on one rank": (
        "batch_size=1",
        "max_steps=3",
        "balance_granularity=layer",
        "balance=gradvac",
    ),
    "parted": (
        *("micro_batches=3", "checkpoint_layers=true", "max_steps=2"),
        *("tasks.sst.class_weights=[1,2,3,4,5]", "tasks.quora.focal_gamma=2"),
        "tasks.quora.threshold=dev",
    ),
    "low rank": (
        *("lora_rank=2", "lora_targets=['query','output']", "lr=1e-2", "max_steps=4"),
        *("micro_batches=2", "checkpoint_layers=true", "batch_size=8"),
    ),
    "in turns": ("task_schedule=cycle", "max_steps=4"),
    "stopped early": ("lr=1e-12", "max_steps=4", "eval_every=1", "patience=1", "average_best=2"),
}
STOPPED = "max_steps=3"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder to start from, which spares each run the training of a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    settings = load("demo", [*TINY, *EXACTLY, "encoder.num_hidden_layers=2"])
    run = begin(settings, folder / "run")
    run.tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(run.config.to_huggingface()))
    state = to_huggingface_state(run.new_model().encoder.state_dict(), run.config)
    save_file(state, folder / "model.safetensors")
    return folder


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"].values()]


def assert_close(one: Path, other: Path) -> None:
    """Equal but for the order of sums in fp32, over a few updates."""
    assert len(losses(one)) == len(losses(other)) > 0
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """What each rank wrote into the newest checkpoint."""
    newest = open_run(folder).checkpoints.all("step")[0]
    return [load_file(file) for file in sorted(newest.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Path:
    """A folder with each case on one rank (``one-NAME``) and on two (``two-NAME``)."""
    root = tmp_path_factory.mktemp("ranks")

    def arguments(name: str, settings: Sequence[str], *more: str) -> list[str]:
        options = ["--out", str(root / name), "--init", str(model), "--device", "cpu", *more]
        return ["demo", *options, "--set", *SHORT, *settings]

    exact = {name: (*EXACTLY, *settings) for name, settings in CASES.items()}
    for name, settings in exact.items():
        assert main(arguments(f"one-{name}", settings)) == 0
    assert main(arguments("from-one", (*EXACTLY, STOPPED))) == 0
    random = {"random": (STOPPED,), "random again": (STOPPED,)}
    on_two = [arguments(f"two-{name}", settings) for name, settings in (exact | random).items()]
    on_two.append(arguments("from-one", (*EXACTLY, "max_steps=6"), "--resume"))
    on_two.append(arguments("from-two", (*EXACTLY, STOPPED)))
    on_two.append(arguments("from-replicated", (*EXACTLY, STOPPED, "distribute=replicated")))
    on_two.append(arguments("to-replicated", (*EXACTLY, STOPPED)))
    replicated = (*EXACTLY, "max_steps=6", "distribute=replicated")
    on_two.append(arguments("to-replicated", replicated, "--resume"))
    launch(2, on_two, root / "log")
    for name in ("from-two", "from-replicated"):
        assert main(arguments(name, (*EXACTLY, "max_steps=6"), "--resume")) == 0
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_does(runs, name):
    assert_close(runs / f"two-{name}", runs / f"one-{name}")
    scores = [json.loads((runs / f"{n}-{name}/metrics.json").read_text()) for n in ("one", "two")]
    assert scores[0]["scores"] == pytest.approx(scores[1]["scores"], abs=0.02)  # one example: 0.005


def test_thresholds_are_those_of_one(runs):
    one, two = (
        read_manifest(open_run(runs / f"{n}-parted").checkpoints.all("best")[0]).thresholds
        for n in ("one", "two")
    )
    assert one["quora"] == pytest.approx(two["quora"], rel=1e-3)
    assert one["quora"] != (0,)


def test_repeated_they_give_the_same_bits(runs):
    assert losses(runs / "two-random") == losses(runs / "two-random again")
    first, second = (shards(runs / f"two-{name}") for name in ("random", "random again"))
    for own, again in zip(first, second, strict=True):
        assert own.keys() == again.keys()
        assert [name for name in own if not torch.equal(own[name], again[name])] == []


def test_each_rank_stores_its_own_part(runs):
    parts = shards(runs / "two-sharded")
    (whole,) = shards(runs / "one-sharded")
    for name, tensor in whole.items():
        together = torch.cat([part[name] for part in parts if name in part])
        assert together.shape == tensor.shape
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("name", ["from-one", "from-two", "from-replicated", "to-replicated"])
def test_checkpoints_are_for_any_number_of_ranks(runs, name):
    assert_close(runs / name, runs / "one-sharded")
    assert open_run(runs / name).checkpoints.find("step").name == "step-00000006"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("optimizer=lamb",), "optimizer = lamb: needs whole tensors"),
        (("optimizer=sgd",), "optimizer = sgd: needs whole tensors"),
        (("batch_size=1",), "batch_size = 1: too small for 4 ranks"),
        (("batch_size=7", "micro_batches=2"), "batch_size = 7: too small for 4 ranks"),
    ],
)
def test_what_ranks_cannot_share(runs, settings, expected):
    run = open_run(runs / "one-sharded")
    fields = dict(setting.split("=") for setting in settings)
    recipe = run.recipe.model_validate(run.recipe.model_dump() | fields)
    with pytest.raises(InputError, match=expected):
        build_trainer(run._replace(recipe=recipe), torch.device("cpu"), Ranks(0, 4))


class Unfinished:
    """An event that the device comes to after so many looks."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_device_that_never_comes_to_its_end_is_given_up() -> None:
    ranks = Ranks(0, 2)
    ranks._timeout = 0.2
    assert ranks.mark(torch.device("cpu")) is None
    ranks.wait_for([None, Unfinished(0), Unfinished(20)])
    with pytest.raises(LostRankError, match="the device waits for an exchange"):
        ranks.wait_for([Unfinished(3), Unfinished(float("inf"))])


def test_ranks_from_the_environment(monkeypatch):
    assert Ranks.from_environment().shard == (0, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="whole numbers"):
        Ranks.from_environment()
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks = Ranks.from_environment()
    assert (ranks.shard, ranks.local_rank, ranks.is_main) == ((3, 8), 1, False)
    with pytest.raises(InputError, match="that --out names"):
        main(["demo"])
    with pytest.raises(InputError, match="MASTER_ADDR expected"):
        main(["demo", "--out", "no-such-folder", "--device", "cpu"])


@pytest.mark.parametrize(
    "values",
    [
        *(("3", "2", "0", "1"), ("-1", "2", "0", "1"), ("0", "0", "0", "1"), ("0", "2", "2", "2")),
        *(("0", "1000000000", "0", "1"), ("0", "2", "-1", "1"), ("0", "2", "0", "3")),
    ],
)
def test_ranks_that_cannot_be(monkeypatch, values):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="make no sense; let torchrun set them"):
        Ranks.from_environment()


def test_a_first_rank_that_never_comes_is_given_up_in_time(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with (
        pytest.raises(LostRankError, match=rf"rank 1: no answer from rank 0 at 127.0.0.1:{port}"),
        Ranks.from_environment().init(torch.device("cpu"), timeout=2),
    ):
        pass
    assert 2 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("name", ["replicated", "stopped early"])
def test_ranks_average_the_best_evaluations_as_one_does(runs, name):
    """Of equal scores, which the second case has, the average is kept on any number of ranks."""
    for folder in (runs / f"one-{name}", runs / f"two-{name}"):
        found = open_run(folder).checkpoints
        tops = {path.name: load_file(path / "model.safetensors") for path in found.all("top")}
        assert len(tops) >= 2
        named = [f"top-{step:08}" for step, _ in found.progress().top]
        kept = found.all("average")
        assert len(kept) == 1 or name == "replicated"
        for path in kept:
            for weight, tensor in load_file(path / "model.safetensors").items():
                mean = torch.stack([tops[own][weight].double() for own in named]).mean(0)
                assert torch.equal(tensor, mean.float())
