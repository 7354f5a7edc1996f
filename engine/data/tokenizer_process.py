"""Run the ``tokenizers`` library in a process of its own, for files that may crash or stall it.

The process is started from this file, which imports nothing of the engine.  It has limits on
memory and, for each request, on time; a crash there is an error here.  Requests and answers are
JSON, token ids are bytes: nothing is unpickled.
"""

import array
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

_MEMORY = 4 << 30
"""Bytes of address space that the process may use."""
_SECONDS = 120
"""For one request, such as ``_CHARACTERS`` of text to split."""
_CHARACTERS = 1 << 20
"""Characters encoded at a time, or one text that is longer."""
_LARGEST_ANSWER = 128 << 20
"""Bytes; a file may make many tokens, or much text, of little."""


class TokenizerProcessError(Exception):
    """The library failed in its process, or the process ended; the message says how."""


class Ids(NamedTuple):
    """Token ids of one text, as the library's encodings have them."""

    ids: list[int]


class IdsAndOffsets(NamedTuple):
    """Token ids of one text, and the characters of each, as the library's encodings have them."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TokenizerProcess:
    """A tokenizer in a separate process, with the methods that :class:`.Tokenizer` uses.

    Args:
        content: of a ``tokenizer.json``.

    Raises:
        TokenizerProcessError: the library cannot load it, or not within the limits.
    """

    def __init__(self, content: str) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), str(_MEMORY), str(_SECONDS)],
                pass_fds=[theirs.fileno()],
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    # Each thread reserves address space, which is limited.
                    "RAYON_NUM_THREADS": str(min(8, len(os.sched_getaffinity(0)))),
                    "MALLOC_ARENA_MAX": "2",
                    "RUST_BACKTRACE": "0",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # where the library prints what it also raises
            )
        self._connection = ours
        self._definition, vocabulary = json.loads(self._ask("load", content))
        self._vocabulary: dict[str, int] = vocabulary
        self._tokens = {number: token for token, number in vocabulary.items()}

    def to_str(self) -> str:
        """Return the tokenizer as the library writes it."""
        return self._definition

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added ones among them."""
        return self._vocabulary

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None where the vocabulary lacks it."""
        return self._vocabulary.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None where the vocabulary lacks it."""
        return self._tokens.get(token_id)

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Ids]:
        """Return the token ids of each text.

        Raises:
            TokenizerProcessError: the library cannot, or not within the limits.
        """
        found: list[Ids] = []
        for chunk in _chunks(texts):
            for ids, _ in self._encoded(chunk, add_special_tokens, with_offsets=False):
                found.append(Ids(ids))
        return found

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[IdsAndOffsets]:
        """Return the token ids of each text, and the first character and the one behind the last.

        Raises:
            TokenizerProcessError: the library cannot, or not within the limits.
        """
        found: list[IdsAndOffsets] = []
        for chunk in _chunks(texts):
            for ids, places in self._encoded(chunk, add_special_tokens, with_offsets=True):
                found.append(IdsAndOffsets(ids, list(zip(places[::2], places[1::2], strict=True))))
        return found

    def _encoded(
        self, texts: list[str], special: bool, *, with_offsets: bool
    ) -> list[tuple[list[int], list[int]]]:
        """Return ids and, where asked for, offsets of a chunk; two numbers each."""
        lengths, ids, offsets = array.array("q"), array.array("I"), array.array("q")
        lengths.frombytes(self._ask("encode", [texts, special, with_offsets]))
        ids.frombytes(self._receive())
        offsets.frombytes(self._receive())
        found, end = [], 0
        for length in lengths:
            stop = end + length
            found.append((ids[end:stop].tolist(), offsets[2 * end : 2 * stop].tolist()))
            end = stop
        return found

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids.

        Raises:
            TokenizerProcessError: the library cannot, or not within the limits.
        """
        return str(json.loads(self._ask("decode", [ids, skip_special_tokens])))

    def _ask(self, what: str, argument: Any) -> bytes:
        with contextlib.suppress(OSError):  # the process has ended: the answer says how
            self._connection.send_bytes(json.dumps([what, argument]).encode())
        answer = self._receive()
        if answer:  # what the library raised
            raise TokenizerProcessError(answer.decode())
        return self._receive()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes(_LARGEST_ANSWER)
        except (EOFError, OSError):
            self._connection.close()  # which ends the process, if it has not ended
            raise TokenizerProcessError(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGALRM:
            return f"the tokenizers library took more than {_SECONDS} s"
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        gib = _MEMORY / (1 << 30)
        return f"the tokenizers library crashed or needed more than {gib:g} GiB ({name})"

    def __del__(self) -> None:
        """End the process."""
        if hasattr(self, "_connection"):
            self._connection.close()
            self._process.kill()
            self._process.wait()


def _chunks(texts: list[str]) -> list[list[str]]:
    """Cut texts into lists of at most ``_CHARACTERS`` characters, or one longer text."""
    chunks: list[list[str]] = []
    left = 0
    for text in texts:
        if not chunks or len(text) > left:
            chunks.append([])
            left = _CHARACTERS
        chunks[-1].append(text)
        left -= len(text)
    return chunks


def _serve(connection: Connection, seconds: int) -> None:
    """Answer requests until the other side closes."""
    from tokenizers import Tokenizer

    backend: Any = None
    while True:
        try:
            what, argument = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        signal.alarm(seconds)  # what it does by default ends the process, even in native code
        try:
            if what == "load":
                backend = Tokenizer.from_str(argument)
                backend.no_truncation()
                backend.no_padding()
                answers = [json.dumps([backend.to_str(), backend.get_vocab()]).encode()]
            elif what == "encode":
                texts, special, with_offsets = argument
                encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
                encodings = encode(texts, add_special_tokens=special)
                rows = [encoding.ids for encoding in encodings]
                ids = array.array("I", (number for row in rows for number in row))
                places = array.array("q")
                if with_offsets:
                    places.extend(
                        place for each in encodings for pair in each.offsets for place in pair
                    )
                lengths = array.array("q", map(len, rows))
                answers = [lengths.tobytes(), ids.tobytes(), places.tobytes()]
            else:
                ids, skip = argument
                answers = [json.dumps(backend.decode(ids, skip_special_tokens=skip)).encode()]
        except BaseException as error:  # a panic of the library is no Exception
            connection.send_bytes(str(error).encode("utf-8", "replace") or b"unknown error")
        else:
            for answer in (b"", *answers):
                connection.send_bytes(answer)
        signal.alarm(0)


def _main() -> None:
    number, memory, seconds = map(int, sys.argv[1:])
    # Signals to a terminal's or a job's processes are for the one that asks: it closes the
    # connection when it ends.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(number), seconds)


if __name__ == "__main__":
    _main()
