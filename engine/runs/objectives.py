"""Build the examples and the head of an objective from its settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config.objective import ObjectiveRecipe
from ..config.recipe import Recipe
from ..data.addresses import Place
from ..data.cache import Reading, load_arrays
from ..data.entry import EntryWriter
from ..data.masked_text import MaskedText, PackedSegments, check_texts_follow
from ..data.objective_sequences import SequenceSettings, write_sequences
from ..data.raw_text import NOT_KNOWN, Found
from ..data.sentences_twice import SentencesTwice
from ..data.sequences import PackedSequences
from ..data.tokenized import Array
from ..data.tokenizer import Tokenizer
from ..models.config import EncoderConfig
from ..models.heads import HeadSettings
from ..utils.errors import InputError
from .texts import ObjectiveTexts, watched


def head_settings(name: str, settings: ObjectiveRecipe, config: EncoderConfig) -> HeadSettings:
    """Return what the head of an objective is built from."""
    return HeadSettings(
        kind=settings.kind, name=name, config=config, temperature=settings.temperature
    )


def load_examples(
    name: str,
    recipe: Recipe,
    tokenizer: Tokenizer,
    max_length: int,
    reading: Reading,
    files: Sequence[Place] | None = None,
) -> MaskedText | SentencesTwice:
    """Return what an objective draws its batches from, from the cache where it was made before.

    Args:
        name: of the objective.
        recipe: that has it.
        tokenizer: what to split the texts with.
        max_length: the most tokens in a sequence.
        reading: how data are read.
        files: those that are dealt to this rank; None for all that the recipe names.

    Raises:
        InputError: a text cannot be read, or there is too little.
    """
    settings, texts = recipe.objectives[name], ObjectiveTexts(recipe, name, files)
    sequences = _sequence_settings(settings, max_length)

    def write(writer: EntryWriter) -> dict[str, Any]:
        with reading.watch(texts.names, "texts") as show:
            shown = watched(texts, lambda count: show(count, texts.share))
            append = writer.append
            write_sequences(shown, sequences, tokenizer, append, reading.workers)
        texts.check_unchanged()
        return {"largest": texts.largest, "texts": texts.found, "notes": texts.notes}

    made_from = [
        *texts.made_from(verify=reading.verify),
        repr(sequences),
        repr(tokenizer.definition),
    ]
    what = f"sequences of {name} ({settings.kind})"
    arrays, said = load_arrays(made_from, texts.names, what, write, verify=reading.verify)
    found = Found(said["largest"], said["texts"], tuple(said["notes"]))
    return _examples(name, settings, arrays, tokenizer, recipe.seed, found)


def build_examples(
    name: str,
    settings: ObjectiveRecipe,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    seed: int,
) -> MaskedText | SentencesTwice:
    """Return what an objective draws its batches from, in memory.

    Args:
        name: of the objective.
        settings: of the objective.
        texts: sentences or documents.
        tokenizer: what to split them with.
        max_length: the most tokens in a sequence.
        seed: decides what is masked and drawn.

    Raises:
        InputError: there is too little text.
    """
    pieces: dict[str, list[Array]] = {"tokens": [], "offsets": [], "texts": []}
    write_sequences(
        texts,
        _sequence_settings(settings, max_length),
        tokenizer,
        lambda array, rows: pieces[array].append(rows),
        workers=1,
    )
    arrays = {array: np.concatenate(rows) for array, rows in pieces.items() if rows}
    return _examples(name, settings, arrays, tokenizer, seed, NOT_KNOWN)


def _sequence_settings(settings: ObjectiveRecipe, max_length: int) -> SequenceSettings:
    return SequenceSettings(
        kind=settings.kind,
        max_length=max_length,
        join=settings.join,
        short=settings.short,
        divide=settings.divide,
    )


def _examples(
    name: str,
    settings: ObjectiveRecipe,
    arrays: Mapping[str, Array],
    tokenizer: Tokenizer,
    seed: int,
    found: Found,
) -> MaskedText | SentencesTwice:
    texts = arrays.get("texts", np.empty(0, dtype=np.int64))
    if settings.kind == "masked_lm_next":
        check_texts_follow(texts)
    if not len(texts):
        raise InputError(f"objectives.{name}: no text of it has a token; name other texts")
    tokens = arrays.get("tokens", np.empty(0, dtype=np.uint16))
    sequences = PackedSequences(tokens, arrays["offsets"])
    if settings.kind == "simcse":
        return SentencesTwice(name, sequences, found)
    columns = 2 if settings.kind == "masked_lm_next" else 1
    segments = PackedSegments(sequences, columns, texts)
    return MaskedText(
        name,
        segments,
        tokenizer,
        settings.mask_share,
        seed,
        found,
        whole_words=settings.whole_words,
    )
