"""The fill-in probe: words behind a mask, before training and after."""

import pytest

from engine import fill
from engine.runs.run import open_run
from engine.utils.errors import InputError

PRETRAIN = (
    "objectives.masked_lm.sentences_of=['sst']",
    "objectives.masked_lm.max_per_source=1000",
    "phases.pretrain.epochs=12",
    "phases.pretrain.batch_size=32",
    "lr=5e-3",
)


def test_masked_lm_learns_the_words_of_its_text(tiny_run, capsys):
    folder = tiny_run("run", recipe="superbert", settings=PRETRAIN)
    capsys.readouterr()
    assert fill.main([str(folder), "the plot was very [MASK] .", "--top", "3"]) == 0
    sentence, before, after = capsys.readouterr().out.splitlines()
    assert sentence == "the plot was very [MASK] ."
    assert before.split()[0] == "before"
    assert before.split()[1::2] != after.split()[1::2]

    run = open_run(folder)
    model, _ = run.trained_model(device=next(run.new_model().parameters()).device)
    words = fill.likeliest(model, "masked_lm", run.tokenizer, "the plot [MASK] very good .", 3)
    # "was" follows an aspect in every sentence of that corpus
    assert "was" in [word for word, _ in words]
    assert all(0 < share < 1 for _, share in words)


def test_a_sentence_needs_one_mask(tiny_run):
    folder = tiny_run("run", "--max-steps", "1", recipe="superbert")
    for sentence in ("no mask", "[MASK] and [MASK]"):
        with pytest.raises(InputError, match="expected one"):
            fill.main([str(folder), sentence])


def test_a_run_without_masked_lm_is_refused(tiny_run):
    folder = tiny_run("run", "--max-steps", "1")
    with pytest.raises(InputError, match="no masked LM"):
        fill.main([str(folder)])
