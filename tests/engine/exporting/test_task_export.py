"""One exported task answers in transformers what it answers in the engine."""

import json
import logging
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder
from torch import Tensor

from engine import export, train
from engine.models.registry import MODELS
from engine.runs.predictor import Predictor
from engine.runs.run import Run
from engine.utils.errors import InputError

from . import task_runs
from .task_runs import EXPORTED, MOODS, PAIRS, TAGS, TOPICS, engine_logits, examples

# transformers and sentence-transformers warn of what they deprecate themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [("bert", "cls"), ("bert", "mean"), ("modernbert", "cls"), ("modernbert", "mean")]
CASES += [("roberta", "cls"), ("roberta", "mean")]
# By ModernBERT's class no sigmoid is computed.
TASKS = [
    (encoder, pooling, task)
    for encoder, pooling in CASES
    for task in EXPORTED
    if (encoder, task) != ("modernbert", "share")
]


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory):
    """Keep the code of exports out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers.dynamic_module_utils, transformers.utils.hub):
            if hasattr(module, "HF_MODULES_CACHE"):
                patch.setattr(module, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """A run of an encoder and a pooling."""
    made: dict[tuple[str, str], Run] = {}

    def run(encoder: str, pooling: str) -> Run:
        if (encoder, pooling) not in made:
            folder = tmp_path_factory.mktemp(f"{encoder}-{pooling}")
            made[encoder, pooling] = task_runs.trained_run(folder, encoder, pooling)
        return made[encoder, pooling]

    return run


@pytest.fixture(scope="module")
def export_of(run_of) -> Callable[[str, str, str], Path]:
    """The folder of an exported task."""

    def folder(encoder: str, pooling: str, task: str) -> Path:
        run = run_of(encoder, pooling)
        to = run.folder.parent / f"exported-{task}"
        if not to.exists():
            assert export.main([str(run.folder), "--task", task, "--to", str(to)]) == 0
        return to

    return folder


def trust(folder: Path) -> dict[str, bool]:
    """What loading takes: leave to run code, where an export has some."""
    has_code = "auto_map" in json.loads((folder / "config.json").read_text())
    return {"trust_remote_code": True} if has_code else {}


def load(folder: Path, **options: object) -> torch.nn.Module:
    """The model that transformers loads from an export, complete."""
    config = json.loads((folder / "config.json").read_text())
    kind = "TokenClassification" if "Token" in config["architectures"][0] else None
    auto = getattr(transformers, f"AutoModelFor{kind or 'SequenceClassification'}")
    model, report = auto.from_pretrained(
        folder, output_loading_info=True, **trust(folder), **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def tokens(folder: Path, given: list) -> transformers.BatchEncoding:
    """Examples as the exported tokenizer makes them, padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust(folder))
    options = {"truncation": True, "padding": True, "return_tensors": "pt"}
    if isinstance(given[0], tuple):
        first, second = zip(*given, strict=True)
        return tokenizer(list(first), list(second), **options)
    texts = [each if isinstance(each, str) else " ".join(each) for each in given]
    return tokenizer(texts, **options)


def logits(
    folder: Path, given: list, **options: object
) -> tuple[transformers.BatchEncoding, Tensor]:
    encoded = tokens(folder, given)
    with torch.inference_mode():
        return encoded, load(folder, **options)(**encoded).logits


def as_exported(task: str, scores: Tensor) -> Tensor:
    """The engine's outputs as transformers' conventions are."""
    if task in ("spam", "same"):
        return torch.cat([torch.zeros_like(scores), scores], 1)
    return 1 + 4 * scores.sigmoid() if task == "share" else scores


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("encoder", "pooling", "task"), TASKS)
def test_logits_equal_the_engines(run_of, export_of, encoder, pooling, task) -> None:
    run, folder, given = run_of(encoder, pooling), export_of(encoder, pooling, task), examples(task)
    split, scores = engine_logits(run, task, given)
    encoded, found = logits(folder, given)
    mask = encoded["attention_mask"].bool()
    assert encoded["input_ids"][mask].tolist() == split.tokens.tolist()
    if encoder == "bert" and task in PAIRS:
        assert encoded["token_type_ids"][mask].tolist() == split.token_types.tolist()
    expected = as_exported(task, scores)
    assert expected.std(0).max() > 1e-2, "the examples do not differ"
    if task == "tags":
        starts = split.offsets[:-1] + 1
        seen = split.word_sizes > 0
        number = np.repeat(np.arange(len(split)), np.diff(split.word_offsets))
        before = np.concatenate(
            [np.cumsum(own) - own for own in np.split(split.word_sizes, split.word_offsets[1:-1])]
        )
        places = (starts[number] + before)[seen]
        found, expected = found[mask][places], expected[torch.from_numpy(seen)]
    assert_close(found, expected, 1e-5)


def pipe(folder: Path, task: str, **options: object) -> transformers.Pipeline:
    options |= {"device": "cpu", **trust(folder)}
    kind = "token-classification" if task == "tags" else "text-classification"
    return transformers.pipeline(kind, str(folder), **options)


