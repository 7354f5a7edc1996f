"""Tokenize with the tokenizer of a Hugging Face model folder, or with WordPiece for the demo.

The ``tokenizers`` library splits text into pieces; this module adds ``[CLS]`` and ``[SEP]`` and
limits the length, so that these do not depend on the settings of a model folder.  The names are
BERT's, also for models that call ``[CLS]`` ``<s>``.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..utils.arrays import ranges
from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_json, read_bytes
from .tokenizer_file import LARGEST_FILE, known_part, refuse_sampling
from .tokenizer_process import TokenizerProcess

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTAS_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
_SPELLINGS = (SPECIAL_TOKENS, _ROBERTAS_TOKENS)
"""The special tokens as vocabularies spell them: BERT's, RoBERTa's."""
_ROLES = (
    ("pad_token",),
    ("unk_token",),
    ("cls_token", "bos_token"),
    ("sep_token", "eos_token"),
    ("mask_token",),
)
"""Fields of ``tokenizer_config.json`` that spell each of them, the first that is there."""

_BERT_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Fields of ``tokenizer_config.json``, and their names in the normalizer."""

_WORD_PIECE_CLASSES = re.compile(
    "(Bert|ConvBert|DistilBert|DPRContextEncoder|DPRQuestionEncoder|DPRReader|Electra|Funnel|LayoutLM"
    "|Lxmert|MobileBert|MPNet|RetriBert|Splinter|SqueezeBert)Tokenizer(Fast)?|PreTrainedTokenizerFast|TokenizersBackend"
)
"""Those of transformers that split texts as BERT's does."""

_CHUNK = 4096
"""Sentences encoded at a time: bounds the memory of the library's result objects."""


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Sentences as token ids.

    Attributes:
        tokens: int32 ``[T]``, the sentences one after the other, each ``[CLS] … [SEP]``.
        offsets: int64 ``[S + 1]``; sentence ``s`` is ``tokens[offsets[s]:offsets[s + 1]]``.
        truncated: how many sentences were cut to the limit.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    truncated: int


