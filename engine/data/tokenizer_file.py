"""Find out whether a tokenizer file is safe to load.

The ``tokenizers`` library aborts the process, or never returns, on some files.  The component types
of BERT's and RoBERTa's files are safe, with fields in their usual ranges.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..utils.errors import InputError
from ..utils.untrusted_io import parse_json

LARGEST_FILE = 64 << 20
"""Bytes; the file of a vocabulary of 250,000 tokens has 17 million."""

_SAMPLING = ("dropout", "alpha", "nbest_size")
"""Fields of models that split the same text differently from one time to the next."""

_LARGEST_ID = (1 << 24) - 1
"""The library writes a vocabulary down in memory for all numbers up to the largest one."""

_TokenId = Annotated[int, Field(ge=0, le=_LARGEST_ID)]
_Token = Annotated[str, Field(max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _AddedToken(_Strict):
    id: _TokenId
    content: Annotated[str, Field(min_length=1, max_length=256)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _BertNormalizer(_Strict):
    type: Literal["BertNormalizer"]
    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: bool | None
    lowercase: bool


class _Normalizer(_Strict):
    type: Literal["Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"]


class _Normalizers(_Strict):
    type: Literal["Sequence"]
    normalizers: Annotated[list[_BertNormalizer | _Normalizer], Field(max_length=8)]


class _PreTokenizer(_Strict):
    type: Literal["BertPreTokenizer", "Whitespace", "WhitespaceSplit"]


class _ByteLevel(_Strict):
    type: Literal["ByteLevel"]
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool = True


class _BertProcessing(_Strict):
    type: Literal["BertProcessing"]
    sep: tuple[_Token, _TokenId]
    cls: tuple[_Token, _TokenId]


class _RobertaProcessing(_Strict):
    type: Literal["RobertaProcessing"]
    sep: tuple[_Token, _TokenId]
    cls: tuple[_Token, _TokenId]
    trim_offsets: bool
    add_prefix_space: bool


class _NamedToken(_Strict):
    id: _Token
    type_id: _TokenId


class _SpecialPiece(_Strict):
    SpecialToken: _NamedToken


class _NamedSequence(_Strict):
    id: Literal["A", "B"]
    type_id: _TokenId


class _SequencePiece(_Strict):
    Sequence: _NamedSequence


class _SpecialToken(_Strict):
    id: _Token
    ids: Annotated[list[_TokenId], Field(max_length=8)]
    tokens: Annotated[list[_Token], Field(max_length=8)]


_Pieces = Annotated[list[_SpecialPiece | _SequencePiece], Field(max_length=8)]


class _TemplateProcessing(_Strict):
    type: Literal["TemplateProcessing"]
    single: _Pieces
    pair: _Pieces
    special_tokens: Annotated[dict[_Token, _SpecialToken], Field(max_length=16)]


class _WordPieceDecoder(_Strict):
    type: Literal["WordPiece"]
    prefix: Literal["##"]
    cleanup: bool


class _WordPiece(_Strict):
    type: Literal["WordPiece"]
    unk_token: _Token
    continuing_subword_prefix: Literal["##"]
    max_input_chars_per_word: Annotated[int, Field(ge=1, le=1000)]
    vocab: dict[str, _TokenId]


class _Bpe(_Strict):
    type: Literal["BPE"]
    dropout: None = None
    unk_token: _Token | None
    continuing_subword_prefix: Literal["", None]
    end_of_word_suffix: Literal["", None]
    fuse_unk: bool
    byte_fallback: Literal[False] = False
    ignore_merges: bool = False
    vocab: dict[str, _TokenId]
    merges: list[str | tuple[str, str]]


class _TokenizerFile(_Strict):
    """``tokenizer.json`` of BERT's and RoBERTa's kind; truncation and padding are never used."""

    version: Literal["1.0"]
    truncation: Annotated[Any, Field(exclude=True)] = None
    padding: Annotated[Any, Field(exclude=True)] = None
    added_tokens: Annotated[list[_AddedToken], Field(max_length=4096)]
    normalizer: _BertNormalizer | _Normalizer | _Normalizers | None
    pre_tokenizer: _PreTokenizer | _ByteLevel | None
    post_processor: _BertProcessing | _RobertaProcessing | _ByteLevel | _TemplateProcessing | None
    decoder: _WordPieceDecoder | _ByteLevel | None
    model: Annotated[_WordPiece | _Bpe, Field(discriminator="type")]


def known_part(content: str) -> str | None:
    """Return what a ``tokenizer.json`` says, where it is safe to load into this process.

    It is written anew from what was checked, so that the library cannot read it differently.

    Args:
        content: of the file.

    Returns:
        The file's content without truncation and padding; None where it has anything else than
        BERT's and RoBERTa's files have.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return _TokenizerFile.model_validate_json(content).model_dump_json()
    except ValidationError as error:
        if error.error_count() == 1:
            (problem,) = error.errors(include_input=False, include_url=False)
            if problem["type"] == "json_invalid":
                raise ValueError(problem["msg"]) from None
        return None


def refuse_sampling(content: str, where: str) -> None:
    """Refuse a tokenizer that splits the same text differently from one time to the next.

    Args:
        content: of a ``tokenizer.json`` as the library writes it.
        where: what to call it in an error message.

    Raises:
        InputError: it drops merges (Provilkov et al. 2020) or samples (Kudo 2018) at random.
    """
    model = parse_json(content)["model"]
    for field in _SAMPLING:
        if model.get(field):
            raise InputError(
                f"model.{field} = {model[field]}: splits texts at random, which no seed repeats, "
                f"{where}; set it to null"
            )
