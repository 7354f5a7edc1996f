"""Tasks, objectives and phases of any name that a recipe allows go through every command."""

import csv
import json
import re
import runpy
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import evaluate, export, fill, predict, report, train
from engine.config import recipe as recipes
from engine.exporting.model_card import example
from engine.models.named_modules import NamedModules
from engine.reporting import plots
from engine.runs.run import open_run
from engine.runs.texts import VocabularyTexts
from engine.utils.errors import InputError

AWKWARD = [
    *("type", "train", "keys", "items", "half", "forward", "training", "parameters", "_modules"),
    *("__init__", "__class__", "pair", "shared", "encoder", "heads", "adapters", "format", "step"),
    *("lr", "losses", "dev", "Train", "0", "-x", "_0", "--a", "T_destination", "__metadata__"),
]
"""Attributes of modules, words of our own files, and what programs take for something else."""
OBJECTIVES = ["pop", "to"]
HEAD = """\
batch_size = 4
max_steps = 2
log_every = 1
checkpoint_every = 1
log_layer_cosines_every = 1
[encoder]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16
vocab_size = 128
"""


def task(
    name: str, splits: tuple[str, ...] = ("train", "dev"), *, pair: bool = False, classes: str = ""
) -> str:
    files = ", ".join(f'{split} = "{split}.csv"' for split in splits)
    kind, texts, head = ("pair_", ["a", "b"], "shared") if pair else ("", ["a"], "single")
    return f"""
[tasks.{json.dumps(name)}]
head = "{head}"
[tasks.{json.dumps(name)}.source]
kind = "{kind}classification"
text = {texts}
id = "id"
classes = {classes or '["yes", "no", "maybe"]'}
files = {{ {files} }}
"""


def objective(name: str, kind: str = "masked_lm", texts: str = 'files = ["texts.txt"]') -> str:
    return f'\n[objectives.{json.dumps(name)}]\nkind = "{kind}"\n{texts}\n'


def phases(*trained: list[str]) -> str:
    tables = (
        f"[phases.{number}]\ntrain = {json.dumps(names)}\n" for number, names in enumerate(trained)
    )
    return "\n" + "".join(tables)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev", "test"):
        rows = [
            (f"{split}{n}", f"a {word} film", f"the {word} one", label)
            for n, (word, label) in enumerate(
                [("good", "yes"), ("bad", "no"), ("odd", "maybe"), ("nice", "yes")] * 2
            )
        ]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "a", "b", "label"), *rows])
    (folder / "texts.txt").write_text("Songs were nice. Jokes were sad.\nBoats sank. Towns grew.\n")
    return folder


def begin(
    data: Path, out: Path, trained: list[str], *tables: str, options: list[str] | None = None
):
    """Train the recipe that tables make up."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(f"train = {json.dumps(trained)}\n{HEAD}{''.join(tables)}")
    return train.main(
        [str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu", *(options or [])]
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run of all awkward tasks at once, that is stopped and resumed."""
    folder = tmp_path_factory.mktemp("awkward") / "__run__"
    tables = [task(name, pair=n % 2 == 1) for n, name in enumerate(AWKWARD)]
    tables += [objective("pop"), objective("to", "simcse")]
    names = [*AWKWARD, *OBJECTIVES]
    settings = ["--set", "loggers=['tensorboard']"]
    assert begin(data, folder, names, *tables, options=["--max-steps", "1", *settings]) == 0
    assert begin(data, folder, names, *tables, options=["--resume", *settings]) == 0
    return folder


def test_weights_keep_their_names(run):
    model, progress = open_run(run).trained_model(torch.device("cpu"))
    assert progress.step in (1, 2)
    owners = {spec.name: spec.owner for spec in model.parameter_specs(list(model.heads))}
    for number, task_name in enumerate(AWKWARD):
        assert owners[f"heads.{task_name}.output.weight"] == task_name
        assert model.head(task_name).features == ("shared" if number % 2 else "single")
    assert [name for name in model.heads if model.head(name).is_scored] == AWKWARD