@pytest.mark.parametrize(("encoder", "pooling"), CASES)
def test_pipelines_answer_as_a_predictor_does(run_of, export_of, encoder, pooling, caplog) -> None:
    predictor = Predictor(run_of(encoder, pooling), device="cpu", precision="fp32")
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, "transformers")
    for _, _, task in [each for each in TASKS if each[:2] == (encoder, pooling)]:
        if task == "tags":
            continue
        given = examples(task)
        asked = [
            {"text": each}
            if isinstance(each, str)
            else dict(zip(("text", "text_pair"), each, strict=True))
            for each in given
        ]
        answers = pipe(export_of(encoder, pooling, task), task)(asked, top_k=None, truncation=True)
        for ours, theirs in zip(predictor(task, given), answers, strict=True):
            scores = {each["label"]: each["score"] for each in theirs}
            if ours.probabilities is None:
                assert scores.keys() == {task}
                assert ours.prediction == pytest.approx(np.clip(scores[task], 1, 5), abs=1e-4)
                continue
            assert scores == pytest.approx(ours.probabilities, abs=1e-5)
            if task == "topics":
                assert {label for label, score in scores.items() if score > 0.5} == set(
                    ours.prediction
                )
            else:
                assert theirs[0]["label"] == str(ours.prediction)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(("encoder", "pooling"), CASES)
def test_a_words_tag_is_that_of_its_first_token(run_of, export_of, encoder, pooling) -> None:
    predictor = Predictor(run_of(encoder, pooling), device="cpu", precision="fp32")
    tagger = pipe(export_of(encoder, pooling, "tags"), "tags", ignore_labels=[])
    given = [words for words in examples("tags") if len(words) < 9]
    for words, ours in zip(given, predictor("tags", given), strict=True):
        text, starts = " ".join(words), np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        by_start: dict[int, dict] = {}
        for each in tagger(text):  # a blank that is a token begins where its word does
            by_start.setdefault(each["start"], each)
        for start, tag, share in zip(starts, ours.prediction, ours.probabilities, strict=True):
            theirs = by_start[int(start)]
            assert theirs["entity"] == tag
            assert theirs["score"] == pytest.approx(share, abs=1e-5)


def test_whole_words_are_tagged_by_aggregation(run_of, export_of) -> None:
    """Words without marks, which a BERT's tokenizer would divide, are the pipeline's words."""
    predictor = Predictor(run_of("bert", "mean"), device="cpu", precision="fp32")
    tagger = pipe(export_of("bert", "mean", "tags"), "tags", aggregation_strategy="first")
    given = [["the", "wellmade", "film", "was", "raining"], ["people", "good"]]
    for words, ours in zip(given, predictor("tags", given), strict=True):
        found = {each["start"]: each for each in tagger(" ".join(words), ignore_labels=[])}
        # Neighbours of one kind are one group; the others begin at their words.
        for start, group in found.items():
            number = " ".join(words)[:start].count(" ")
            assert group["entity_group"] == ours.prediction[number].removeprefix("B-").removeprefix(
                "I-"
            )


def test_labels_and_problem_types(export_of) -> None:
    expected = {
        "mood": ("single_label_classification", MOODS),
        "spam": ("single_label_classification", ("ham", "spam")),
        "same": ("single_label_classification", ("0", "1")),
        "alike": ("regression", ("alike",)),
        "topics": ("multi_label_classification", TOPICS),
        "tags": (None, TAGS),
    }
    for task, (problem, names) in expected.items():
        config = load(export_of("bert", "cls", task)).config
        assert config.problem_type == problem
        assert config.num_labels == len(names)
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: number for number, name in enumerate(names)}


def test_only_what_no_class_holds_needs_code_of_its_own(export_of) -> None:
    """A mean, or a sigmoid, of a BERT does; without the code nothing answers."""
    for encoder, pooling, task in TASKS:
        folder = export_of(encoder, pooling, task)
        own = encoder != "modernbert" and task != "tags" and (pooling == "mean" or task == "share")
        assert [*folder.glob("*.py")] == ([folder / "modeling_pooled_bert.py"] if own else [])
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            export_of("bert", "mean", "mood"), trust_remote_code=False
        )
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.pipeline(
            "text-classification", str(export_of("bert", "mean", "mood")), trust_remote_code=False
        )


def test_it_can_be_trained_on_and_saved_again(export_of, tmp_path) -> None:
    for pooling in ("cls", "mean"):
        folder = export_of("bert", pooling, "mood")
        encoded, before = logits(folder, examples("mood"))
        model = load(folder)
        labels = torch.arange(len(before)) % 3
        expected = torch.nn.functional.cross_entropy(before, labels)
        loss = model(**encoded, labels=labels).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)
        model.save_pretrained(tmp_path / pooling)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust(folder))
        tokenizer.save_pretrained(tmp_path / pooling)
        _, after = logits(tmp_path / pooling, examples("mood"))
        assert torch.equal(before, after)


