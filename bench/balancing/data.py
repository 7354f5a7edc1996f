"""Write the data of the five-task comparison: the given files, and SST with two classes.

    python -m bench.balancing.data --data DIR --out DIR

SST's five classes become two as in SST-2: 0 and 1 are negative, 3 and 4 positive, 2 is left out
(6,920 training and 872 dev sentences of the original files).  The other files are linked to.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from engine.cli.common import Parser, run_cli, terminal
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.utils.errors import InputError
from engine.utils.files import explained, write_text

FILE = "sst-polarity-{split}.tsv"
_NEUTRAL = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m bench.balancing.data", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the data files; needed")
    add("--out", type=Path, required=True, metavar="DIR", help="where the data go; needed")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        raise InputError(f"--data {options.data}: no such folder")
    with explained("write", options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(options.data.iterdir()):
            link = options.out / file.name
            if file.is_file() and not link.exists():
                link.symlink_to(file.resolve())
    for split in ("train", "dev"):
        file = options.out / FILE.format(split=split)
        count = write_polarity(FORMATS["sst"].file(options.data, split), file)
        terminal().print(f"wrote {file}: {count} sentences", soft_wrap=True, highlight=False)
    return 0


def write_polarity(source: Path, target: Path) -> int:
    """Write the sentences of an SST file that are not neutral; return how many.

    Raises:
        InputError: the file cannot be read.
    """
    table = read_table(source, FORMATS["sst"])
    assert table.labels is not None, "read with labels"
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("id", "sentence", "polarity"))
    rows = [
        (id_, sentence, "positive" if label > _NEUTRAL else "negative")
        for id_, sentence, label in zip(table.ids, table.sentences[0], table.labels, strict=True)
        if label != _NEUTRAL
    ]
    writer.writerows(rows)
    write_text(target, text.getvalue())
    return len(rows)


if __name__ == "__main__":
    run_cli(main)
