"""An exported run is the same model in transformers and in sentence-transformers."""

import json
import logging
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from engine import __version__, evaluate, export, train
from engine.data.loader import evaluation_batches
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.exporting.model_card import example
from engine.models.context import Context
from engine.models.heads import FEATURES
from engine.models.pooling import pool
from engine.runs.data_paths import data_folder
from engine.runs.predictor import Predictor
from engine.runs.run import open_run
from engine.runs.scoring import predict
from engine.utils.errors import InputError
from examples import score_exported

from ..conftest import TINY

CPU = torch.device("cpu")
# From wide weights, sentences differ by far more than fp32 rounds, also in their first tokens.
WIDE = "encoder.initializer_range=0.5"
LABELS = {"candidate_labels": ["a", "b"]}
HEADS = ("tasks.sst.head=single", "tasks.quora.head=difference")

# transformers and sentence-transformers warn of what they deprecate themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run's folder, and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    run, model = folder / "run", folder / "model"
    settings = [*TINY, "encoder.num_hidden_layers=2", *HEADS]
    assert train.main(["demo", "--out", str(run), "--set", *settings]) == 0
    assert export.main([str(run), "--to", str(model)]) == 0
    return run, model


def test_hidden_states_agree_with_transformers(exported):
    run, folder = open_run(exported[0]), exported[1]
    ours, _ = run.trained_model(CPU)
    theirs, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    form = FORMATS["sst"]
    texts = read_table(form.file(data_folder(run.recipe), "dev"), form).sentences[0]
    split = run.split("sst", "dev")
    for indices, batch in list(evaluation_batches(split, 2000))[:3]:
        given = tokenizer([texts[i] for i in indices], return_tensors="pt", padding=True)
        mask = given["attention_mask"].bool()
        torch.testing.assert_close(given["input_ids"][mask], batch.input_ids)
        with torch.inference_mode():
            expected = theirs.eval()(**given).last_hidden_state[mask]
            hidden = ours.encoder(batch.input_ids, Context.of(batch))
        assert (hidden - expected).abs().max() < 1e-5


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, SentenceTransformer])
def test_an_encoder_loads_without_a_warning(exported, load, caplog):
    for library in ("transformers", "sentence_transformers"):
        caplog.set_level(logging.WARNING, library)
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(str(exported[1]))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_no_head_answers_from_random_weights(exported):
    folder = str(exported[1])
    with pytest.raises(ValueError, match="this export has no classification head"):
        pipeline("text-classification", model=folder)("a good film")
    for task, options in (("token-classification", {}), ("zero-shot-classification", LABELS)):
        with pytest.raises((ValueError, IndexError)):
            pipeline(task, model=folder)("a good film", **options)
    with pytest.raises(ImportError, match="this export has no classification head"):
        CrossEncoder(folder, device="cpu")
    logits = AutoModelForSequenceClassification.from_pretrained(folder)(torch.ones(1, 3).long())
    assert logits.logits.shape == (1, 0)