class Tokenizer:
    """A tokenizer, from sentences to token ids.

    Attributes:
        special_tokens: the five, as the vocabulary spells them.
        pad_id, unk_id, cls_id, sep_id, mask_id: their ids.
    """

    def __init__(
        self,
        backend: Backend | TokenizerProcess,
        where: str = "tokenizer",
        special_tokens: Sequence[str] = (),
    ) -> None:
        """Wrap a tokenizer of the ``tokenizers`` library.

        Args:
            backend: the tokenizer, without truncation and padding.
            where: what to call it in an error message.
            special_tokens: the five, where the vocabulary spells them neither as BERT's nor as
                RoBERTa's does.

        Raises:
            InputError: its vocabulary lacks one of the special tokens, or numbers a token
                that 32 bits cannot hold.
        """
        self.special_tokens = max(
            (*_SPELLINGS, tuple(special_tokens)),
            key=lambda names: sum(backend.token_to_id(n) is not None for n in names),
        )
        ids: list[int] = []
        for token in self.special_tokens:
            number = backend.token_to_id(token)
            if number is None:
                raise InputError(
                    f"no token {token} in the vocabulary, {where}; give a BERT's folder"
                )
            ids.append(number)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self._backend, self._where = backend, where
        if self.vocab_size >= 1 << 31:
            raise InputError(
                f"token number {self.vocab_size - 1} is too large, {where}; replace it"
            )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load the tokenizer of a model folder or of a run.

        It is ``tokenizer.json`` or, where there is none, ``vocab.txt`` with the settings of
        ``tokenizer_config.json``.  A ``tokenizer.json`` that has other components than those of
        BERT and RoBERTa is used in a process of its own (engine/data/tokenizer_process.py).

        Raises:
            InputError: the folder has neither, or they cannot be used, or ``vocab.txt`` is another
                kind of tokenizer's than WordPiece.
        """
        whole, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
        if whole.is_file():
            backend = _load_json(whole)
            return cls(backend, str(whole), _named_tokens(folder, backend))
        if vocabulary.is_file():
            settings = _read_settings(folder / "tokenizer_config.json")
            _check_is_word_piece(settings, folder)
            backend = _word_piece(_read_vocabulary(vocabulary), settings)
            return cls(backend, str(vocabulary))
        raise InputError(f"no tokenizer.json or vocab.txt, {folder}; give a model's folder")

    @classmethod
    def from_json(cls, content: str, special_tokens: Sequence[str]) -> "Tokenizer":
        """Make another one of what :meth:`to_json` and ``special_tokens`` of one say."""
        return cls(_open(content), special_tokens=special_tokens)

    @property
    def definition(self) -> tuple[str, tuple[str, ...]]:
        """All that decides what it makes of a text: what :meth:`from_json` makes another one of."""
        return self.to_json(), tuple(self.special_tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a lower-casing WordPiece; the same texts give the same vocabulary.

        Args:
            texts: the sentences, which are gone through twice; all are held in memory where they
                can be gone through once only.
            vocab_size: the most tokens that the vocabulary may have; it has fewer where the
                texts' words are all in it before.  The texts' characters are always in it.
        """
        texts = list(texts) if iter(texts) is texts else texts
        backend = _word_piece({}, {})
        normalize = backend.normalizer.normalize_str
        found, length = set[str](), 0
        for text in map(normalize, texts):
            found.update(text)
            length += len(text)
        characters = sorted(c for c in found if not c.isspace())
        # Special tokens, each character in two forms, and merges, of which a text has no more than
        # characters.  The library reserves memory for what it is told.
        most = len(SPECIAL_TOKENS) + 2 * len(characters) + length
        trainer = trainers.WordPieceTrainer(
            vocab_size=min(vocab_size, most),
            # The library would number the ## forms in the order of a hash table, which differs
            # from run to run and decides between merges of equal rank.  Named here, they get
            # their numbers in this order.
            special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in characters)],
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(_word_piece(backend.get_vocab(), {}))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json``, and ``vocab.txt`` of a BERT's."""
        write_text(folder / "tokenizer.json", self.to_json())
        write_text(folder / "tokenizer_config.json", dump_json(self.settings) + "\n")
        if self._bert_settings is not None:
            write_text(folder / "vocab.txt", "".join(token + "\n" for token in self._tokens))

    @property
    def settings(self) -> dict[str, object]:
        """Return the ``tokenizer_config.json`` that describes this tokenizer to transformers."""
        kind: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self._bert_settings is not None:
            kind = {"tokenizer_class": "BertTokenizer"} | self._bert_settings
        roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        return kind | dict(zip(roles, self.special_tokens, strict=True))

    def to_json(self) -> str:
        """Return everything that decides how a text is split."""
        return self._backend.to_str()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id: what an embedding table needs at least."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def _components(self) -> Mapping[str, Any]:
        return parse_json(self.to_json())

    @cached_property
    def _tokens(self) -> list[str]:
        """The vocabulary, by its numbers."""
        vocabulary = self._backend.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    @cached_property
    def _bert_settings(self) -> dict[str, object] | None:
        """The settings with which ``vocab.txt`` says all of this tokenizer; None: it cannot."""
        normalizer = self._components["normalizer"] or {}
        if self._components["model"]["type"] != "WordPiece":
            return None
        settings = {name: normalizer.get(field) for name, field in _BERT_SETTINGS.items()}
        read = {token: number for number, token in enumerate(self._tokens)}
        again = parse_json(_word_piece(read, settings).to_str())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        same = all(again[part] == self._components[part] for part in parts)
        is_line = all("\n" not in token and not token.endswith("\r") for token in self._tokens)
        return settings if same and is_line else None

    @property
    def pair_separators(self) -> int:
        """Separators between two sentences in one sequence: BERT's one, or RoBERTa's two.

        RoBERTa does not number segments either.
        """
        return 2 if self.special_tokens == _ROBERTAS_TOKENS else 1

    def encode(self, texts: Sequence[str], max_length: int) -> EncodedTexts:
        """Turn sentences into token ids, cutting those that exceed ``max_length`` tokens.

        Args:
            texts: S sentences.
            max_length: the limit, ``[CLS]`` and ``[SEP]`` included.  A sentence that is cut
                loses tokens before its ``[SEP]``, which stays last.

        Raises:
            ValueError: ``max_length`` leaves no room for a token.
            InputError: the vocabulary lacks what an unknown word becomes.
        """
        if max_length < 3:
            raise ValueError(f"max_length: expected at least 3, got {max_length}")
        pieces: list[npt.NDArray[np.int32]] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            with _explained(self._where):
                encodings = self._backend.encode_batch_fast(chunk, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            lengths[start : start + len(ids)] = [len(row) for row in ids]
            framed = ([self.cls_id, *row[: max_length - 2], self.sep_id] for row in ids)
            pieces.append(np.fromiter(chain.from_iterable(framed), dtype=np.int32))

        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(np.minimum(lengths + 2, max_length), out=offsets[1:])
        return EncodedTexts(
            tokens=np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32),
            offsets=offsets,
            truncated=int((lengths + 2 > max_length).sum()),
        )

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> tuple[EncodedTexts, npt.NDArray[np.int32]]:
        """Turn texts of any length into token ids, and say where in its text each token stands.

        Args:
            texts: S texts.

        Returns:
            The texts, without ``[CLS]`` and ``[SEP]``, and int32 ``[T, 2]``, of each token its
            first character (Unicode code point) in the text and the one behind its last.

        Raises:
            InputError: the vocabulary lacks what an unknown word becomes.
        """
        ids, places = list[list[int]](), [np.empty((0, 2), dtype=np.int32)]
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            with _explained(self._where):
                encodings = self._backend.encode_batch(chunk, add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
            pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
            numbers = np.fromiter(chain.from_iterable(pairs), dtype=np.int32)
            places.append(numbers.reshape(-1, 2))
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in ids], dtype=np.int64)))
        tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=offsets[-1])
        return EncodedTexts(tokens, offsets, truncated=0), np.concatenate(places)

    def encode_words(
        self, texts: Sequence[Sequence[str]], max_length: int
    ) -> tuple[EncodedTexts, npt.NDArray[np.int32]]:
        """Turn texts that are divided into words into token ids, as :meth:`encode` does with texts.

        Tokenizers for which blanks are letters (byte-level ones) get each word but a text's first
        with the blank before it, as in running text.

        Args:
            texts: the words of S texts.
            max_length: the limit, ``[CLS]`` and ``[SEP]`` included.

        Returns:
            The texts, and int32 ``[W]`` the tokens of each word, 0 of a word that is cut off or
            that the tokenizer leaves nothing of.
        """
        blank = " " if self._has_blanks else ""
        words = [blank * (number > 0) + word for text in texts for number, word in enumerate(text)]
        # Each distinct word once, as a text of its own of any length.
        numbers: dict[str, int] = {}
        of_words = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=int)
        encoded = self.encode([*numbers], 1 << 30)
        own = np.diff(encoded.offsets)[of_words] - 2
        counts = np.array([len(text) for text in texts], dtype=np.int64)
        ends = np.concatenate(([0], np.cumsum(own)))
        bounds = np.concatenate(([0], np.cumsum(counts)))
        before = ends[:-1] - np.repeat(ends[bounds[:-1]], counts)  # tokens before it in its text
        kept = np.clip(max_length - 2 - before, 0, own)
        lengths = ends[bounds[1:]] - ends[bounds[:-1]]
        sizes = np.minimum(lengths, max_length - 2)
        offsets = np.concatenate(([0], np.cumsum(sizes + 2)))
        tokens = np.empty(offsets[-1], dtype=np.int32)
        tokens[offsets[:-1]], tokens[offsets[1:] - 1] = self.cls_id, self.sep_id
        from_word = encoded.offsets[of_words] + 1
        to_word = np.repeat(offsets[:-1] + 1, counts) + before
        tokens[ranges(to_word, kept)] = encoded.tokens[ranges(from_word, kept)]
        truncated = int((lengths > max_length - 2).sum())
        return EncodedTexts(tokens, offsets, truncated), kept.astype(np.int32)

    @cached_property
    def begins_word(self) -> npt.NDArray[np.bool_]:
        """Bool ``[V]``, whether a token begins a word, or is one.

        Raises:
            InputError: the tokenizer does not tell.
        """
        model = self._components["model"]
        if model["type"] == "WordPiece":
            inside = model.get("continuing_subword_prefix") or "##"
            return self._of_tokens(lambda token: not token.startswith(inside))
        mark = _word_mark(self._components["pre_tokenizer"])
        if not mark:
            raise InputError(
                f"{self._where}: does not tell where words begin; set whole_words=false"
            )
        return self._of_tokens(lambda token: token.startswith(mark))

    def _of_tokens(self, holds: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
        found = np.zeros(self.vocab_size, dtype=bool)
        for token, number in self._backend.get_vocab().items():
            found[number] = holds(token)
        return found

    @cached_property
    def _has_blanks(self) -> bool:
        """Whether a blank before a word is part of its first token."""
        first, behind_blank = self._backend.encode_batch_fast(["a", " a"], add_special_tokens=False)
        return first.ids != behind_blank.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without the special tokens.

        Raises:
            InputError: the tokenizer's decoder fails.
        """
        with _explained(self._where):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None where the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None where the vocabulary lacks it."""
        return self._backend.id_to_token(token_id)


def _word_mark(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Return what a token begins with that begins a word; empty where nothing does."""
    if pre_tokenizer is None:
        return ""
    if pre_tokenizer["type"] == "Sequence":
        return next(filter(None, map(_word_mark, pre_tokenizer["pretokenizers"])), "")
    if pre_tokenizer["type"] == "ByteLevel":
        return "\u0120"
    return str(pre_tokenizer["replacement"]) if pre_tokenizer["type"] == "Metaspace" else ""


@contextmanager
def _explained(where: str, what: str = "") -> Iterator[None]:
    """Turn the library's exceptions and panics into errors of one line.

    Raises:
        InputError: in its place.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, InputError):
        raise
    except BaseException as error:  # it raises nothing narrower, and a panic is no Exception
        reason = " ".join(str(error).split())
        raise InputError(f"{what}{reason}, {where}; replace it") from error


def _load_json(path: Path) -> Backend | TokenizerProcess:
    """Load ``tokenizer.json`` as it is read back from a run's folder.

    Raises:
        InputError: it is no tokenizer, or one that splits differently the next time, or once the
            library has written it.
    """
    content = read_bytes(path, LARGEST_FILE)
    with _explained(str(path), "not a tokenizer: "):
        first = _open(content.decode("utf-8"))
        saved = first.to_str()
        backend = _open(saved)
    # Of two tokens with one number the library writes either.
    same_vocabulary = backend.get_vocab() == first.get_vocab()
    if not same_vocabulary or parse_json(backend.to_str()) != parse_json(saved):
        raise InputError(f"differs after it is saved and loaded again, {path}; replace it")
    refuse_sampling(saved, str(path))
    return backend


def _open(content: str) -> Backend | TokenizerProcess:
    """Open what ``tokenizer.json`` says, in a process of its own where it could crash this one."""
    known = known_part(content)
    return TokenizerProcess(content) if known is None else Backend.from_str(known)


def _word_piece(vocabulary: dict[str, int], settings: Mapping[str, object]) -> Backend:
    """Return BERT's tokenizer with the given vocabulary and ``tokenizer_config.json``."""
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    strip_accents = settings.get("strip_accents")
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=None if strip_accents is None else bool(strip_accents),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    present = [token for token in SPECIAL_TOKENS if token in vocabulary]
    backend.add_special_tokens(present)
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        # Not used here, but the saved file serves transformers too.
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return backend


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Read ``vocab.txt``: a token a line, its id the line number from 0."""
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(read_bytes(path, LARGEST_FILE).removesuffix(b"\n").split(b"\n")):
        try:
            token = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8, {path}:{number + 1}; replace the vocabulary") from error
        if token in vocabulary:
            raise InputError(f"token {token!r} stands twice, {path}:{number + 1}; remove one")
        vocabulary[token] = number
    return vocabulary


def _named_tokens(folder: Path, backend: Backend | TokenizerProcess) -> list[str]:
    """Return the special tokens that ``tokenizer_config.json`` names.

    Empty where the vocabulary has those of BERT or RoBERTa, or not all five are named.
    """
    if any(all(backend.token_to_id(n) is not None for n in names) for names in _SPELLINGS):
        return []
    settings = _read_settings(folder / "tokenizer_config.json")
    named: list[str] = []
    for fields in _ROLES:
        given = next((settings[field] for field in fields if settings.get(field)), None)
        token = given.get("content") if isinstance(given, dict) else given
        if isinstance(token, str):
            named.append(token)
    return named if len(named) == len(_ROLES) else []


def _check_is_word_piece(settings: Mapping[str, object], folder: Path) -> None:
    """Refuse a folder whose tokenizer splits texts otherwise before it looks up ``vocab.txt``."""
    name = settings.get("tokenizer_class")
    if isinstance(name, str) and not _WORD_PIECE_CLASSES.fullmatch(name):
        raise InputError(
            f"tokenizer_class {name!a} with vocab.txt alone: its texts are not split as BERT's, "
            f"{folder}; give a folder with tokenizer.json"
        )


def _read_settings(path: Path) -> Mapping[str, object]:
    """Read ``tokenizer_config.json``; a folder without it is a lower-casing BERT's."""
    if not path.is_file():
        return {}
    try:
        settings = parse_json(read_bytes(path, LARGEST_FILE))
    except ValueError as error:
        raise InputError(f"not JSON: {error}, {path}; replace it") from error
    if not isinstance(settings, dict):
        raise InputError(f"expected a JSON object, {path}; replace it")
    return settings
