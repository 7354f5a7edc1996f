"""The guide to files as they are found: its commands on files laid out as GLUE's."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

from engine import predict, train

from ..engine.data.glue import write_glue

GUIDE = (Path(__file__).parents[2] / "docs" / "guide-files.md").read_text(encoding="utf-8")
PROGRAMS = {"train": train.main, "predict": predict.main}
SMALL = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256"),
]


def test_the_guide_can_be_followed(tmp_path: Path, monkeypatch, capsys) -> None:
    write_glue(tmp_path / "glue")
    (tmp_path / "glue" / "CoLA" / "test.tsv").write_text(
        'index\tsentence\n0\tIs "it so?\n1\tYes.\n'
    )
    (recipe,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "glue.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^    (python|awk) (.*)$", GUIDE, re.MULTILINE):
        if command[0] == "awk":
            subprocess.run(" ".join(command), shell=True, check=True)
            continue
        _, module, *arguments = shlex.split(command[1])
        program = module.removeprefix("engine.")
        assert (
            PROGRAMS[program]([*arguments, *(["--set", *SMALL] if program == "train" else [])]) == 0
        )

    shown = capsys.readouterr().out
    assert shown.count("qqp: 1 rows skipped (number of fields)") == 2  # train and dev
    assert shown.count("rows skipped") == 2
    for name in ("scores", "grades"):
        with Path(f"{name}.tsv").open(encoding="utf-8") as file:
            written = list(csv.reader(file, delimiter="\t"))
        assert written[0] == ["id", "prediction"]
        assert len(written) == 3
        assert all(prediction for _, prediction in written[1:])