def test_a_new_head_is_trained_on_an_export(exported, tmp_path):
    folder = str(exported[1])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model(torch.ones(1, 3).long()).logits.shape == (1, 3)
    pairs = [("a film", "a movie"), ("a film", "rain")]
    cross_encoder = CrossEncoder(folder, num_labels=1, activation_fn=torch.nn.Sigmoid())
    assert cross_encoder.predict(pairs).shape == (2,)
    cross_encoder.save_pretrained(str(tmp_path / "cross"))
    again = CrossEncoder(str(tmp_path / "cross"), device="cpu")
    np.testing.assert_allclose(again.predict(pairs), cross_encoder.predict(pairs), rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (answer,) = pipeline("text-classification", model=model, tokenizer=tokenizer)("a good film")
    assert answer["label"] in {"LABEL_0", "LABEL_1", "LABEL_2"}
    del model.config.sentence_transformers  # as the docs say
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    classifier = CrossEncoder(str(tmp_path / "classifier"), device="cpu")
    assert classifier.predict(pairs).shape == (2, 3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_vectors_and_the_sts_score_agree(tiny_run, tmp_path, pooling):
    run = open_run(tiny_run("run", settings=(f"pooling={pooling}", WIDE)))
    assert export.main([str(run.folder), "--to", str(tmp_path / "model")]) == 0
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    form = FORMATS["sts"]
    table = read_table(form.file(data_folder(run.recipe), "dev"), form)
    first, second = (
        model.encode(column, convert_to_tensor=True, show_progress_bar=False)
        for column in table.sentences
    )
    ours, _ = run.trained_model(CPU)
    split = run.split("sts", "dev")
    for indices, batch in list(evaluation_batches(split, 2000))[:1]:
        with torch.inference_mode():
            hidden = ours.encoder(batch.input_ids, Context.of(batch))
            vectors = pool(hidden, batch.cu_seqlens, pooling)
        assert (vectors[: len(indices)] - first[indices]).abs().max() < 1e-5
    vectors = Predictor(run, precision="fp32", device="cpu").embed(table.sentences[0])
    np.testing.assert_allclose(vectors, first.cpu().numpy(), atol=1e-5)
    similarity = 5 * model.similarity_pairwise(first, second).clamp(min=0).cpu().numpy()
    np.testing.assert_allclose(predict(ours, split), similarity, atol=1e-5)
    data = ["--data", str(data_folder(run.recipe))]
    score = json.loads((run.folder / "metrics.json").read_text())["scores"]["sts"]
    assert score_exported.main([str(tmp_path / "model"), *data]) == pytest.approx(score, abs=1e-5)


@pytest.fixture
def example_of(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Run the example on the card of a folder; return what it prints."""

    def run(folder: Path, task: str, *sentences: str) -> str:
        card = (folder / "README.md").read_text()
        (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        (tmp_path / "example.py").write_text(example)
        monkeypatch.setattr(sys, "argv", ["example.py", str(folder), task, *sentences])
        capsys.readouterr()
        runpy.run_path(str(tmp_path / "example.py"))
        return capsys.readouterr().out.strip()

    return run


# What each of the three tasks is read off, and how STS is trained; all but bilstm somewhere.
READ = {
    "differences": ("difference", "cosine", "default"),
    "concatenations": ("concat", "concat", "cross_entropy"),
    "shared": ("shared", "shared", "default"),
    "cosines": ("cosine", "cosine_shifted", "default"),
    "correlations": ("pearson", "pearson", "default"),
    "distances": ("distance", "mean", "default"),
    "pairs": ("cross", "cross", "default"),
}


@pytest.mark.parametrize("heads", READ)
def test_the_cards_example_predicts_what_the_engine_does(tiny_run, tmp_path, example_of, heads):
    quora, sts, loss = READ[heads]
    settings = ("sst.head=single", f"quora.head={quora}", f"sts.head={sts}")
    settings = tuple(f"tasks.{setting}" for setting in (*settings, f"sts.loss={loss}"))
    run = open_run(tiny_run("run", "--max-steps", "1", settings=(*settings, WIDE)))
    assert export.main([str(run.folder), "--to", str(tmp_path / "model")]) == 0
    ours, _ = run.trained_model(CPU)
    for task, form in run.recipe.formats.items():
        table = read_table(form.file(data_folder(run.recipe), "dev"), form)
        sentences = [column[3] for column in table.sentences]
        expected = predict(ours, run.split(task, "dev"))[3]
        answer = example_of(tmp_path / "model", task, *sentences)
        assert float(answer) == pytest.approx(float(expected), abs=1e-4)


def test_the_cards_example_names_named_classes(tmp_path, example_of):
    rows = ["the film was good,fine", "the plot was bad,poor"] * 8
    (tmp_path / "rows.csv").write_text("\n".join(["text,mood", *rows]) + "\n")
    (tmp_path / "moods.toml").write_text(
        'train = ["moods"]\n[tasks.moods]\nhead = "single"\n[tasks.moods.source]\n'
        'kind = "classification"\ntext = ["text"]\nlabel = "mood"\nclasses = ["poor", "fine"]\n'
        'files = { train = "rows.csv", dev = "rows.csv" }\n'
    )
    arguments = [str(tmp_path / "moods.toml"), "--data", str(tmp_path), "--max-steps", "30"]
    settings = [*TINY, "max_train_examples=0", "epochs=30", "lr=1e-2"]
    run = tmp_path / "run"
    assert train.main([*arguments, "--out", str(run), "--set", *settings]) == 0
    assert export.main([str(run), "--to", str(tmp_path / "model")]) == 0
    assert example_of(tmp_path / "model", "moods", "the film was good") == "fine"
    assert example_of(tmp_path / "model", "moods", "the plot was bad") == "poor"


def test_a_bilstm_head_is_laid_out_as_the_card_says(tiny_run, tmp_path):
    settings = ("tasks.sst.head=bilstm", WIDE)
    run = open_run(tiny_run("run", "--max-steps", "1", settings=settings))
    assert export.main([str(run.folder), "--to", str(tmp_path / "model")]) == 0
    table = read_table(FORMATS["sst"].file(data_folder(run.recipe), "dev"), FORMATS["sst"])
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(
        table.sentences[0][3], return_tensors="pt"
    )
    head = load_file(tmp_path / "model" / "heads.safetensors")
    ways = []
    with torch.inference_mode():
        states = AutoModel.from_pretrained(tmp_path / "model").eval()(**tokens).last_hidden_state[0]
        for way, behind_cls in (("forwards", states[1:]), ("backwards", states[1:].flip(0))):
            prefix = f"sst.lstm.{way}."
            own = {k.removeprefix(prefix): v for k, v in head.items() if k.startswith(prefix)}
            lstm = torch.nn.LSTM(states.shape[1], own["weight_hh_l0"].shape[1])
            lstm.load_state_dict(own)
            ways.append(lstm(behind_cls)[0][-1])
        x = torch.cat([states.mean(0), *ways])
        x = (head["sst.joint.weight"] @ x + head["sst.joint.bias"]).relu()
        x = head["sst.output.weight"] @ x + head["sst.output.bias"]
        ours, _ = run.trained_model(CPU)
        ((indices, batch), *_) = evaluation_batches(run.split("sst", "dev"), 100_000)
        (logits,) = ours(batch, ["sst"])
    torch.testing.assert_close(x, logits[indices.tolist().index(3)], rtol=0, atol=1e-5)


def test_the_example_is_short_and_has_all_features_of_sentences_but_one():
    assert len([line for line in example().splitlines() if line]) <= 22
    named = set(re.findall(r"\b(\w+)=lambda: ", example()))
    assert set(FEATURES) - named == {"bilstm", "tokens"}


def test_the_card_says_what_was_trained(exported):
    run, folder = open_run(exported[0]), exported[1]
    card = (folder / "README.md").read_text()
    assert run.recipe.to_toml() in card
    assert f"superbert-engine {__version__}" in card
    scores = json.loads((run.folder / "metrics.json").read_text())["scores"]
    for task in ("sst", "quora", "sts"):
        assert f"| {task} | " in card
        assert f"{scores[task]:.4f}" in card
    with safe_open(folder / "heads.safetensors", "pt") as file:
        assert set(file.metadata()) == {"sst", "quora", "sts"}
        assert set(file.keys()) == {
            f"{task}.output.{kind}" for task in ("sst", "quora") for kind in ("weight", "bias")
        }


def test_the_card_has_dev_scores_after_another_evaluation(tiny_run, tmp_path):
    """It replaces ``metrics.json``; the training's own evaluations are still there."""
    run = tiny_run("run", "--max-steps", "1")
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert evaluate.main([str(run), "--split", "train"]) == 0
    assert json.loads((run / "metrics.json").read_text())["split"] == "train"
    assert export.main([str(run), "--to", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    for task in ("sst", "quora", "sts"):
        assert f"{scores[task]:.4f}" in card
    (run / "evaluations.jsonl").unlink()
    assert export.main([str(run), "--to", str(tmp_path / "other")]) == 0
    assert "None were measured." in (tmp_path / "other" / "README.md").read_text()


def test_every_heads_weights_are_there(tiny_run, tmp_path):
    heads = ("sst.head=bilstm", "quora.head=shared", "sts.loss=cross_entropy")
    settings = tuple(f"tasks.{head}" for head in (*heads, "sts.head=concat"))
    run = tiny_run("run", "--max-steps", "1", settings=settings)
    assert export.main([str(run), "--to", str(tmp_path / "model")]) == 0
    model, _ = open_run(run).trained_model(CPU)
    with safe_open(tmp_path / "model" / "heads.safetensors", "pt") as file:
        layout = {name: json.loads(text) for name, text in file.metadata().items()}
        exported = {f"heads.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert [layout[task]["answers"] for task in ("sst", "quora", "sts")] == [
        *("classes", "binary", "share_logit")
    ]
    for name, tensor in model.state_dict().items():
        if not name.startswith("encoder."):
            file_name = name if name.startswith("heads.") else f"heads.{name}"
            torch.testing.assert_close(exported.pop(file_name), tensor, rtol=0, atol=0)
    assert not exported


def test_heads_of_objectives_stay_behind(tiny_run, tmp_path):
    folder = tiny_run("run", "--max-steps", "1", recipe="superbert")
    assert export.main([str(folder), "--to", str(tmp_path / "model")]) == 0
    with safe_open(tmp_path / "model" / "heads.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"sst", "quora"}  # noqa: SIM118
        assert file.metadata().keys() == {"sst", "quora", "sts"}


def test_adapters_cannot_be_exported(tiny_run, tmp_path):
    run = tiny_run("run", "--max-steps", "1", settings=("adapter_width=4",))
    with pytest.raises(InputError, match="adapter_width = 4"):
        export.main([str(run), "--to", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_an_export_comes_in_again(exported, tiny_run):
    arguments = ("--init", str(exported[1]), "--max-steps", "1")
    tiny_run("again", *arguments, settings=("encoder.num_hidden_layers=2",))


def test_what_stands_in_the_way_is_kept(exported, tmp_path):
    run, folder = exported
    before = (folder / "README.md").read_bytes()
    with pytest.raises(InputError, match="holds something already"):
        export.main([str(run), "--to", str(folder)])
    assert (folder / "README.md").read_bytes() == before
    with pytest.raises(InputError, match="holds no run"):
        export.main([str(tmp_path), "--to", str(tmp_path / "new")])
