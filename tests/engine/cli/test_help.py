"""Look-ups of a user: help, fields, completion, and what a run would need."""

import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import engine
from engine import cache, env, evaluate, export, fill, glue, predict, report, sweep, train
from engine.__main__ import COMMANDS
from engine.__main__ import main as superbert
from engine.cli.completion import bash_script, bash_script_of_all
from engine.cli.help import print_fields, recipe_fields
from engine.config import recipe as recipes
from engine.config.messages import ANY_NAME
from engine.train import main

from ...conftest import REPOSITORY
from ..conftest import TINY

PROGRAMS = (train, evaluate, predict, export, report, sweep, fill, glue, cache, env)


def test_every_command_is_here():
    assert [f"engine.{name}" for name in COMMANDS] == [program.__name__ for program in PROGRAMS]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_option_stands_in_a_group_and_says_what_happens_without_it(program):
    parser = program.parser()
    assert parser.prog == f"python -m {program.__name__}"
    for group in parser._action_groups:
        own = [a for a in group._group_actions if a.dest not in ("help", "version")]
        assert not own or group.title not in ("options", "positional arguments")
        for action in own:
            help_ = " ".join(action.help.split())
            if action.required and action.option_strings:
                assert help_.endswith("; needed"), action
            elif action.nargs != 0 and action.option_strings and action.dest != "completion":
                assert "(default: " in help_, action


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_option_takes_an_empty_value(program, capsys):
    """As an unset variable of the shell gives it: --init "$MODEL"."""
    parser = program.parser()
    actions = [a for a in parser._actions if a.nargs != 0]
    places = [action for action in actions if not action.option_strings]
    for action in actions:
        (*_, name) = action.option_strings or [action.metavar]
        before = action.option_strings[-1:] or ["x"] * places.index(action)
        given = [[*before, text] for text in ("", " ", "\u2003")]
        for arguments in [*given, *([f"{option}="] for option in action.option_strings)]:
            with pytest.raises(SystemExit) as stop:
                parser.parse_args(arguments)
            (line,) = capsys.readouterr().err.splitlines()
            assert stop.value.code == 2
            assert line.startswith(f"error: argument {name}: "), line
            assert "invalid" in line or "no value" in line or "expected a whole" in line


def test_every_command_tells_its_version(capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"superbert-engine {engine.__version__}\n"


def test_every_field_has_a_meaning_and_its_default_can_be_set():
    for field in recipe_fields():
        assert field.text, field.key
        if field.default and ANY_NAME not in field.key and field.key != "phases":
            recipes.load("cgs", [f"{field.key}={field.default}"])


def test_a_pipe_gets_a_whole_line_for_each_field(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["--fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, field in zip(lines, recipe_fields(), strict=True):
        text = field.text.replace("``", "")
        assert line.split(maxsplit=1)[0] == field.key
        assert field.default in line
        assert line.endswith(text)


@pytest.mark.parametrize("width", [44, 80, 200])
def test_a_terminal_gets_whole_names_and_texts_at_its_width(width):
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=width)
    print_fields(console)
    lines = console.file.getvalue().splitlines()
    fields = list(recipe_fields())
    names = [line for line in lines if not line.startswith(" ")]
    assert [name.partition(" = ")[0] for name in names] == [field.key for field in fields]
    texts = " ".join("".join(f"{line}\n" for line in lines).split())
    for field in fields:
        assert " ".join(field.text.replace("``", "").split()) in texts
    assert max(len(line) for line in lines if line.startswith(" ")) <= width


@pytest.mark.parametrize("field", [f for f in recipe_fields() if f.choices], ids=lambda f: f.key)
def test_choices_are_the_values_that_a_field_takes(field):
    assert field.default == "" or field.default.strip('"') in field.choices
    if ANY_NAME not in field.key:
        for choice in field.choices:
            recipes.load("cgs", [f"{field.key}={choice}"])


SCRIPT_OF_ALL = bash_script_of_all({p.__name__.rpartition(".")[2]: p.parser() for p in PROGRAMS})


def complete(*words: str) -> list[str]:
    """Return what bash offers for the last word; ``=`` is a word of its own, as bash takes it."""
    completer = "_superbert" if words[0] == "superbert" else "_superbert_train"
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        "compopt() { :; }\n"  # exists only while bash completes
        f"{SCRIPT_OF_ALL}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        f"{completer}\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    process = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr == ""
    return process.stdout.split()


TRAIN = ("python", "-m", "engine.train")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*TRAIN, "cg"), ["cgs"]),
        ((*TRAIN, "cgs", "--max"), ["--max-steps"]),
        ((*TRAIN, "cgs", "--set", "weight_"), ["weight_decay="]),
        ((*TRAIN, "cgs", "--set", "lr", "=", "1", "encoder.vocab"), ["encoder.vocab_size="]),
        ((*TRAIN, "cgs", "--set", "tasks.sts.hea"), ["tasks.sts.head="]),
        ((*TRAIN, "cgs", "--set", "tasks.cfimdb.fea"), []),
        ((*TRAIN, "superbert", "--set", "phases.pretrain.lr"), ["phases.pretrain.lr="]),
        ((*TRAIN, "superbert", "--set", "objectives.masked_lm.ki"), ["objectives.masked_lm.kind="]),
        ((*TRAIN, "superbert", "--set", "tasks.sst.loss", "=", "m"), ["mse"]),
        ((*TRAIN, "cgs", "--set", "balance_granularity", "="), ["model", "layer", "tensor"]),
        ((*TRAIN, "cgs", "--set", "balance", "=", "pc"), ["pcgrad"]),
        (("python", "-m", "http.server", "--b"), []),
        (("superbert", "e"), ["evaluate", "export", "env"]),
        (("superbert", "train", "cg"), ["cgs"]),
        (("superbert", "train", "cgs", "--max"), ["--max-steps"]),
        (("superbert", "train", "cgs", "--set", "tasks.sts.hea"), ["tasks.sts.head="]),
        (("superbert", "train", "--set", "balance", "=", "pc"), ["pcgrad"]),
        (("superbert", "export", "run", "--o"), ["--onnx"]),
        (("superbert", "export", "run", "fold"), []),
    ],
)
def test_bash_completes(words, expected):
    assert complete(*words) == expected