def test_steps_and_scores_are_of_every_name(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    names = [*AWKWARD, *OBJECTIVES]
    for line in lines:
        assert list(line["losses"]) == names
        assert list(line["cosines"]) == [f"{a}/{b}" for a, b in combinations(names, 2)]
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert list(scores) == [*AWKWARD, "overall"]
    assert evaluate.main([str(run)]) == 0
    assert list(json.loads((run / "metrics.json").read_text())["scores"]) == list(scores)


def test_every_task_is_predicted(run, data, tmp_path):
    out = tmp_path / "answers.tsv"
    for name in AWKWARD[::5]:
        arguments = [f"--task={name}", "--input", str(data / "test.csv"), "--output", str(out)]
        assert predict.main([str(run), *arguments, "--force"]) == 0
        assert len(out.read_text().splitlines()) == 9
    assert fill.main([str(run)]) == 0


def test_an_export_answers_as_the_run_does(run, data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "export"
    assert export.main([str(run), "--to", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert r"| \_\_init\_\_ | accuracy |" in card
    script, out = tmp_path / "example.py", tmp_path / "out.tsv"
    script.write_text(example())
    for name in ("pair", "format"):
        arguments = [f"--task={name}", "--input", str(data / "test.csv"), "--output", str(out)]
        assert predict.main([str(run), *arguments, "--force"]) == 0
        (_, first, *_) = out.read_text().splitlines()
        texts = ["a good film", "the good one"][: 1 + AWKWARD.index(name) % 2]
        monkeypatch.setattr(sys, "argv", ["example.py", str(folder), name, *texts])
        capsys.readouterr()
        runpy.run_path(str(script))
        assert capsys.readouterr().out.split() == first.split("\t")[1:]


def test_a_page_shows_every_task(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "_svg", lambda _figure: "data:")  # which takes most of the time
    assert report.main([str(run), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "__run__.html").read_text()
    assert [name for name in AWKWARD if f"<h3>{name}</h3>" not in text] == []
    pairs = len([*combinations([*AWKWARD, *OBJECTIVES], 2)])
    assert f"(24 of {pairs}: the lowest and highest means)" in text


def test_adapters_of_awkward_names(data, tmp_path):
    names = ["training", "forward", "keys", "_modules", "__class__"]
    tables = [task(name) for name in names]
    settings = ["--set", "adapter_width=4"]
    assert begin(data, tmp_path / "run", names, *tables, options=settings) == 0
    model, _ = open_run(tmp_path / "run").trained_model(torch.device("cpu"))
    assert list(model.adapters) == names
    assert evaluate.main([str(tmp_path / "run")]) == 0


class Heads(nn.Module):
    """As a model calls its heads."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.heads = NamedModules()
        self.heads.update({name: nn.Linear(4, 1) for name in names})

    def forward(self, x: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
        return [self.heads[name](x) for name in names if name in self.heads]


def test_modules_of_awkward_names_are_compiled():
    names = [*AWKWARD, "_parameters", "__dict__"]
    model, x = Heads(names).train(), torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(x, names), model(x, names), strict=True):
        assert torch.equal(found, expected)


def test_a_module_of_any_name_hides_no_attribute():
    """Of whatever torch's modules have, today or in another version."""
    names = [*dir(nn.ModuleDict()), *vars(nn.ModuleDict()), "_is_root", "call_super_init"]
    modules = NamedModules()
    modules.update({name: nn.Linear(1, 1) for name in names})
    assert list(modules) == list(dict.fromkeys(names))
    modules.train().eval().half().float().requires_grad_(False)
    assert not any(module.training for module in modules.modules())
    assert {name for name, _ in modules.named_parameters()} == {
        f"{name}.{kind}" for name in names for kind in ("weight", "bias")
    }
    modules.load_state_dict(modules.state_dict())
    assert repr(modules)


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "a.b", "a/b", "../x", "a b", "ä", "é", "名", "a\n", "\n", "\0", "\x1b[2J", "%s"),
        *("a:b", "{}", "a$", "_", "-", "--", "__", "\u202e", "a" * 9 + "!", "overall"),
    ],
    ids=ascii,
)
def test_other_names_are_refused_in_one_line(data, tmp_path, name, capsys):
    with pytest.raises(InputError, match="tasks"):
        begin(data, tmp_path / "run", [name], task(name))
    assert not (tmp_path / "run").exists()
    if name != "overall":
        with pytest.raises(InputError, match="objectives"):
            begin(data, tmp_path / "run", ["t"], task("t"), objective(name))


@pytest.mark.parametrize("name", ["", " ", "\x1b[2J", "\n"], ids=ascii)
def test_phases_have_names_that_can_be_printed(name):
    with pytest.raises(InputError, match="phases"):
        recipes.load("demo", [f"phases={{{json.dumps(name)}={{lr=1e-3}}}}"])


def test_an_objective_is_not_called_like_a_task(data, tmp_path):
    with pytest.raises(InputError, match=r"objectives\.t: a task is called so"):
        begin(data, tmp_path / "run", ["t"], task("t"), objective("t"))


@pytest.mark.parametrize("classes", ['["a", " b"]', '["a ", "b"]', '["a", "\\n"]'])
def test_classes_that_no_label_spells_are_refused(data, tmp_path, classes):
    with pytest.raises(InputError, match=r"source.* has spaces around it"):
        begin(data, tmp_path / "run", ["t"], task("t", classes=classes))


SPLITS = [c for k in (1, 2, 3) for c in combinations(("train", "dev", "test"), k)]


@pytest.mark.parametrize("splits", SPLITS, ids="-".join)
def test_every_command_takes_a_task_with_some_files_alone(data, tmp_path, splits):
    """What a command does not need it does not ask for; what it needs it asks for in one line."""
    folder = tmp_path / "run"
    if "train" not in splits or "dev" not in splits:
        with pytest.raises(InputError, match=r"tasks\.b\.source\.files: no (train|dev) split"):
            begin(data, folder, ["a", "b"], task("a"), task("b", splits))
        assert not folder.exists()
    if "dev" not in splits:
        with pytest.raises(InputError, match=r"tasks\.b\.source\.files: no dev split"):
            begin(data, folder, ["a"], task("a"), task("b", splits))
        assert not folder.exists()
        return
    assert begin(data, folder, ["a"], task("a"), task("b", splits)) == 0
    arguments = ["--task", "b", "--input", str(data / "test.csv")]
    assert predict.main([str(folder), *arguments, "--output", str(tmp_path / "out.tsv")]) == 0
    assert evaluate.main([str(folder)]) == 0
    if "train" in splits:
        assert evaluate.main([str(folder), "--split", "train"]) == 0
    else:
        with pytest.raises(InputError, match="no train split"):
            evaluate.main([str(folder), "--split", "train"])
    assert export.main([str(folder), "--to", str(tmp_path / "model")]) == 0
    file = "train" if "train" in splits else "dev"
    card = (tmp_path / "model/README.md").read_text()
    assert f"- b (not trained) from {file}.csv: a -> yes, no, maybe" in card


@pytest.mark.parametrize("splits", SPLITS, ids="-".join)
def test_an_objective_alone_needs_no_file_of_a_task(data, tmp_path, splits):
    assert begin(data, tmp_path / "run", ["lm"], objective("lm"), task("b", splits)) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0


@pytest.mark.parametrize("kind", ["masked_lm", "masked_lm_next", "simcse"])
@pytest.mark.parametrize("first", [["lm"], ["lm", "b"], ["b"]], ids="-".join)
def test_objectives_and_tasks_in_any_phase(data, tmp_path, kind, first):
    tables = [objective("lm", kind), task("b"), task("c", ("dev",)), phases(first, ["b", "lm"])]
    assert begin(data, tmp_path / "run", ["lm"], *tables) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert "trained on" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ((["lm"], ["b"]), {"film", "Songs"}),
        ((["lm"],), {"Songs"}),
        ((["b"],), {"film"}),
        ((["of-b"], ["lm"]), {"film", "Songs"}),
    ],
    ids=["both", "objective", "task", "objectives"],
)
def test_the_vocabulary_is_learnt_from_what_some_phase_trains(data, tmp_path, trained, expected):
    tables = [objective("lm"), objective("of-b", "simcse", 'sentences_of = ["b"]')]
    recipe = tmp_path / "recipe.toml"
    # The tasks named above are those of no phase.
    text = [*tables, task("b"), task("c", ("dev",)), phases(*trained)]
    if any("b" in names for names in trained):
        assert trained[-1] == ["b"]
    recipe.write_text(f'train = ["c"]\n{HEAD}{"".join(text)}')
    found = " ".join(VocabularyTexts(recipes.load(str(recipe), [f"data={data}"])))
    assert {word for word in ("film", "Songs") if word in found} == expected
    assert found.count("Songs") <= 1


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([task("b", ("train",))], "no dev split"),
        ([task("b", ("dev",))], "no train split"),
        ([task("b").replace('train = "train.csv"', 'train = "none.csv"')], r"none\.csv"),
        ([task("b").replace('dev = "dev.csv"', 'dev = "none.csv"')], r"none\.csv"),
    ],
    ids=["dev", "train", "train-file", "dev-file"],
)
def test_what_a_later_phase_lacks_is_missed_before_the_first(data, tmp_path, tables, message):
    with pytest.raises(InputError, match=message):
        begin(data, tmp_path / "run", ["lm"], objective("lm"), *tables, phases(["lm"], ["b"]))
    assert not (tmp_path / "run").exists()


