"""WKdm pages: by hand, as XNU's own compressors make them, and what no writer makes."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct

import pytest
from builders import wkdm as build
from hypothesis import example, given
from hypothesis import strategies as st

from kvmtool.formats import wkdm
from kvmtool.formats.wkdm import FIRST, PAGE, SECOND, unpack

WORDS = st.integers(0, 2**32 - 1)


def page_of(*words: int) -> bytes:
    """These words, zeros behind them."""
    return struct.pack(f"<{len(words)}I", *words).ljust(PAGE, b"\0")


def drawn(kind: str, seed: int) -> bytes:
    """A page of words that are the same, alike in their upper bits, ... as a few that are drawn."""
    draw = random.Random(f"{kind} {seed}")
    pool = [draw.getrandbits(32) for _ in range(draw.randrange(1, 40))]
    word = {
        "same": lambda: draw.choice(pool),
        "alike": lambda: draw.choice(pool) ^ draw.getrandbits(10),
        "mixed": lambda: draw.choice([0, 1, draw.choice(pool), draw.choice(pool[:2]) ^ 5]),
        "small": lambda: draw.getrandbits(10) + 1,
        "sparse": lambda: draw.choice(pool) if draw.random() < 0.02 else 0,
    }[kind]
    return page_of(*(word() for _ in range(PAGE // 4)))


# By hand from the layout. 0x12345678 hashes by its bits 10 to 17, 0x15, to place 15: new, then the
# same; 0x12345401 is alike, with the low bits 1; then 0, and the same as the one before; then 7,
# whose place 0 holds what has the upper bits 0 in every kernel.
WORDS_BY_HAND = (0x12345678, 0x12345678, 0x12345401, 0, 0x12345401, 7)
TOLD = (
    bytes([2 | 3 << 2, 3 | 1 << 2, 1, 0])  # tags of words 0 to 3, those of words 4 to 7 above
    + bytes(63 * 4)
    + bytes.fromhex("78563412")  # new
    + bytes([15, 15, 15, 0])  # places
    + struct.pack("<I", 1 | 7 << 10)  # low bits
)


@pytest.mark.parametrize("form", [FIRST, SECOND])
def test_a_page_written_by_hand(form):
    head = struct.pack("<I", 0xDEADBEEF) * form
    head += struct.pack("<3I", form + 68, form + 69, form + 70)
    assert unpack(head + TOLD, form) == page_of(*WORDS_BY_HAND)


def test_pairs_written_by_hand():
    data = bytes.fromhex("21430000 feca0000 0000 05000000 fc0f")
    assert unpack(data, SECOND) == page_of(0xCAFE, *[0] * 1022, 5)


# SHA-256 over what XNU's own compressors made of the pages `drawn(kind, 0 to 99)`, one stream after
# the other: WKdmCompress.c of xnu-1456 and WKdmCompress_new.s of xnu-3247, built and run for this
JUDGED = {
    ("same", FIRST): "8c7c9956d32b2b18f53fae2b6c44e3b3642ab5e43c660604fc907fd69873adf1",
    ("same", SECOND): "2b1868a4bd8c0c6398106a2b4d3aea992e6221a88bd84313f83377109e06a03e",
    ("alike", FIRST): "f7efd28af83da88d43649121ec3d1c8d354a449e29532585b7068e755ec07078",
    ("alike", SECOND): "2004b1183b16c87fb3ac8e889a41491d32335454a7360f2f26b5b513476e3760",
    ("mixed", FIRST): "69ccf6f382396b879c93d9c0c689f3d191a489b89a0f43c4eb762558028a8838",
    ("mixed", SECOND): "a7b356feba302495787a86907aa60da8d2258a1b295ab7ac115f5f3ce6fd3935",
    ("small", FIRST): "abab759a791984cddc90d900223b6a732595b345605c40b944a221db587b948e",
    ("small", SECOND): "95bef1ca5ff3676db85548e652b0b3dcab533e26f585a7a401e906fde16bf6a0",
    ("sparse", FIRST): "4c795e9e865d7421553cd6976643ab001f79b9685276c763bd17afc458517221",
    ("sparse", SECOND): "5d5829ab97d17d4074363a366d16b15bddf88558abf65918038a001e01decb68",
}


@pytest.mark.parametrize(("kind", "form"), JUDGED)
def test_the_compressor_of_these_tests_is_that_of_xnu(kind, form):
    made = hashlib.sha256()
    for seed in range(100):
        page = drawn(kind, seed)
        data = (
            build.pairs(page) if kind == "sparse" and form == SECOND else build.packed(page, form)
        )
        made.update(data)
        assert unpack(data, form) == page
    assert made.hexdigest() == JUDGED[kind, form]


@given(st.lists(WORDS, max_size=PAGE // 4), st.sampled_from([FIRST, SECOND]), WORDS)
@example([], FIRST, 0)
@example([1] * 1024, FIRST, 17185)
@example([0xFFFFFFFF] * 1024, SECOND, 0)
def test_any_page_comes_back(words, form, unset):
    page = page_of(*words)
    assert unpack(build.packed(page, form, unset=unset), form) == page
    if any(words):  # a page of zeros has a shape of its own
        assert unpack(build.pairs(page), SECOND) == page


@given(st.integers(0, 2**22 - 1), st.lists(st.integers(0, 1023), min_size=2, max_size=1024))
def test_words_alike_in_their_upper_bits(upper, low):
    page = page_of(*(upper << 10 | bits for bits in low))
    for form in (FIRST, SECOND):
        assert unpack(build.packed(page, form), form) == page


@pytest.mark.parametrize("kind", ["same", "alike", "mixed", "small"])
def test_each_form_is_known_by_its_header(kind):
    for seed in range(50):
        for form in (FIRST, SECOND):
            data = build.packed(drawn(kind, seed), form, unset=seed)
            fitting = [f for f in wkdm.FORMS if wkdm.fits(data[: wkdm.PEEK], len(data), f)]
            assert fitting == [form]


# hostile


def header(form: int, *ends: int) -> bytes:
    return bytes(4 * form) + struct.pack("<3I", *ends)


@pytest.mark.parametrize("form", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("ends", "size"),
    [
        ((67, 67, 66), 67 * 4),  # they do not ascend
        ((60, 67, 68), 68 * 4),  # in the tags
        ((68, 69, 0xFFFFFFFF), 70 * 4),  # past the page
        ((68, 69, 70), 71 * 4),  # not all of it
        ((0x80000000, 0x80000001, 0x80000002), 70 * 4),
        ((70, 69, 70), 70 * 4),
    ],
)
def test_headers_that_cannot_be(form, ends, size):
    with pytest.raises(ValueError, match="no header of WKdm"):
        unpack(header(form, *ends).ljust(size, b"\0"), form)


@pytest.mark.parametrize("form", [FIRST, SECOND])
@pytest.mark.parametrize("size", [0, 1, 4, 11, 12, 15, 16, 267, 268])
def test_too_little_for_a_page(form, size):
    with pytest.raises(ValueError, match="no header of WKdm"):
        unpack(bytes(size), form)


@pytest.mark.parametrize("form", [FIRST, SECOND])
@pytest.mark.parametrize(
    "body",
    [
        b"\xff" * 256 + bytes(12),  # more places than there are
        b"\xaa" * 256 + bytes(12),  # more new words
        b"\x55" * 256 + bytes(12),  # more low bits
        bytes(256 + 12),  # none of them told
    ],
)
def test_tags_that_tell_of_other_parts(form, body):
    ends = [form + 3 + 64 + n for n in (1, 2, 3)]
    with pytest.raises(ValueError, match="new words, places, low bits"):
        unpack(header(form, *ends) + body, form)


@pytest.mark.parametrize("at", [4096, 0xFFFC, 2, 4095])
def test_a_word_outside_of_the_page(at):
    with pytest.raises(ValueError, match=f"a word at {at:#x} of a page"):
        unpack(struct.pack("<I", 17185) + struct.pack("<IH", 1, at), SECOND)


@given(st.binary(max_size=600), st.sampled_from([FIRST, SECOND]))
@example(struct.pack("<I", 17185), SECOND)
@example(struct.pack("<I", 17185) + bytes(7), SECOND)
def test_any_bytes_are_a_page_or_an_error(data, form):
    with contextlib.suppress(ValueError):
        assert len(unpack(data, form)) == PAGE


@given(st.integers(0, 99), st.sampled_from([FIRST, SECOND]), st.integers(0, 2**20), WORDS)
def test_a_damaged_page_is_a_page_or_an_error(seed, form, at, word):
    data = bytearray(build.packed(drawn("mixed", seed), form))
    at %= len(data) // 4
    data[4 * at : 4 * at + 4] = struct.pack("<I", word)
    with contextlib.suppress(ValueError):
        assert len(unpack(bytes(data), form)) == PAGE
