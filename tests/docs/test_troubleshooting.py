"""Each text on the page is printed by this project, or by those whom the page says.

Those that a test can provoke are; the others are found in the source, or are listed here.
"""

import ast
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from engine import export, train
from engine.data.demo import write_demo
from engine.runs.lock import held
from engine.utils.errors import InputError
from kernels import PCGrad, TaskGradients
from tests.conftest import REPOSITORY
from tests.engine.conftest import TINY

from .pages import Page

PAGE = Page("troubleshooting")
TEXTS = [text.strip() for text in PAGE.blocks("text")]

OF_COMPILERS_AND_DRIVERS = {
    "nvcc fatal   : Unsupported gpu architecture 'compute_100'",
    "no kernel image is available for execution on the device",
    "Feature '.m16n8k16' requires .target sm_80 or higher",
}
"""Texts of nvcc, ptxas and the CUDA runtime."""

OF_LIBRARIES = {
    "No working C++ compiler found in …": ("torch", "_inductor/exc.py"),
    "Failed to find C compiler. Please specify via CC environment variable …": (
        "triton",
        "runtime/build.py",
    ),
}
"""Texts in a file of another library."""


def regex(text: str) -> re.Pattern[str]:
    """Return what a text of the page stands for."""
    return re.compile(".*".join(map(re.escape, text.removeprefix("error: ").split("…"))), re.DOTALL)


def fragments(text: str) -> list[str]:
    """Return the parts of a text that are always the same."""
    return [part.strip() for part in text.removeprefix("error: ").split("…") if part.strip(" :;.,")]


@cache
def sources() -> list[str]:
    """Return all texts in the source, with a bar where a value stands."""
    paths = [REPOSITORY / "setup.py"]
    for package in ("engine", "kernels"):
        paths += (REPOSITORY / package).rglob("*.py")
    return [text for path in paths for text in texts_of(ast.parse(path.read_text()))]


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module, pieces that are added or formatted as one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and "\n" not in spelled(node):
            yield spelled(node)