def test_bash_completes_the_tasks_of_ones_own_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[tasks.moods]\nhead = "single"\n[tasks.moods.source]\n[tasks]\nduels.weight = 2\n'
    )
    words = (*TRAIN, str(recipe), "--set", "tasks.")
    names = {word.split(".")[1] for word in complete(*words)}
    assert names == {"moods", "duels"}
    assert complete(*words[:-1], "tasks.moods.source.kin") == ["tasks.moods.source.kind="]
    assert complete(*words[:-1], "tasks.moods.source.kind", "=", "pair_r") == ["pair_regression"]


def test_the_command_prints_the_completion_script(capsys):
    assert main(["--completion", "bash"]) == 0
    assert capsys.readouterr().out == bash_script() + "\n"


def test_a_dry_run_shows_what_it_needs_and_writes_nothing(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "run", "--dry-run", "--set", *TINY]) == 0
    assert not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    assert "hidden_size = 32" in text
    assert re.search(r"steps +│ 6, 2 an epoch", text)
    numel, rows = re.search(r"task gradients \[(\d), (\d+)\] +│ ([\d.]+) MiB", text).group(2, 3)
    assert float(rows) == pytest.approx(3 * int(numel) * 4 / 2**20, abs=0.05)
    assert float(re.search(r"seconds a step +│ ([\d.e-]+)", text)[1]) > 0
    assert re.search(r"time, without evaluations and warming up +│ \d+:\d\d:\d\d", text)


def test_the_script_of_all_commands_is_printed(capsys):
    assert superbert(["--completion", "bash"]) == 0
    assert capsys.readouterr().out == SCRIPT_OF_ALL
    assert superbert(["--completion", "csh"]) == 2
    assert capsys.readouterr().err == "error: --completion 'csh': expected bash\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trian", "'trian': no command; did you mean train?"),
        ("--help=train", "'--help=train': no command; commands: train, evaluate, "),
        ("\x1b[1m", "'\\x1b[1m': no command; commands: "),
    ],
)
def test_an_unknown_command_is_one_line(name, said, capsys):
    assert superbert([name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_help_imports_no_torch():
    code = (
        "import sys, engine.__main__ as script\n"
        "for line in ([], ['--help'], ['--version'], ['train-']): script.main(line)\n"
        "assert not {'torch', 'numpy', 'rich'} & {*sys.modules}\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(f"\n  {name:10}" in run.stdout for name in COMMANDS)
