"""A WKdm compressor for tests, after the published algorithm and the layout XNU gives its output.

Wilson, Kaplan, Smaragdakis: The Case for Compressed Caching in Virtual Memory Systems (USENIX 1999)
has the algorithm; osfmk/x86_64/WKdmCompress_new.s of xnu-3247 (its opening comment) the layout. It
knows nothing of the decoder under test: tables and packing are written down a second time here.
"""

from __future__ import annotations

import struct

PAGE = 4096
SECOND, FIRST = 0, 1  # forms, as words in front of the header
SPARSE = 17185

# hashLookupTable_new of osfmk/x86_64/WKdmData_new.s, xnu-2422: byte offsets into the dictionary
HASH = (
    *(0, 52, 8, 56, 16, 12, 28, 20, 4, 36, 48, 24, 44, 40, 32, 60),
    *(8, 12, 28, 20, 4, 60, 16, 36, 24, 48, 44, 32, 52, 56, 40, 12),
    *(8, 48, 16, 52, 60, 28, 56, 32, 20, 24, 36, 40, 44, 4, 8, 40),
    *(60, 32, 20, 44, 4, 36, 52, 24, 16, 56, 48, 12, 28, 16, 8, 40),
    *(36, 28, 32, 12, 4, 44, 52, 20, 24, 48, 60, 56, 40, 48, 8, 32),
    *(28, 36, 4, 44, 20, 56, 60, 24, 52, 16, 12, 12, 4, 48, 20, 8),
    *(52, 16, 60, 24, 36, 44, 28, 56, 40, 32, 36, 20, 24, 60, 40, 44),
    *(52, 16, 32, 4, 48, 8, 28, 56, 12, 28, 32, 40, 52, 36, 16, 20),
    *(48, 8, 4, 60, 24, 56, 44, 12, 8, 36, 24, 28, 16, 60, 20, 56),
    *(32, 40, 48, 12, 4, 44, 52, 44, 40, 12, 56, 8, 36, 24, 60, 28),
    *(48, 4, 32, 20, 16, 52, 60, 12, 24, 36, 8, 4, 16, 56, 48, 44),
    *(40, 52, 32, 20, 28, 32, 12, 36, 28, 24, 56, 40, 16, 52, 44, 4),
    *(20, 60, 8, 48, 48, 52, 12, 20, 32, 44, 36, 28, 4, 40, 24, 8),
    *(56, 60, 16, 36, 32, 8, 40, 4, 52, 24, 44, 20, 12, 28, 48, 56),
    *(16, 60, 4, 52, 60, 48, 20, 16, 56, 44, 24, 8, 40, 12, 32, 28),
    *(36, 24, 32, 12, 4, 20, 16, 60, 36, 28, 8, 52, 40, 48, 44, 56),
)


def packed(page: bytes, form: int, *, unset: int = 0) -> bytes:
    """The page in `form` whatever it costs; `unset` is the first word of the first form."""
    tags, new, places, low = _model(struct.unpack("<1024I", page), 1 if form == FIRST else 0)
    words = [*_in_words(tags, 2, (4, 4)), *new]
    ends = [form + 3 + len(words)]
    words += _in_words(places, 4, (4, 2))
    ends.append(form + 3 + len(words))
    words += _in_words(low, 10, (1, 3))
    ends.append(form + 3 + len(words))
    words = [unset] * form + ends + words
    return struct.pack(f"<{len(words)}I", *words)


def pairs(page: bytes) -> bytes:
    """The shape of the second form for pages of mostly zeros."""
    words = [(word, 4 * at) for at, word in enumerate(struct.unpack("<1024I", page)) if word]
    return struct.pack("<I", SPARSE) + b"".join(struct.pack("<IH", *pair) for pair in words)


def _model(words, preload):
    dictionary = dict.fromkeys(range(16), preload)
    tags, new, places, low = [], [], [], []
    for word in words:
        place = HASH[word >> 10 & 255] // 4
        known = dictionary[place]
        if word == 0:
            tags.append(0)
        elif word == known:
            tags.append(3)
            places.append(place)
        elif word >> 10 == known >> 10:
            tags.append(1)
            places.append(place)
            low.append(word % 1024)
        else:
            tags.append(2)
            new.append(word)
        if word:
            dictionary[place] = word
    return tags, new, places, low


def _in_words(numbers, bits, shape):
    """Numbers in words: `shape` is how many stand side by side, a byte each, and in how many layers

    one upon the other; ten-bit numbers have no bytes of their own.
    """
    across, layers = shape
    count = across * layers
    out = []
    for first in range(0, len(numbers), count):
        word = 0
        for number, value in enumerate(numbers[first : first + count]):
            layer, column = divmod(number, across)
            word |= value << (8 * column + bits * layer)
        out.append(word)
    return out