def spelled(node: ast.AST) -> str:
    """Return a text, with bars for values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "|"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(spelled, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spelled(node.left) + spelled(node.right)
    return "|"


def stands_in_the_source(text: str) -> bool:
    """Return whether one text of the source, or several around values, give a text of the page."""
    wanted = fragments(text)
    return any(re.search(".*".join(map(re.escape, wanted)), own) for own in sources()) or all(
        any(part in own for own in sources()) for part in wanted
    )


def refusal(*arguments: str, program: Any = train) -> str:
    """Return what a command says of bad input."""
    with pytest.raises(InputError) as error:
        program.main(list(arguments))
    return str(error.value)


def model() -> torch.nn.Module:
    """Return a small model."""
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))


def pcgrad(own: torch.nn.Module, **settings: Any) -> PCGrad:
    """Return an optimizer of a model."""
    return PCGrad(torch.optim.SGD(own.parameters(), lr=0.1), **settings)


X = torch.ones(3, 4)


def no_list() -> None:
    own = model()
    pcgrad(own).pc_backward(own(X).sum())


def no_gradient() -> None:
    own = model()
    pcgrad(own).pc_backward([own(X).detach().sum()] * 2)


def no_gradient_in_torch() -> None:
    model()(X).detach().sum().backward()


def another_model() -> None:
    other = model()
    pcgrad(model()).pc_backward([other(X).sum(), other(X).sum()])


def twice() -> None:
    own = model()
    optimizer, output = pcgrad(own), own(X)
    losses = [output.sum(), output.square().sum()]
    optimizer.pc_backward(losses)
    optimizer.pc_backward(losses)


def other_numbers() -> None:
    own = model()
    optimizer = pcgrad(own)
    optimizer.pc_backward([own(X).sum(), own(X).sum()])
    optimizer.pc_backward([own(X).sum()] * 3)


def no_number() -> None:
    TaskGradients(model())  # type: ignore[call-arg]


def other_rows() -> None:
    own = model()
    with TaskGradients(own, 2).batch([1, 1]):
        own(X)


def outside() -> None:
    own = model()
    optimizer, output = pcgrad(own, task_gradients=TaskGradients(own, 2)), own(X)
    optimizer.pc_backward([output[:1].sum(), output[1:].sum()])


def unknown_layer() -> None:
    own = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1))
    with TaskGradients(own, 2).batch([1, 2]):
        own(torch.ones(3, 4, 2))


def cast_late() -> None:
    own = model()
    tasks = TaskGradients(own, 2)
    own.double()
    with tasks.batch([1, 2]):
        own(X.double())


def nothing_to_accelerate() -> None:
    kernels.accelerate(model())


def other_names() -> None:
    kernels.flash_attn_varlen_func(X, X, X, num_splits=1)  # type: ignore[call-arg]


def no_library() -> None:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "_extension.py"
        copy.write_bytes((REPOSITORY / "kernels" / copy.name).read_bytes())
        copy.with_name("libsuperbert.so").write_text("no library")
        runpy.run_path(str(copy))


PROVOKED: list[tuple[Callable[[], None], str]] = [
    (no_list, "losses: expected one for each task"),
    (no_gradient, "losses: none has a gradient"),
    (no_gradient_in_torch, "element 0 of tensors"),
    (another_model, "losses: none depends on"),
    (twice, "Trying to backward"),
    (other_numbers, "losses must be … until zero_grad"),
    (no_number, "TaskGradients.__init__()"),
    (other_rows, "…: input of … rows"),
    (outside, "…: got a gradient that belongs to no task"),
    (unknown_layer, "…: used by …"),
    (cast_late, "…: now … on …"),
    (nothing_to_accelerate, "model: nothing to accelerate"),
    (other_names, "flash_attn_varlen_func() got"),
    (no_library, "libsuperbert.so does not load"),
]


BY_COMMANDS = (
    "unknown key",
    "objectives.…",
    "recipe …",
    "execution = graphs",
    "precision = tf32",
    "--device",
    "--data …",
    "label is outside",
    "label is not among",
    "broken quoting",
    "no column",
    "cannot read a file",
    "tasks.….source.files",
    "dataset …: cannot load",
    "--init …: no such folder",
    "--init …: neither",
    "…; give a plain encoder",
    "--out …: holds",
    "… another process",
    "error: out of memory",
    "loss or gradient not finite",
    "…after step",
    "… not found; weights",
)
"""The beginnings of texts that the tests of commands below provoke."""


def entry(beginning: str) -> str:
    """Return the one text of the page that begins so."""
    (found,) = [text for text in TEXTS if text.startswith(beginning)]
    return found


def check(beginning: str, said: str) -> None:
    """Check that what a command said is the text that begins so."""
    assert beginning in BY_COMMANDS
    assert regex(entry(beginning)).search(said), said


@pytest.mark.parametrize(
    ("cause", "beginning"), PROVOKED, ids=lambda each: getattr(each, "__name__", "")
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_text_of_the_loop_is_what_is_raised(cause: Callable[[], None], beginning: str) -> None:
    with pytest.raises(Exception, match=regex(entry(beginning))):
        cause()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo corpus."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_demo(folder)
    return folder


@pytest.fixture
def corrupted(data: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that copies the corpus with a row added to its sentiments."""

    def copy(row: str, header: str = "") -> Path:
        folder = tmp_path / "corrupted"
        folder.mkdir(exist_ok=True)
        for file in data.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        file = folder / "ids-sst-train.csv"
        first, *rows = file.read_text().splitlines()
        file.write_text("\n".join([header or first, row, *rows]) + "\n")
        return folder

    return copy


def test_texts_of_recipes(tmp_path: Path) -> None:
    run = ["demo", "--out", str(tmp_path / "run")]
    for beginning, arguments in {
        "unknown key": [*run, "--set", "learning_rate=1"],
        "objectives.…": [*run, "--set", "objectives.sts.batch_size=8"],
        "recipe …": ["nosuch"],
        "execution = graphs": [*run, "--set", *TINY, "execution=graphs"],
        "precision = tf32": [*run, "--set", *TINY, "precision=tf32"],
        "--device": [*run, "--device", "nosuch"],
    }.items():
        check(beginning, refusal(*arguments))