def test_the_class_of_its_own_does_without_a_mask_and_returns_tuples(export_of) -> None:
    model = load(export_of("bert", "mean", "mood"))
    ids = torch.arange(5, 13)[None]
    with torch.inference_mode():
        plain, masked = model(ids), model(ids, attention_mask=torch.ones_like(ids))
        (as_tuple,) = model(ids, return_dict=False)
    torch.testing.assert_close(plain.logits, masked.logits)
    assert torch.equal(as_tuple, plain.logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_cross_encoder_rates_pairs(run_of, export_of, pooling) -> None:
    given, folder = examples("alike"), export_of("bert", pooling, "alike")
    model = CrossEncoder(str(folder), device="cpu", **trust(folder))
    found = np.clip(model.predict(given), 1, 5)
    ours = Predictor(run_of("bert", pooling), device="cpu", precision="fp32")("alike", given)
    np.testing.assert_allclose(found, [each.prediction for each in ours], atol=1e-4)


@pytest.mark.parametrize("task", EXPORTED)
def test_the_cards_code_works(run_of, export_of, tmp_path, monkeypatch, capsys, task) -> None:
    folder = export_of("bert", "mean", task)
    card = (folder / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    given = examples(task)[3]
    texts = [given] if isinstance(given, str) else [*given]
    if task == "tags":
        given = ["people", "story"]
        texts = [" ".join(given)]
    monkeypatch.setattr(sys, "argv", ["example.py", str(folder), *texts])
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "example.py"))
    answer = capsys.readouterr().out.strip()
    (ours,) = Predictor(run_of("bert", "mean"), device="cpu", precision="fp32")(task, [given])
    if task in ("alike", "share", "stars"):
        assert float(answer) == pytest.approx(ours.prediction, abs=1e-4)
        assert "from 1 to 5" in card
    elif task == "tags":
        tags = [tag.removeprefix("B-").removeprefix("I-") for tag in ours.prediction]
        assert {tag for _, tag in eval(answer)} == set(tags) - {"O"}
    elif task == "topics":
        assert sorted(eval(answer)) == sorted(ours.prediction)
    else:
        assert answer == str(ours.prediction)


def test_cards_name_no_path(run_of, export_of, tmp_path) -> None:
    """Neither of the data nor of the model that training began with."""
    run = run_of("roberta", "mean")
    assert export.main([str(run.folder), "--to", str(tmp_path / "whole")]) == 0
    for folder in (export_of("roberta", "mean", "mood"), tmp_path / "whole"):
        card = (folder / "README.md").read_text()
        assert 'data = "private-data"' in card
        assert 'init = "private-model"' in card
        assert "Folder: private-data." in card
        for file in folder.rglob("*"):
            if file.is_file():
                assert str(run.folder.parent).encode() not in file.read_bytes(), file


def test_bad_input_is_one_line(run_of, export_of, tmp_path) -> None:
    run, to = str(run_of("bert", "mean").folder), str(tmp_path / "new")
    cases = {
        "nothing": r"task 'nothing': .* has mood, spam",
        "near": r"task 'near' of .*: head = 'difference', of kind binary, is none that "
        r"--task writes.*of this run mood, spam, same, alike, share, stars, topics, tags",
        "memory": r"head = 'bilstm', of kind classes",
    }
    for task, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            export.main([run, "--task", task, "--to", to])
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="holds something already"):
        export.main([run, "--task", "mood", "--to", str(export_of("bert", "mean", "mood"))])
    modern = str(run_of("modernbert", "mean").folder)
    with pytest.raises(InputError, match=r"task 'share' of .*: its values are a sigmoid's"):
        export.main([modern, "--task", "share", "--to", to])
    assert not Path(to).exists()


def test_adapters_and_encoders_without_a_class_are_refused(tiny_run, tmp_path, monkeypatch, run_of):
    run = tiny_run("run", "--max-steps", "1", settings=("adapter_width=4",))
    with pytest.raises(InputError, match="adapter_width = 4"):
        export.main([str(run), "--task", "sst", "--to", str(tmp_path / "model")])
    from dataclasses import replace

    monkeypatch.setitem(MODELS, "bert", replace(MODELS["bert"], task_model=None))
    with pytest.raises(InputError, match="an encoder of type bert, whose tasks no class"):
        export.main(
            [str(run_of("bert", "cls").folder), "--task", "mood", "--to", str(tmp_path / "m")]
        )


def test_an_exported_task_comes_in_again(export_of, tmp_path) -> None:
    """ELECTRA's class has an encoder that the engine reads."""
    data = export_of("bert", "cls", "mood").parent / "private-data"
    for encoder, task in (("bert", "mood"), ("bert", "tags"), ("modernbert", "mood")):
        run = tmp_path / f"{encoder}-{task}"
        arguments = [str(data / "tasks.toml"), "--data", str(data), "--out", str(run)]
        init = ["--init", str(export_of(encoder, "cls", task)), "--max-steps", "1"]
        assert train.main([*arguments, *init, "--set", *task_runs.SHORT, "max_length=24"]) == 0
    shutil.rmtree(tmp_path)
