"""An ONNX graph, run by onnxruntime, gives the engine's vectors and outputs."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from engine import export
from engine.exporting import onnx_folder
from engine.models.bert import BertConfig
from engine.runs.predictor import Predictor
from engine.runs.run import Run
from engine.utils.errors import InputError

from . import task_runs
from .task_runs import engine_logits, examples

pytestmark = pytest.mark.long  # torch's exporter takes seconds a graph
VECTORS = None
# Every kind of output, both encoders, both poolings; segments in a BERT's pairs alone.
GRAPHS = [
    ("bert", "mean", VECTORS),
    ("bert", "mean", "same"),
    ("modernbert", "cls", "share"),
    ("modernbert", "cls", "tags"),
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    made: dict[str, Run] = {}

    def run(encoder: str, pooling: str) -> Run:
        if encoder not in made:
            folder = tmp_path_factory.mktemp(encoder)
            made[encoder] = task_runs.trained_run(folder, encoder, pooling)
        return made[encoder]

    return run


@pytest.fixture(scope="module")
def graph_of(run_of) -> Callable[[str, str, str | None], Path]:
    """The folder of a graph."""

    def folder(encoder: str, pooling: str, task: str | None) -> Path:
        run = run_of(encoder, pooling)
        to = run.folder.parent / f"graph-{task}"
        if not to.exists():
            own = [] if task is None else ["--task", task]
            assert export.main([str(run.folder), "--onnx", *own, "--to", str(to)]) == 0
        return to

    return folder


def outputs(folder: Path, given: list) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What a graph is given for examples, and what it gives."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.enable_truncation(settings["model_max_length"])
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    rows = tokenizer.encode_batch([" ".join(x) if isinstance(x, list) else x for x in given])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found = {
        "input_ids": [row.ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
    }
    names = [each.name for each in session.get_inputs()]
    inputs = {name: np.array(found[name]) for name in names}
    (output,) = session.run(None, inputs)
    return inputs, output


@pytest.mark.parametrize(("encoder", "pooling", "task"), GRAPHS)
def test_a_graph_computes_what_the_engine_does(run_of, graph_of, encoder, pooling, task) -> None:
    run, folder = run_of(encoder, pooling), graph_of(encoder, pooling, task)
    assert sorted(path.name for path in folder.glob("*.onnx*")) == ["model.onnx"]
    given = examples(task or "mood")
    inputs, found = outputs(folder, given)
    segments = {"token_type_ids"} if (encoder, task) == ("bert", "same") else set()
    assert inputs.keys() == {"input_ids", "attention_mask"} | segments
    if task is VECTORS:
        expected = Predictor(run, device="cpu", precision="fp32").embed(given)
    else:
        split, scores = engine_logits(run, task, given)
        expected = scores.numpy()
        if task == "same":
            expected = np.concatenate([np.zeros_like(expected), expected], 1)
        if task == "share":
            expected = 1 + 4 / (1 + np.exp(-expected))
        if task == "tags":
            found = found[inputs["attention_mask"] == 1]
            assert len(found) == len(split.tokens)
            seen = split.word_sizes > 0
            ends = np.repeat(split.offsets[:-1] + 1, np.diff(split.word_offsets))
            bounds = np.concatenate(([0], np.cumsum(split.word_sizes)))
            before = bounds[:-1] - np.repeat(
                bounds[split.word_offsets[:-1]], np.diff(split.word_offsets)
            )
            found, expected = found[(ends + before)[seen]], expected[seen]
    assert np.abs(expected - expected[0]).max() > 1e-2, "the examples do not differ"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # Alone, and so without padding, each is the same.
    if task != "tags":
        for number in (0, 7):
            np.testing.assert_allclose(
                outputs(folder, given[number : number + 1])[1][0], found[number], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize(("encoder", "pooling", "task"), GRAPHS)
def test_the_cards_code_works(
    run_of, graph_of, tmp_path, monkeypatch, capsys, encoder, pooling, task
):
    run, folder = run_of(encoder, pooling), graph_of(encoder, pooling, task)
    card = (folder / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    texts = ["the film was good", "a story of people"]
    monkeypatch.setattr(sys, "argv", ["example.py", str(folder), *texts])
    capsys.readouterr()
    found = runpy.run_path(str(tmp_path / "example.py"))
    printed = capsys.readouterr().out.split()
    predictor = Predictor(run, device="cpu", precision="fp32")
    if task is VECTORS:
        np.testing.assert_allclose(found["vectors"], predictor.embed(texts), rtol=0, atol=1e-4)
    elif task == "same":
        (answer,) = predictor(task, [tuple(texts)])
        assert printed == [str(answer.prediction)]
    elif task == "share":
        answers = [each.prediction for each in predictor(task, texts)]
        assert list(map(float, printed)) == pytest.approx(answers, abs=1e-4)
    else:
        tags = [eval(line) for line in " ".join(printed).replace("] [", "]\n[").splitlines()]
        for row, answer in zip(tags, predictor(task, texts), strict=True):
            # Of words that are one token each.
            whole = {token: tag for token, tag, _ in row}
            for word, tag in zip(answer.words, answer.prediction, strict=True):
                assert whole.get(word, tag) == tag


def test_config_and_files(run_of, graph_of) -> None:
    folder = graph_of("modernbert", "cls", "tags")
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(n): name for n, name in enumerate(task_runs.TAGS)}
    for file in graph_of("bert", "mean", "same").iterdir():
        for path in (run_of("bert", "mean").folder.parent, Path(onnx_folder.__file__).parents[2]):
            assert str(path).encode() not in file.read_bytes(), file
        assert b"site-packages" not in file.read_bytes()


def test_bad_input_is_one_line(run_of, graph_of, tmp_path, monkeypatch) -> None:
    run, to = str(run_of("bert", "mean").folder), tmp_path / "new"
    arguments = [run, "--onnx", "--to", str(to)]
    with pytest.raises(InputError, match=r"task 'near' of .*head = 'difference'"):
        export.main([*arguments, "--task", "near"])
    with pytest.raises(InputError, match="holds something already"):
        export.main([*arguments[:-1], str(graph_of("bert", "mean", "same"))])

    def copy(path: Path, *_: object) -> None:
        shutil.copyfile(graph_of("bert", "mean", "same") / "model.onnx", path)

    with monkeypatch.context() as patch:
        patch.setattr(onnx_folder, "_write_graph", copy)
        shift = onnx_folder.pool
        patch.setattr(onnx_folder, "pool", lambda *states: 1.001 * shift(*states))
        with pytest.raises(InputError, match=r"outputs of the ONNX graph differ .* by \d"):
            export.main([*arguments, "--task", "same"])
    with monkeypatch.context() as patch:
        patch.setattr(onnx_folder, "_MOST_BYTES", 1000)
        with pytest.raises(InputError, match="more than 2 GiB"):
            export.main(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(BertConfig, "to_huggingface", lambda _: {"model_type": "prenorm"})
        with pytest.raises(InputError, match="of type prenorm, which transformers lacks"):
            onnx_folder._padded_encoder(run_of("bert", "mean"), None)
    with monkeypatch.context() as patch:
        has = onnx_folder.find_spec
        patch.setattr(
            onnx_folder, "find_spec", lambda name: has(name) if "onnx" not in name else None
        )
        message = (
            r"--onnx needs onnx, onnxruntime, onnxscript; pip install onnx onnxruntime onnxscript"
        )
        with pytest.raises(InputError, match=message):
            export.main(arguments)
    assert not to.exists()