def test_texts_of_data(tmp_path: Path, data: Path, corrupted: Callable[..., Path]) -> None:
    run = ["demo", "--out", str(tmp_path / "run"), "--max-steps", "1", "--set", *TINY]

    def says(beginning: str, *arguments: str) -> None:
        check(beginning, refusal(*run, *arguments))

    says("--data …", "--data", str(tmp_path / "none"))
    says("label is outside", "--data", str(corrupted("1\tx\ta fine film\t7")))
    says("broken quoting", "--data", str(corrupted('1\tx\t"a fine film\t2')))
    says("no column", "--data", str(corrupted("1\tx\ta film\t2", "\tid\ttext\tsentiment")))
    (tmp_path / "corrupted" / "ids-sst-train.csv").unlink()
    says("cannot read a file", "--data", str(tmp_path / "corrupted"))
    check("tasks.….source.files", refusal("glue", "--out", str(tmp_path / "run")))
    own = tmp_path / "own.toml"
    own.write_text(
        'train = ["a"]\n[tasks.a]\nhead = "single"\n[tasks.a.source]\nkind = "classification"\n'
        'text = ["t"]\nclasses = ["x", "y"]\ndataset = "no/such/set"\n'
    )
    check("dataset …: cannot load", refusal(str(own), *run[1:5]))
    (tmp_path / "rows.csv").write_text("t,label\none,x\ntwo,z\n")
    own.write_text(
        own.read_text().replace(
            'dataset = "no/such/set"', 'files.train = "rows.csv"\nfiles.dev = "rows.csv"'
        )
    )
    check("label is not among", refusal(str(own), *run[1:5]))


def test_texts_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["demo", "--out", str(tmp_path / "run"), "--max-steps", "1", "--set", *TINY, "--init"]
    check("--init …: no such folder", refusal(*run, str(tmp_path / "none")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check("--init …: neither", refusal(*run, "nobody/no-such-model"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    check("…; give a plain encoder", refusal(*run, str(folder)))


def test_texts_of_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    again = ["demo", "--out", str(run), "--max-steps", "1", "--set", *TINY]
    assert train.main(again) == 0
    check("--out …: holds", refusal(*again))
    with held(tmp_path / "held"):
        again[2] = str(tmp_path / "held")
        check("… another process", refusal(*again))
    again[2] = str(tmp_path / "other")
    check("error: out of memory", refusal(*again, "batch_size=900000000"))
    check("…after step", refusal(*again, "lr=1e30", "max_steps=4"))
    again[2] = str(tmp_path / "skipped")
    again.remove("--max-steps")
    again.remove("1")
    many = ("max_train_examples=900", "log_every=1", "max_skipped=1", "max_steps=40")
    check("loss or gradient not finite", refusal(*again, "lr=1e30", *many))
    weights = tmp_path / "model"
    assert export.main([str(run), "--to", str(weights)]) == 0
    (weights / "model.safetensors").rename(weights / "pytorch_model.bin")
    again[2] = str(tmp_path / "third")
    check("… not found; weights", refusal(*again, "--init", str(weights)))


def test_the_package_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.train", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert entry("No module named") in done.stderr


def test_the_extension_that_is_not_built(tmp_path: Path) -> None:
    name = "_extension.py"
    (tmp_path / name).write_bytes((REPOSITORY / "kernels" / name).read_bytes())
    with pytest.raises(ImportError, match=regex(entry("libsuperbert.so is not built"))):
        runpy.run_path(str(tmp_path / name))


def test_all_other_texts_stand_in_the_source() -> None:
    beginnings = [
        *BY_COMMANDS,
        *(beginning for _, beginning in PROVOKED),
        "No module named",
        "libsuperbert.so is not built",
    ]
    provoked = set(map(entry, beginnings))
    others = set(TEXTS) - provoked - OF_COMPILERS_AND_DRIVERS - OF_LIBRARIES.keys()
    assert [text for text in others if not stands_in_the_source(text)] == []
    assert len(others) > 10
    for text, (library, file) in OF_LIBRARIES.items():
        spec = find_spec(library)
        assert spec is not None
        assert spec.origin is not None
        (part,) = fragments(text)
        assert part in (Path(spec.origin).parent / file).read_text()


def test_a_text_that_nobody_prints_is_not_found_in_the_source() -> None:
    assert not stands_in_the_source("losses: expected two of …, and no more")
