"""The commands of the page and of its files for Slurm and Kubernetes are ones that are taken."""

import itertools
import re
import shlex
import subprocess
from argparse import Namespace

import pytest
from torch.distributed.run import parse_args

from bench import scaling
from engine.cli.options import overrides, parser
from engine.config import recipe as recipes

from .pages import Page

yaml = pytest.importorskip("yaml")


PAGE = Page("many-gpus")


def block(language: str) -> str:
    """The page's block of a language."""
    (found,) = PAGE.blocks(language)
    return found


def check_command(text: str) -> list[str]:
    """Check what follows ``torchrun`` in a shell's text; return torchrun's own options."""
    line = text.replace("\\\n", " ").partition("exec torchrun ")[2].splitlines()[0]
    numbers = {"$SLURM_NNODES": "2", "$is_host": "true"}
    words = shlex.split(line.partition("'")[0])
    for name, value in numbers.items():
        words = [word.replace(name, value) for word in words]
    given, options = check_words(words)
    assert options.resume
    assert given.nnodes == "2"
    return words


def check_words(words: list[str]) -> tuple[Namespace, Namespace]:
    """Check the arguments of ``torchrun``; return torchrun's and those of ``engine.train``."""
    given = parse_args(words)
    assert given.module
    assert given.training_script == "engine.train"
    options = parser().parse_args(given.training_script_args)
    assert options.out is not None
    recipes.load(options.recipe, overrides(options))
    return given, options


def test_the_three_commands() -> None:
    commands = PAGE.commands("Three commands")
    one, two, again = (check_words(shlex.split(line)[1:]) for line in commands)
    assert (one[0].nnodes, one[0].nproc_per_node) == ("1:1", "8")
    assert (two[0].nnodes, two[0].node_rank, two[0].master_addr) == ("2", 0, "HOST")
    assert again[0].max_restarts == 3
    assert again[1].resume
    assert not one[1].resume


def test_the_arithmetic_is_what_the_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row of the table but for one rank alone, from the two commands with their options."""
    monkeypatch.setenv("COLUMNS", "200")
    table = PAGE.section("What to expect")
    printed: dict[tuple[str, str], list[str]] = {}
    for line, options in itertools.product(
        PAGE.commands("What to expect")[:2],
        itertools.product(("", "--weak"), ("sharded", "replicated")),
    ):
        weak, distribute = options
        words = [*shlex.split(line.partition(" [")[0])[3:], weak, f"--{distribute}"]
        words = [word for word in words if word not in ("", "--sharded")]
        monkeypatch.setattr("sys.argv", ["scaling", *words])
        scaling.main()
        for row in re.findall(r"^│ (\d.*) │$", capsys.readouterr().out, re.MULTILINE):
            ranks, *cells = (cell.strip() for cell in row.split("│"))
            printed.setdefault((ranks, distribute), []).append(cells[0])
            sent, held = cells[-2:]
            if ranks != "1":
                shown = _row(table, ranks, distribute)
                assert (shown[4].replace(",", ""), shown[5]) == (sent, held)
    for (ranks, distribute), (one_for_all, own) in printed.items():
        if ranks != "1":
            shown = _row(table, ranks, distribute)
            assert float(shown[1]) == pytest.approx(float(own), abs=0.051)
            assert float(shown[3]) == pytest.approx(float(one_for_all), abs=0.051)


def _row(table: str, ranks: str, distribute: str) -> list[str]:
    """Return the cells of the page's table after the number of ranks."""
    (found,) = re.findall(rf"^\| {int(ranks):,} \| ({distribute} .*) \|$", table, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


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
