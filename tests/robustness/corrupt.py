"""Ways to corrupt a good input at random: its bytes, or values in the structure that it has."""

import copy
import json
import random
import re
from typing import Any

UGLY = [
    *(b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n\n", b'"', b"\t\t\t", b"{", b"]]", b"="),
    *(b"-1", b"1e400", b"nan", b"null", b"true", b"9" * 40, b"9" * 5000, b"../../../etc/passwd"),
    *(b"[" * 1200, b'{"a":' * 1200, b"\x1b[2J", b"[/red]", b"__import__('os')", b"cos\nsystem\n"),
    *(b"\x80\x04\x95", "\U0001f4a3\u202e".encode(), b"A" * 5000, b"\\ud800", b"\\u0000"),
]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "\0", "\ud800", "../../../etc/passwd", "/dev/zero"),
    *([], {}, [[]], [None], {"x": 1}, ["x"] * 3, "[/red]", "\x1b[2J", "A" * 5000, "nan", "-1"),
]


def corrupt_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one to four faults: bits turned, pieces cut out, doubled, put in."""
    corrupted = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(corrupted) + 1)
        length = min(draw.choice([1, 2, 8, 64, 1000]), len(corrupted) - at)
        match draw.randrange(6):
            case 0 if at < len(corrupted):
                corrupted[at] ^= 1 << draw.randrange(8)
            case 1:
                del corrupted[at : at + length]
            case 2:
                corrupted[at:at] = corrupted[at : at + length]
            case 3:
                corrupted[at:at] = draw.choice(UGLY)
            case 4:
                del corrupted[at:]
            case _:
                corrupted[at : at + length] = draw.choice(UGLY)
    return bytes(corrupted)


def corrupt_json(content: bytes, draw: random.Random) -> bytes:
    """Exchange, remove or rename one to three values anywhere in a JSON document."""
    document = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        holder, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(["x", "", "\0", str(key) * 2])] = holder.pop(key)
            case 2 if isinstance(holder[key], int | float):
                holder[key] = draw.choice([-1, 2, 10, 0.5, 1000]) * holder[key]
            case _:
                holder[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(document).encode()


def corrupt_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Corrupt the header of a safetensors file, whose length in front is made to fit."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    corrupted = corrupt_json(header, draw)
    if draw.random() < 0.3:
        corrupted = corrupted.replace(
            b"F32", draw.choice([b"I32", b"U32", b"F64", b"BF16", b"F8_E4M3"])
        )
    return len(corrupted).to_bytes(8, "little") + corrupted + body


def corrupt_toml(content: bytes, draw: random.Random) -> bytes:
    """Exchange the values of one to three lines of a TOML file."""
    lines = content.split(b"\n")
    settings = [number for number, line in enumerate(lines) if re.match(rb"[\w.-]+ = .", line)]
    for number in draw.sample(settings, draw.randint(1, 3)):
        key = lines[number].split(b" = ")[0]
        value = draw.choice([*(json.dumps(value).encode() for value in VALUES), *UGLY])
        lines[number] = key + b" = " + value.replace(b"NaN", b"nan").replace(b"Infinity", b"inf")
    return b"\n".join(lines)


def _places(value: Any) -> Any:
    """Yield every (dictionary or list, key) of a JSON document."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