def test_a_card_is_markdown_whatever_it_quotes(data, tmp_path):
    classes = json.dumps(["yes", "no", "maybe", "`x`", "<b>", "| a |", "a\nb", "```\n# x"])
    assert begin(data, tmp_path / "run", ["t"], task("t", classes=classes)) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model/README.md").read_text()
    assert r"yes, no, maybe, \`x\`, &lt;b\>, \| a \|, a b, \`\`\` \# x" in card
    fences = re.findall("^````*", card, re.MULTILINE)
    assert fences[-2:] == ["````", "````"]


def test_a_card_names_some_of_many_classes(data, tmp_path):
    classes = json.dumps(["yes", "no", "maybe", *(f"c{n}" for n in range(2997))])
    assert begin(data, tmp_path / "run", ["t"], task("t", classes=classes)) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert "c26 and 2,970 more\n" in (tmp_path / "model/README.md").read_text()
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "run.html").stat().st_size < 1 << 20


@pytest.mark.parametrize("program", [train, evaluate, predict, export, report, fill], ids=str)
def test_two_dashes_are_no_value(program, capsys):
    for option in ("--task", "--to", "--out", "--data", "--device"):
        with pytest.raises(SystemExit) as stop:
            program.main(["run", f"{option}=--"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {option}=--: no value; give one")
