"""What packages, cites and runs the project elsewhere: parsed, and run as far as it can be here."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from dockerfile_parse import DockerfileParser

import engine
from engine.__main__ import COMMANDS

from .conftest import REPOSITORY

yaml = pytest.importorskip("yaml")

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
TEMPLATES = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


# ---- citation, templates -------------------------------------------------------------------------


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # all that 1.2.0 demands
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == engine.__version__
    assert cited["license"] == PROJECT["project"]["license"]
    assert all({"type", "title", "authors"} <= entry.keys() for entry in cited["references"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_ask_for_the_environment(path: Path) -> None:
    template = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert template.keys() == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= template.keys()
    fields = [field for field in template["body"] if field["type"] == "textarea"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any("python -m engine.env" in field["attributes"]["label"] for field in fields)


# ---- Dockerfile ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    copy = tmp_path_factory.mktemp("docker") / "Dockerfile"  # the parser opens files to write, too
    copy.write_bytes((REPOSITORY / "Dockerfile").read_bytes())
    found = DockerfileParser(str(copy)).structure
    return [entry for entry in found if entry["instruction"] != "COMMENT"]


def of_kind(instructions: list[dict[str, str]], kind: str) -> list[str]:
    return [entry["value"] for entry in instructions if entry["instruction"] == kind]


def test_each_device_is_a_stage_of_an_image(instructions: list[dict[str, str]]) -> None:
    arguments = {value.partition("=")[0] for value in of_kind(instructions, "ARG")}
    stages = of_kind(instructions, "FROM")
    assert {name for stage in stages for name in re.findall(r"\$\{(\w+)\}", stage)} <= arguments
    named = {stage.partition(" AS ")[2] for stage in stages if " AS " in stage}
    last = stages[-1]
    assert {last.replace("${DEVICE}", device) for device in ("cpu", "cuda")} == named
    # What a FROM reads must be declared before the first.
    first = [entry["instruction"] for entry in instructions].index("FROM")
    assert of_kind(instructions[:first], "ARG")[0] == "DEVICE=cpu"


def test_each_shell_line_parses(instructions: list[dict[str, str]]) -> None:
    lines = of_kind(instructions, "RUN")
    assert len(lines) == 6
    for line in lines:
        subprocess.run(["sh", "-n"], input=line, text=True, check=True)


def test_everything_that_is_copied_is_there_and_not_ignored(
    instructions: list[dict[str, str]],
) -> None:
    kept = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    copied = [name for value in of_kind(instructions, "COPY") for name in value.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((REPOSITORY / name).exists() for name in copied)


def test_the_image_runs_the_console_script(instructions: list[dict[str, str]]) -> None:
    (entry,) = of_kind(instructions, "ENTRYPOINT")
    assert json.loads(entry) == [*PROJECT["project"]["scripts"]]
    assert of_kind(instructions, "USER") == ["superbert"]
    assert [line for line in of_kind(instructions, "RUN") if "--no-build-isolation" in line]


# ---- wheels --------------------------------------------------------------------------------------


def test_cibuildwheel_takes_the_configuration() -> None:
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    run = subprocess.run(
        [*command, "--platform", "linux", str(REPOSITORY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [f"cp{minor}-manylinux_x86_64" for minor in (311, 312, 313)]


def test_the_tests_of_a_wheel_are_commands(tmp_path: Path) -> None:
    for line in PROJECT["tool"]["cibuildwheel"]["test-command"]:
        subprocess.run(["sh", "-n"], input=line, text=True, check=True)
        program, command, *_ = shlex.split(line)
        assert (program, command in COMMANDS) == ("superbert", True)


def test_each_python_that_wheels_are_tested_on_is_supported() -> None:
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    listed = [
        entry.rpartition(" ")[2]
        for entry in PROJECT["project"]["classifiers"]
        if entry.startswith("Programming Language :: Python :: 3.")
    ]
    assert listed[0] == least
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert re.findall(r"cp3(\d+)", built) == [version.removeprefix("3.") for version in listed]


# ---- notebook ------------------------------------------------------------------------------------


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its cells but the two that clone and install."""
    notebook = nbformat.read(REPOSITORY / "examples" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    clone, install, *rest = cells
    assert "git clone" in clone
    assert "--no-build-isolation ./superbert-engine" in install
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    monkeypatch.chdir(tmp_path)
    ran = [shell(source) for source in rest if source.startswith("!")]
    environment, training, _, answers, _ = ran
    assert environment.startswith("project")
    assert "overall" in training
    assert answers.startswith("id\tprediction\n0\t")
    assert [*(tmp_path / "pages").glob("*.html")]

    loop = rest[-1].replace("from superbert.kernels", "from kernels")
    exec(loop, {})
    weights = re.findall(r"tensor\(\[\[(\d\.\d*), (\d\.\d*)\]\]\)", capsys.readouterr().out)
    assert len(weights) == 4
    assert max(map(float, weights[0])) > 1  # the tasks conflict at first


def shell(cell: str) -> str:
    """Run the shell's lines of a cell; return what they print."""
    lines = [line.removeprefix("!") for line in cell.splitlines()]
    code = "\n".join(["set -euo pipefail", *lines]).replace("superbert ", "python -m engine ")
    small = "--max-steps 2 --set encoder.num_hidden_layers=1"
    code = code.replace("--out runs/demo", f"--out runs/demo {small}")
    python = Path(sys.executable).parent
    process = subprocess.run(
        ["bash", "-c", code],
        env={"PATH": f"{python}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
