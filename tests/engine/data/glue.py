"""Files laid out as those of GLUE, of made-up sentences and with the oddities of the real ones."""

from pathlib import Path

_COLA = (
    'made\t1\t\tThe "cat sat on the mat.\n'
    "made\t0\t*\tMat the on sat cat.\n"
    'made\t1\t\t"Sit," said he, and "sit it did.\n'
    'made\t0\t*\t"Whole sentences may be quoted"\n'
)
_SST = "sentence\tlabel\na \" fine film \t1\ndull , '' dull \t0\n"
_MRPC = (
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t70\t71\t"The rates rose, he said.\tHe said "the rates rose".\r\n'
    "0\t72\t73\tShares fell.\tThe café opened.\r\n"
)
_STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    '0\tnews\tmade\t2012\t1\tnone\tnone\t"A man plays.\tA man is playing."\t5.000\n'
    '1\tnews\tmade\t2012\t3\tnone\tnone\tA dog runs.\tThe 6" pipe broke.\t0.250\n'
)
_QQP = (
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    '0\t1\t2\tWhat is "this?\tWhat is "that?\t0\n'
    "1\t3\t4\tHow do I\n"  # cut off, as some are
    '2\t5\t6\t"""Why"" me?\tWhy "me"?\t1\n'
)
_PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
_NLI = f"index\tpromptID\tpairID\tgenre\t{_PARSES}\tsentence1\tsentence2"
_OF_MADE = "made\t( a )\t( b )\t(S a)\t(S b)"
_MNLI = (
    f"{_NLI}\tlabel1\tgold_label\n"
    f'0\t1\t1n\t{_OF_MADE}\tHe said "yes.\tHe agreed.\tneutral\tneutral\n'
    f"1\t2\t2e\t{_OF_MADE}\tIt rains.\tIt's wet.\tentailment\tentailment\n"
    f"2\t3\t3c\t{_OF_MADE}\tIt's dry.\tIt's wet.\tneutral\tcontradiction\n"
)
_MNLI_DEV = (  # five annotators, who agreed on nothing in the last row
    f"{_NLI}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    f'0\t1\t1n\t{_OF_MADE}\tHe "said so.\tHe lied.' + 5 * "\tneutral" + "\tneutral\n"
    f"1\t2\t2e\t{_OF_MADE}\tIt pours.\tIt's wet." + 5 * "\tentailment" + "\tentailment\n"
    f"2\t3\t3c\t{_OF_MADE}\tIt's dry.\tIt's wet." + 5 * "\tcontradiction" + "\tcontradiction\n"
    f"3\t4\t4c\t{_OF_MADE}\tShe left.\tShe ate.\tneutral\tneutral\tentailment\tentailment\t\t-\n"
)
_QNLI = (
    "index\tquestion\tsentence\tlabel\n"
    '0\tWho wrote "it?\tAda Lee wrote it.\tentailment\n'
    '1\tWhen did it rain?\tThe "Song" was sung by all.\tnot_entailment\n'
)
_RTE = (
    "index\tsentence1\tsentence2\tlabel\n"
    '0\tThe "Oak fell in May.\tA tree fell.\tentailment\n'
    "1\tThe ship sank.\tThe ship is new.\tnot_entailment\n"
)
_WNLI = (
    "index\tsentence1\tsentence2\tlabel\n"
    "0\tThe cup broke as it fell on the stone.\tThe cup fell.\t1\n"
    '1\tAnn told Eve that "she had won.\tEve had won.\t0\n'
)

FILES = {
    "CoLA": _COLA.encode(),
    "SST-2": _SST.encode() + b"\n\n",
    "MRPC": b"\xef\xbb\xbf" + _MRPC.encode(),
    "STS-B": _STSB.encode() + b"\n",
    "QQP": _QQP.encode(),
    "MNLI": _MNLI.encode(),
    "QNLI": _QNLI.encode(),
    "RTE": _RTE.encode(),
    "WNLI": _WNLI.replace("\n", "\r\n").encode(),
}
"""The content of ``train.tsv`` by task."""

TESTS = {
    "CoLA": 'index\tsentence\n0\tIs "it so?\n1\tYes.\n2\tAnd no "no?\n',
    "SST-2": 'index\tsentence\n0\ta " good film \n1\tdull\n',
    "MRPC": (
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '0\t80\t81\t"Prices fell, she said.\tPrices fell.\r\n1\t82\t83\tYes.\tNo.\r\n'
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        '0\tnews\tmade\t2012\t1\tnone\tnone\t"A man sings.\tA cat sleeps.\n'
    ),
    "QQP": 'id\tquestion1\tquestion2\n0\tIs "this?\tIs it?\n1\tWho?\t"Who\n2\tHow?\tWhy?\n',
    "QNLI": 'index\tquestion\tsentence\n0\tWhere is "it?\tIt is there.\n',
    "RTE": 'index\tsentence1\tsentence2\n0\tIt "rose.\tIt fell.\n1\tA dog ran.\tA dog moved.\n',
    "WNLI": "index\tsentence1\tsentence2\r\n0\tThe lid fit it.\tThe lid fit.\r\n",
}
"""The content of ``test.tsv`` by task, of all but MNLI."""

MNLI_TEST = f'{_NLI}\n0\t1\t1\t{_OF_MADE}\tIt "rose.\tIt fell.\n1\t2\t2\t{_OF_MADE}\tYes.\tNo.\n'
"""That of MNLI's two."""

DIAGNOSTIC = 'index\tsentence1\tsentence2\n0\tThe "cat sat.\tIt sat.\n1\tNo cat sat.\tOne sat.\n'
"""The content of ``diagnostic/diagnostic.tsv``."""


def write_glue(folder: Path) -> None:
    """Write the files of all tasks; but for MNLI's, the dev split is the same as the train split.

    The rows of MNLI's mismatched dev split are those of the matched one in another order.
    """
    for task, content in FILES.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "train.tsv").write_bytes(content)
        if task != "MNLI":
            (folder / task / "dev.tsv").write_bytes(content)
            (folder / task / "test.tsv").write_bytes(TESTS[task].encode())
    header, *rows = _MNLI_DEV.splitlines(keepends=True)
    for name, text in {
        "dev_matched": _MNLI_DEV,
        "dev_mismatched": "".join([header, *reversed(rows)]),
        "test_matched": MNLI_TEST,
        "test_mismatched": MNLI_TEST.replace("It fell.", "It rose."),
    }.items():
        (folder / "MNLI" / f"{name}.tsv").write_bytes(text.encode())
    (folder / "diagnostic").mkdir()
    (folder / "diagnostic" / "diagnostic.tsv").write_bytes(DIAGNOSTIC.encode())
