"""What processes that tokenize do in tests; they import nothing else for it."""

import os
import signal
import sys
import time

from engine.data.rows import Piece
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError


def double(piece: Piece, _tokenizer: Tokenizer) -> int:
    time.sleep(0.02 * (piece.content % 3))  # they overtake each other
    return 2 * piece.content


def tell(_piece: Piece, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "torch": "torch" in sys.modules,
        "process": os.getpid(),
        "session": os.getsid(0),
        "words": tokenizer.to_json(),
        "stdin": os.path.realpath("/proc/self/fd/0"),
        "files": len(os.listdir("/proc/self/fd")),
    }


def kill_itself(piece: Piece, _tokenizer: Tokenizer) -> int:
    if piece.content == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece.content


def run_out_of_memory(piece: Piece, _tokenizer: Tokenizer) -> int:
    if piece.content == 5:
        raise MemoryError
    return piece.content


def fail(piece: Piece, _tokenizer: Tokenizer) -> int:
    return piece.content["a defect"]


def refuse(piece: Piece, _tokenizer: Tokenizer) -> int:
    if piece.content in (5, 7):
        time.sleep(0.2 * (piece.content == 5))  # the later one is known first
        raise InputError(f"row {piece.content}")
    return piece.content


def size_of_piece(piece: Piece, _tokenizer: Tokenizer) -> tuple[int, bytes]:
    return len(piece.content[0]), b"x" * 2_000_000
