"""Every page that shows Python has a test that runs it."""

import pytest

from tests.conftest import REPOSITORY

from .pages import Page, all_pages

ELSEWHERE = {
    "docs/api/balancing.md": "tests/docs/test_api.py",
    "docs/api/kernels.md": "tests/docs/test_api.py",
    "docs/extending.md": "tests/docs/test_extending.py",
    "docs/models.md": "tests/docs/test_serving.py",
}
"""Pages whose Python runs in a test of another name, and the test."""

WITH_PYTHON = [name for name in all_pages() if Page(name).blocks("python")]


def test_exceptions_are_needed() -> None:
    assert ELSEWHERE.keys() <= set(WITH_PYTHON)


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_a_test_runs_the_code_of_the_page(name: str) -> None:
    page = Page(name).path
    own = f"tests/docs/test_{page.stem.lower().replace('-', '_')}.py"
    test = REPOSITORY / ELSEWHERE.get(name, own)
    assert test.is_file(), f"{name} shows Python; run it in {own}"
    text = test.read_text(encoding="utf-8")
    assert name not in ELSEWHERE or page.stem in text, f"{test.name} does not read {page.name}"
    # In this process, or written into a file that another one runs.
    runs = "run_python" in text or "exec(" in text or ".blocks(" in text
    assert runs, f"{test.name} runs no code"
