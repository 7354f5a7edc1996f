"""The files for Slurm and Kubernetes parse, and their command lines are ones that programs take."""

import re
import shlex
import subprocess

import pytest
from torch.distributed.run import parse_args

from engine.cli.options import overrides, parser
from engine.config import recipe as recipes

from ..conftest import REPOSITORY

yaml = pytest.importorskip("yaml")


def block(language: str) -> str:
    """The page's block of a language."""
    page = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return found


def check_command(text: str) -> list[str]:
    """Check what follows ``torchrun`` in a shell's text; return torchrun's own options."""
    line = text.replace("\\\n", " ").partition("exec torchrun ")[2].splitlines()[0]
    numbers = {"$SLURM_NNODES": "2", "$is_host": "true"}
    words = shlex.split(line.partition("'")[0])
    for name, value in numbers.items():
        words = [word.replace(name, value) for word in words]
    given = parse_args(words)
    assert given.module
    assert given.training_script == "engine.train"
    options = parser().parse_args(given.training_script_args)
    assert options.resume
    assert options.out is not None
    recipes.load(options.recipe, overrides(options))
    assert given.nnodes == "2"
    return words


def test_the_file_for_slurm() -> None:
    script = block("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = check_command(script)
    (seconds,) = re.findall(r"#SBATCH --signal=TERM@(\d+)", script)
    assert int(words[words.index("--shutdown-timeout") + 1]) < int(seconds)


def test_the_file_for_kubernetes() -> None:
    service, job = yaml.safe_load_all(block("yaml"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == name
    assert spec["completions"] == spec["parallelism"] == 2
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = check_command(script)
    assert f"{name}-0.{pod['subdomain']}:29400" in words
    grace = pod["terminationGracePeriodSeconds"]
    assert int(words[words.index("--shutdown-timeout") + 1]) < grace
