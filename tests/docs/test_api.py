"""The pages leave no public name out, and every public name says what it does."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels
from engine.models.registry import MODELS
from tests.conftest import REPOSITORY
from tests.docs.pages import Page

PAGES = REPOSITORY / "docs" / "api"
TRAINERS = ("PCGradTrainer", "PCGradSentenceTransformerTrainer")
"""Public, too, but imported on first use, with the library that they extend."""


@pytest.mark.parametrize("name", [*kernels.__all__, *TRAINERS])
def test_every_public_kernel_is_documented(name: str) -> None:
    documented = re.findall(r"^::: kernels\.(\w+)$", (PAGES / "kernels.md").read_text(), re.M)
    assert name in documented, "docs/api/kernels.md has a line ::: kernels.NAME for each"
    assert len(getattr(kernels, name).__doc__ or "") > 20


def test_the_surgery_that_the_kernels_page_shows() -> None:
    torch.manual_seed(0)
    scope = Page("docs/api/kernels.md").run_python()
    rows, weights = scope["rows"].double(), scope["weights"].double()
    assert weights.shape == (3,)
    assert kernels.gram(scope["rows"]).tril(-1).min() < 0  # there is a conflict to project away
    torch.testing.assert_close(scope["gradient"].double(), weights @ rows, rtol=1e-6, atol=1e-5)


def test_every_balancing_method_is_documented() -> None:
    page = (PAGES / "balancing.md").read_text()
    documented = re.findall(r"^::: kernels\.balancing\.(\w+)\.\w+$", page, re.M)  # file, function
    assert sorted(documented) == sorted(kernels.balancing.__all__)


def test_a_method_of_losses_works_around_an_optimizer() -> None:
    """The page's example, with the weights of FAMO's first two steps."""
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / "balancing.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    scope = {
        **{"torch": torch, "balancing": kernels.balancing, "model": model},
        "BalancedOptimizer": kernels.BalancedOptimizer,
        "task_losses": lambda model: list((model(x) - y).square().mean(0)),
    }
    exec(compile(code, "balancing.md", "exec"), scope)
    setup, _, step = code.partition("losses = ")
    assert "famo = Famo()" in setup
    exec(compile(f"losses = {step}", "balancing.md", "exec"), scope)
    optimizer, famo = scope["optimizer"], scope["famo"]
    assert famo.state.steps == 1
    assert famo.state.logits.abs().max() > 0
    torch.testing.assert_close(optimizer.weights.sum(), torch.tensor(1.0))


def public() -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield what a user calls: functions, classes and their methods, by name."""
    for name in [*kernels.__all__, *TRAINERS]:
        value = getattr(kernels, name)
        if not isinstance(value, ModuleType):
            yield name, value
            own = vars(value) if isinstance(value, type) else {}
            inner = {
                n for n in own if getattr(getattr(value, n), "__module__", None) == value.__module__
            }
        else:
            inner = set(value.__all__)
        for inner_name in sorted(inner):
            if inner_name[0] != "_":
                yield f"{name}.{inner_name}", getattr(value, inner_name)


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_have_arguments_with_shapes_results_and_errors(name: str) -> None:
    called = PUBLIC[name]
    text = inspect.getdoc(called) or ""
    described = dict(re.findall(r"^    (\w+)(?:, \w+)*: (.*(?:\n {8}.*)*)", text, re.MULTILINE))
    signature = inspect.signature(called)
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        assert parameter.name in described
        if parameter.annotation is Tensor:
            assert re.search(r"\[|dim|shape|\bas\b|like|one of", described[parameter.name]), (
                parameter
            )
    tensors = [p.name for p in signature.parameters.values() if p.annotation is Tensor]
    if tensors:
        dtypes = r"float|int\d|dtype|parameters"
        assert re.search(dtypes, " ".join(described[name] for name in tensors))
    function = called.__init__ if isinstance(called, type) else inspect.unwrap(called)
    is_context = inspect.isgeneratorfunction(function)
    if signature.return_annotation is not None and not isinstance(called, type) and not is_context:
        assert "Returns:" in text or text.startswith("Return")
    if inspect.isfunction(function) and "raise " in inspect.getsource(function):
        assert "Raises:" in text


def test_the_page_on_models_names_every_type_that_comes_in() -> None:
    page = (REPOSITORY / "docs" / "models.md").read_text()
    rows = page.split("| `model_type` |")[1].split("\n\n")[0].splitlines()[2:]
    types = [name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])]
    assert sorted(types) == sorted(MODELS)


def test_every_module_of_the_engines_page_exists() -> None:
    text = "".join(page.read_text() for page in PAGES.glob("*.md"))
    modules = re.findall(r"^::: (engine[\w.]*)$", text, re.M)
    assert len(modules) > 15
    for module in modules:
        assert importlib.import_module(module).__doc__
