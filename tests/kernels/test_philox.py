"""The generator against its authors' own words."""

import pytest
import torch

from kernels.philox import philox_words

# The vectors that come with the authors' code, Random123's kat_vectors for philox4x32 of 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    given = [torch.full(shape, word) for word in counter]
    seed = key[0] + (key[1] << 32)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed  # as an int64 holds it
    for one in (seed, signed, torch.tensor(signed)):
        found = philox_words(given, one)
        assert torch.equal(found, torch.tensor(words).expand(*shape, 4))
