"""Build the examples and the head of an objective from its settings."""

from collections.abc import Sequence

from ..config.objective import ObjectiveRecipe
from ..data.masked_text import MaskedText, following_segments, single_segments
from ..data.raw_text import NOT_KNOWN, Found, framed
from ..data.sentences_twice import SentencesTwice
from ..data.tokenizer import Tokenizer
from ..models.config import EncoderConfig
from ..models.heads import HeadSettings


def head_settings(name: str, settings: ObjectiveRecipe, config: EncoderConfig) -> HeadSettings:
    """Return what the head of an objective is built from."""
    return HeadSettings(
        kind=settings.kind, name=name, config=config, temperature=settings.temperature
    )


def build_examples(
    name: str,
    settings: ObjectiveRecipe,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    seed: int,
    found: Found = NOT_KNOWN,
) -> MaskedText | SentencesTwice:
    """Return what an objective draws its batches from.

    Args:
        name: of the objective.
        settings: of the objective.
        texts: sentences or documents.
        tokenizer: what to split them with.
        max_length: the most tokens in a sequence.
        seed: decides what is masked and drawn.
        found: where the texts come from.

    Raises:
        InputError: there is too little text.
    """
    if settings.kind == "simcse":
        return SentencesTwice(name, framed(tokenizer, texts, max_length), found)
    segments = (
        following_segments(texts, tokenizer, max_length)
        if settings.kind == "masked_lm_next"
        else single_segments(texts, tokenizer, max_length, settings.join, settings.short)
    )
    return MaskedText(name, segments, tokenizer, settings.mask_share, seed, found)
