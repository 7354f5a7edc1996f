"""Token offsets come out of a kernel's arguments as they went in, and compile nothing anew."""

import pytest

from kernels.token_offsets_triton import decode_offset, decode_opaque_offset, encode_offsets

OFFSETS = [0, 0, 1, 6, 7, 15, 16, 4096, 2**30 - 3, 2**40]


@pytest.mark.parametrize("decode", [decode_offset, decode_opaque_offset])
def test_offsets_are_decoded(decode) -> None:
    encoded = encode_offsets(OFFSETS, 12)
    assert [decode.fn(number) for number in encoded] == [*OFFSETS, 2**40, 2**40]


def test_no_encoded_offset_is_special_to_triton() -> None:
    for number in encode_offsets(range(100), 100):
        assert number != 1
        assert number % 16 != 0
