"""The page on serving: its service over HTTP, its exports, its temperature."""

import asyncio
import inspect
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import pytest

from engine import export, train
from engine.predict import Prediction, Predictor
from tests.conftest import REPOSITORY

from .pages import Page

fastapi_testclient = pytest.importorskip("fastapi.testclient")
PAGE = Page("serving")
SENTENCES = ["a superb film .", "the plot was dull ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of somebody who trained the demo run, in fp32."""
    made = tmp_path_factory.mktemp("serving")
    settings = ["encoder.num_hidden_layers=1", "precision=fp32"]
    arguments = ["demo", "--out", str(made / "runs/demo"), "--max-steps", "30"]
    assert train.main([*arguments, "--set", *settings]) == 0
    return made


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def client(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from examples import serve

    monkeypatch.setenv("RUN", "runs/demo")
    with fastapi_testclient.TestClient(serve.app) as made:
        yield made


def curls() -> list[tuple[str, dict[str, Any], Any]]:
    """The path, the body and the answer of each curl of the page."""
    text = PAGE.section("A web service").replace("\\\n", " ")
    found = re.findall(r"^    \$ (curl .*)\n    (.*)$", text, re.MULTILINE)
    calls = []
    for command, answer in found:
        words = shlex.split(command)
        body = json.loads(words[words.index("-d") + 1])
        calls.append((words[1].removeprefix("localhost:8000"), body, json.loads(answer)))
    return calls


def test_the_page_shows_the_example() -> None:
    code = PAGE.blocks("python", "A web service")
    assert code == [(REPOSITORY / "examples" / "serve.py").read_text(encoding="utf-8")]


def test_the_service_answers_in_the_form_shown(client: Any) -> None:
    assert len(curls()) == 3
    for path, body, shown in curls():
        answer = client.post(path, json=body).json()
        if "error" in shown:
            assert answer == shown
        else:
            assert [entry.keys() for entry in answer] == [entry.keys() for entry in shown]
            for got, expected in zip(answer, shown, strict=True):
                assert got["probabilities"].keys() == expected["probabilities"].keys()
                assert math.isclose(sum(got["probabilities"].values()), 1, rel_tol=1e-5)
                # Shortened to three decimals
                assert math.isclose(sum(expected["probabilities"].values()), 1, abs_tol=2e-3)


def test_what_is_refused_has_a_status_and_a_line(client: Any) -> None:
    bad = client.post("/tasks/sst", json={"examples": ["fine", " "]})
    assert (bad.status_code, bad.json()) == (
        422,
        {"error": "example 1: an empty text; leave it out"},
    )
    unknown = client.post("/tasks/none", json={"examples": ["a"]})
    assert unknown.status_code == 422
    assert unknown.json()["error"].startswith("task 'none': ")
    assert client.post("/tasks/sst", json={"texts": []}).status_code == 422
    assert client.post("/tasks/sst", json={"examples": []}).json() == []
    assert client.get("/health").json() == {"waiting": 0}
    pair = client.post("/tasks/quora", json={"examples": ["one text"]})
    assert "expected a pair" in pair.json()["error"]


def test_concurrent_requests_get_the_answers_of_the_predictor(client: Any) -> None:
    """Of two tasks and vectors, more than fit into one pass; to the rounding of fp32."""
    import httpx

    from examples import serve

    predictor = Predictor("runs/demo", device="cpu")
    texts = [f"the plot was {word} ." for word in ("dull", "superb", "fine", "weak", "strong")]

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(serve.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as asker:
            calls = []
            for number in range(60):
                own = [texts[number % 5]] * (1 + number % 3)
                path = "/embed" if number % 4 == 0 else "/tasks/sst"
                calls.append(asker.post(path, json={"examples": own}))
            return [answer.json() for answer in await asyncio.gather(*calls)]

    # The client's own event loop has the batcher; this one makes another.
    serve.app.state.batcher = type(serve.app.state.batcher)(predictor, most=16)
    for number, answer in enumerate(asyncio.run(ask())):
        own = [texts[number % 5]] * (1 + number % 3)
        if number % 4 == 0:
            np.testing.assert_allclose(answer, predictor.embed(own), rtol=1e-4, atol=1e-5)
            continue
        for got, expected in zip(answer, predictor("sst", own), strict=True):
            assert got["prediction"] == expected.prediction
            expected_shares = {str(k): v for k, v in (expected.probabilities or {}).items()}
            assert got["probabilities"] == pytest.approx(expected_shares, rel=1e-4, abs=1e-6)


def test_overload_is_503(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import serve

    class Full:
        waiting = 9

        async def predict(self, *_: Any) -> list[Prediction]:
            raise serve.OverloadedError("9 examples wait already; ask again later")

        async def close(self) -> None: ...

    monkeypatch.setenv("RUN", "runs/demo")
    monkeypatch.setattr(serve, "RequestBatcher", lambda _: Full())
    with fastapi_testclient.TestClient(serve.app) as client:
        answer = client.post("/tasks/sst", json={"examples": ["a"]})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"].startswith("9 examples wait")


def test_requests_that_wait_are_answered_when_the_service_stops(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    from examples import serve

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(serve.app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
            asyncio.TaskGroup() as group,
        ):
            async with serve.lifespan(serve.app):
                body = {"examples": ["a superb film ."]}
                calls = [client.post("/tasks/sst", json=body) for _ in range(20)]
                asked = [group.create_task(call) for call in calls]
                while serve.app.state.batcher.waiting < 10:
                    await asyncio.sleep(0)
            late = await client.post("/tasks/sst", json=body)
        return [late.status_code, *(task.result().status_code for task in asked)]

    monkeypatch.setenv("RUN", "runs/demo")
    statuses = asyncio.run(ask())
    assert statuses[0] == 503
    # Those that had come by then were answered, and the rest turned away; none waits for ever
    assert set(statuses[1:]) <= {200, 503}
    assert statuses[1:].count(200) >= 10


def test_models_page_reads_an_export(here: Path) -> None:
    assert export.main(["runs/demo", "--to", "whole"]) == 0
    section = "Export: `engine.export RUN --to DIR`"
    scope = Page("models").run_python(section, DIR="whole")
    expected = Predictor("runs/demo", device="cpu").embed(SENTENCES)
    np.testing.assert_allclose(scope["vectors"], expected, rtol=1e-4, atol=1e-5)
    assert scope["hidden"].shape[::2] == expected.shape


def exported(section: str) -> None:
    (command,) = PAGE.commands(section)
    assert export.main(shlex.split(command.removeprefix("python -m engine.export "))) == 0


def test_transformers_and_the_hub(here: Path) -> None:
    exported("Transformers, and the hub")
    with mock.patch.object(huggingface_hub, "HfApi") as api:
        scope = PAGE.run_python("Transformers, and the hub")
    for answer, expected in zip(
        scope["answers"], Predictor("runs/demo", device="cpu")("sst", SENTENCES), strict=True
    ):
        assert answer["score"] == pytest.approx(max(expected.probabilities.values()), rel=1e-4)
    api().create_repo.assert_called_once()
    uploaded = api().upload_folder.call_args.kwargs
    assert (Path(uploaded["folder_path"]) / "README.md").is_file()
    signature = inspect.signature(huggingface_hub.HfApi.upload_folder)
    signature.bind(None, **uploaded)


def test_onnx(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported("ONNX")
    scope = PAGE.run_python("ONNX")
    found = Predictor("runs/demo", device="cpu")("sst", SENTENCES)
    assert len(scope["labels"]) == 2
    for logits, expected in zip(scope["logits"], found, strict=True):
        shares = np.exp(logits - logits.max())
        np.testing.assert_allclose(
            shares / shares.sum(), [*expected.probabilities.values()], rtol=1e-4, atol=1e-6
        )


def test_sentence_vectors_and_the_time_of_a_sentence(here: Path) -> None:
    scope = PAGE.run_python("Sentence vectors")
    assert scope["vectors"].dtype == np.float32
    assert len(scope["vectors"]) == 2
    scope = PAGE.run_python("How fast is one sentence?", Predictor=Predictor)
    assert 0 < scope["milliseconds"] < 60_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found(temperature: float) -> None:
    """Labels drawn from softmax(logits / T), as models say softmax(logits)."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 5)) * 3

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    cumulated = softmax(logits / temperature).cumsum(1)
    labels = (generator.random((4000, 1)) > cumulated).sum(1).clip(max=4)
    found = PAGE.run_python("Probabilities")["fit_temperature"](softmax(logits), labels)
    # Its standard error over 4,000 rows is 2 to 3 % here
    assert found == pytest.approx(temperature, rel=0.1)
