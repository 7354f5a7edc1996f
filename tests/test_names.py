"""Names of the packages: in the repository, installed, and with Hugging Face's ``kernels``."""

import os
import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import setuptools
import torch

import engine
from engine.__main__ import COMMANDS

from .conftest import REPOSITORY

pytestmark = pytest.mark.long


def run_python(code: str, *, folder: Path, path: Path | None = None) -> str:
    """Run code in a fresh process; return what it prints."""
    environment = os.environ | {"PYTHONPATH": "" if path is None else str(path)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture
def namesake(tmp_path: Path) -> Path:
    """A library ``kernels`` as transformers expects it; every name is a decorator factory."""
    transformers = pytest.importorskip("transformers")
    version = transformers.utils.import_utils.KERNELS_MIN_VERSION
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("from kernels.inner import __getattr__\n")
    (package / "inner.py").write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return lambda *_, **__: lambda decorated: decorated\n"
    )
    (metadata / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


IMPORT_BOTH = (
    "import transformers; from transformers import BertModel; import kernels;"
    "from transformers.utils import is_kernels_available;"
    "print(is_kernels_available(), kernels.__file__)"
)


def test_transformers_imports_from_the_root_without_its_kernels_library():
    pytest.importorskip("transformers")
    available, file = run_python(IMPORT_BOTH, folder=REPOSITORY).split()
    assert Path(file) == REPOSITORY / "kernels" / "__init__.py"
    assert available == "False"


def test_transformers_imports_from_the_root_with_its_kernels_library(namesake):
    available, file = run_python(IMPORT_BOTH, folder=REPOSITORY, path=namesake).split()
    assert Path(file) == REPOSITORY / "kernels" / "__init__.py"
    assert available == "True"


def test_a_name_that_nobody_has_is_an_attribute_error():
    code = "import kernels\ntry: kernels.nonsense\nexcept AttributeError as error: print(error)"
    assert "no attribute 'nonsense'" in run_python(code, folder=REPOSITORY)


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip wheel .`` builds."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(REPOSITORY)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as ``pip install .`` lays them out, in a folder of their own."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def test_installed_packages_are_superberts(installed, tmp_path):
    assert not (installed / "kernels").exists()
    assert not (installed / "engine").exists()
    code = (
        "import torch, superbert.kernels as kernels;"
        "print(kernels.gram(torch.ones(2, 3)).tolist(), kernels.__name__);"
        "from superbert.engine import train; train.main(['--list'])"
    )
    output = run_python(code, folder=tmp_path, path=installed)
    assert output.startswith("[[3.0, 3.0], [3.0, 3.0]] superbert.kernels")
    assert "cgs" in output


def test_installed_trainers_are_imported_on_first_use(installed, tmp_path):
    for package in ("accelerate", "datasets", "sentence_transformers", "transformers"):
        pytest.importorskip(package)
    code = (
        "import sys, superbert.kernels as kernels; assert 'transformers' not in sys.modules;"
        "from superbert.kernels import PCGradSentenceTransformerTrainer, PCGradTrainer;"
        "print(issubclass(PCGradSentenceTransformerTrainer, PCGradTrainer), end=' ');"
        "print(PCGradTrainer.__module__)"
    )
    found = run_python(code, folder=tmp_path, path=installed)
    assert found == "True superbert.kernels.integrations.balanced_trainer"


def test_installed_beside_its_namesake_neither_hides_the_other(installed, namesake):
    code = "import sys; sys.path.append(sys.argv[1]); import kernels, superbert.kernels as ours;"
    process = subprocess.run(
        [sys.executable, "-c", code + "print(kernels.__file__, ours.__file__)", str(installed)],
        cwd=namesake,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = map(Path, process.stdout.split())
    assert theirs.parent == namesake / "kernels"
    assert ours.parent == installed / "superbert" / "kernels"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with this project.

    What it depends on comes from the environment of the tests.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    return python


def test_the_console_script_runs_every_command(environment, tmp_path):
    script = environment.with_name("superbert")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str, status: int = 0) -> str:
        process = subprocess.run(
            [script, *arguments],
            cwd=tmp_path,
            env=clean | {"COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == status, process.stderr
        return process.stdout if status == 0 else process.stderr

    for command in COMMANDS:
        assert run(command, "--help").startswith(f"usage: superbert {command} ")
    tiny = ["max_train_examples=32", "encoder.hidden_size=32", "encoder.num_hidden_layers=1"]
    settings = ["--max-steps", "2", "--set", *tiny]
    run("train", "demo", "--out", "run", *settings)
    assert "overall" in run("evaluate", "run")
    # Whose runs are trained by processes that the script's own process starts
    run("sweep", "demo", "--grid", "lr=1e-3,1e-4", "--jobs", "2", "--out", "runs", *settings)
    assert len([*(tmp_path / "runs").rglob("metrics.json")]) == 2
    assert run("evaluate", "none", status=2).startswith("error: none")
    assert run("evaluate", status=2).endswith("see superbert evaluate --help\n")


def test_both_work_in_a_fresh_environment_that_holds_both(environment, tmp_path):
    install = [*PIP, "--python", str(environment), "install", "--no-deps", "kernels==0.17.2"]
    if subprocess.run(install, check=False, capture_output=True).returncode:
        pytest.skip("pip cannot fetch Hugging Face's kernels here")
    code = (
        "import torch, kernels, superbert.kernels as ours\n"
        "from transformers import BertConfig, BertModel\n"
        "from superbert.engine import train\n"
        "assert ours.gram(torch.ones(1, 2)).item() == 2.0\n"
        "print(kernels.get_kernel.__module__, kernels.__file__, ours.__file__)\n"
        "sizes = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}\n"
        "bert = BertModel(BertConfig(vocab_size=9, intermediate_size=8, **sizes))\n"
        "assert ours.accelerate(bert).attention == ('',)\n"
        "assert bert(torch.ones(1, 3, dtype=torch.int64)).last_hidden_state.isfinite().all()\n"
        "tiny = ['max_train_examples=32', 'epochs=1']\n"
        "tiny += ['encoder.hidden_size=32', 'encoder.num_hidden_layers=1']\n"
        "assert train.main(['demo', '--out', 'run', '--set', *tiny]) == 0\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [str(environment), "-c", code],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    module, *files = process.stdout.splitlines()[0].split()
    assert module.startswith("kernels.")
    site = environment.parents[1] / "lib"
    assert all(Path(file).is_relative_to(site) for file in files)


def test_the_installed_commands_bring_all_their_files(installed, tmp_path):
    code = (
        "from superbert.engine import export, report, train\n"
        "tiny = ['max_train_examples=32', 'epochs=1']\n"
        "tiny += ['encoder.hidden_size=32', 'encoder.num_hidden_layers=1']\n"
        "assert train.main(['demo', '--out', 'run', '--set', *tiny]) == 0\n"
        "assert report.main(['run', '--out', 'pages']) == 0\n"
        "assert export.main(['run', '--to', 'model']) == 0\n"
    )
    run_python(code, folder=tmp_path, path=installed)
    assert (tmp_path / "pages" / "run.html").is_file()
    assert (tmp_path / "model" / "heads.safetensors").is_file()


def test_the_wheel_is_typed_and_has_the_packages_version(wheel, installed):
    # The library knows nothing of CPython.
    assert wheel.name.startswith(f"superbert_engine-{engine.__version__}-py3-none-linux_")
    for package in ("engine", "kernels"):
        assert (installed / "superbert" / package / "py.typed").is_file()
    (metadata,) = installed.glob("superbert_engine-*.dist-info/METADATA")
    assert f"Version: {engine.__version__}\n" in metadata.read_text()


@pytest.mark.parametrize(
    ("choice", "torch_has_it", "wanted"),
    [("", "13.0", True), ("", None, False), ("OFF", "13.0", False), ("ON", None, True)],
)
def test_wheels_with_and_without_cuda(monkeypatch, choice, torch_has_it, wanted):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(REPOSITORY / "setup.py"))
    monkeypatch.setitem(build["cuda_wanted"].__globals__, "find_tool", lambda name: f"bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", torch_has_it)
    monkeypatch.setenv("SUPERBERT_CUDA", choice)
    assert build["cuda_wanted"]() is wanted
    monkeypatch.setenv("SUPERBERT_CUDA", "maybe")
    with pytest.raises(SystemExit, match="must be ON or OFF, not 'maybe'"):
        build["cuda_wanted"]()
