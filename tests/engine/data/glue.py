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
_MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    '0\t1\t1n\tmade\t( a )\t( b )\t(S a)\t(S b)\tHe said "yes.\tHe agreed.\tneutral\tneutral\n'
    "1\t2\t2e\tmade\t( a )\t( b )\t(S a)\t(S b)\tIt rains.\tIt's wet.\tentailment\tentailment\n"
    "2\t3\t3c\tmade\t( a )\t( b )\t(S a)\t(S b)\tIt's dry.\tIt's wet.\tneutral\tcontradiction\n"
)

FILES = {
    "CoLA": _COLA.encode(),
    "SST-2": _SST.encode() + b"\n\n",
    "MRPC": b"\xef\xbb\xbf" + _MRPC.encode(),
    "STS-B": _STSB.encode() + b"\n",
    "QQP": _QQP.encode(),
    "MNLI": _MNLI.encode(),
}
"""The content of ``train.tsv`` by task."""


def write_glue(folder: Path) -> None:
    """Write the files of all tasks; the dev split is the same as the train split."""
    for task, content in FILES.items():
        (folder / task).mkdir(parents=True)
        for split in ("train", "dev_matched" if task == "MNLI" else "dev"):
            (folder / task / f"{split}.tsv").write_bytes(content)
