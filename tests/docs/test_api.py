"""The pages leave no public name out, and every public name says what it does."""

import importlib
import re

import pytest

import kernels
from tests.conftest import REPOSITORY

PAGES = REPOSITORY / "docs" / "api"


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_kernel_is_documented(name: str) -> None:
    documented = re.findall(r"^::: kernels\.(\w+)$", (PAGES / "kernels.md").read_text(), re.M)
    assert name in documented
    assert len(getattr(kernels, name).__doc__ or "") > 20


def test_every_module_of_the_engines_page_exists() -> None:
    text = "".join(page.read_text() for page in PAGES.glob("*.md"))
    modules = re.findall(r"^::: (engine[\w.]*)$", text, re.M)
    assert len(modules) > 15
    for module in modules:
        assert importlib.import_module(module).__doc__
