"""WKdm: a page of memory, its words told by a dictionary of 16 words.

Each of the 1024 words has a tag of two bits: it is zero, or the word at a place of the dictionary,
or alike to that in its upper 22 bits, or new. A new word goes to the place that its bits 10 to 17
hash to; one that is alike replaces the word it is like. Behind a header come the tags (16 in a
word), the new words, the places (4 bits each, 8 in a word) and the low bits (10 each, 3 in a word).
The header says, in words, where the new words, the places and the low bits end.

XNU wrote two forms. The first has one more word in front, which nobody sets. The second has, in its
later days, a shape of its own for pages of mostly zeros: pairs of a word and its offset behind the
number 17185. The dictionary began as 16 ones, later as zeros; no writer refers to what it has not
set itself but by the upper bits or, in the first days, to the one: ones are right for all.

Source: iokit/Kernel/WKdm.h, WKdmCompress.c of xnu-792 and xnu-1456 (first form, in use until
xnu-2050); osfmk/x86_64/WKdm{Compress,Decompress}_new.s of xnu-2422 (second) and xnu-3247 (pairs).
"""

from __future__ import annotations

import sys
from array import array
from itertools import compress
from struct import Struct

PAGE = 4096  # bytes; the writers know no other size
SECOND, FIRST = FORMS = 0, 1  # as the words in front of what both have as their header
PEEK = 16  # bytes that `fits` looks at

_WORDS = PAGE // 4
_TAGS = _WORDS // 16  # words of them
_ENDS = Struct("<3I")
_SPARSE = (17185).to_bytes(4, "little")  # MZV_MAGIC
_PAIR = Struct("<IH")  # a word, and its offset in the page in bytes
_SWAP = sys.byteorder != "little"
_ALIKE, _NEW, _SAME = 1, 2, 3  # tags; 0 is a zero
_LOW = 0x3FF
_PLACES = bytes(  # by bits 10 to 17: hashLookupTable, in words
    int(digit, 16)
    for digit in (
        "0d2e437519c6ba8f23751f496cb8dea32c4df7e8569ab12af85b19d64ec3742a"
        "97831bd56cfeac28791b5ef6d4331c52d4f69b7ea8956fabd481c27e378ad945"
        "c21f6eb329674f5e8ac31bdba3e296f7c1854df369214ecbad85783976ea4db1"
        "5f2ccd358b971a62ef4982a1d6b537ce4f1dfc54eb62a3879683154f972dacbe"
    )
)


def fits(head: bytes, size: int, form: int) -> bool:
    """Whether a page of `size` stored bytes that begin with `head` can be of `form`, at a glance.

    `form` is one of `FORMS`; `head` has `PEEK` bytes, or all there are.
    """
    if form == 0 and head.startswith(_SPARSE):
        return size > 4 and (size - 4) % _PAIR.size == 0
    if len(head) < 4 * form + _ENDS.size:
        return False
    new, places, low = _ENDS.unpack_from(head, 4 * form)
    in_order: bool = form + 3 + _TAGS <= new <= places <= low
    return in_order and low * 4 == size


def unpack(data: bytes, form: int) -> bytes:
    """The page that `data` tells in `form`. Raises ValueError for what no writer makes."""
    if not fits(data, len(data), form):
        raise ValueError(f"no header of WKdm in {len(data):#x} bytes")
    if form == 0 and data.startswith(_SPARSE):
        return _unpack_pairs(data)
    new_end, places_end, low_end = _ENDS.unpack_from(data, 4 * form)
    first = 4 * (form + 3 + _TAGS)
    tags = _split(data[first - 4 * _TAGS : first], 2, 4)
    new = data[first : 4 * new_end]
    places = _split(data[4 * new_end : 4 * places_end], 4, 2)
    low = _tens(data[4 * places_end : 4 * low_end])
    alike, same = tags.count(_ALIKE), tags.count(_SAME)
    told = (4 * tags.count(_NEW), -(-(alike + same) // 8) * 8, -(-alike // 3) * 3)
    held = (len(new), len(places), len(low))
    if told != held:
        raise ValueError(f"new words, places, low bits: {told} by its tags, {held} there")
    return _rebuild(tags, new, places, low)


def _rebuild(tags: bytes, new: bytes, places: bytes, low: list[int]) -> bytes:
    hashes = (int.from_bytes(new, "little") >> 10).to_bytes(len(new), "little")[::4]
    next_new = zip(hashes.translate(_PLACES), _words(new), strict=True).__next__
    next_place, next_low = iter(places).__next__, iter(low).__next__
    dictionary = [1] * 16
    page = array("I", bytes(PAGE))
    for at, tag in compress(enumerate(tags), tags):
        if tag == _SAME:
            page[at] = dictionary[next_place()]
        elif tag == _NEW:
            place, word = next_new()
            page[at] = dictionary[place] = word
        else:
            place = next_place()
            page[at] = dictionary[place] = dictionary[place] & ~_LOW | next_low()
    if _SWAP:
        page.byteswap()
    return page.tobytes()


def _unpack_pairs(data: bytes) -> bytes:
    page = bytearray(PAGE)
    for word, at in _PAIR.iter_unpack(data[4:]):
        if at % 4 or at >= PAGE:
            raise ValueError(f"a word at {at:#x} of a page")
        page[at : at + 4] = word.to_bytes(4, "little")
    return bytes(page)


def _split(packed: bytes, bits: int, ways: int) -> bytes:
    """The numbers of `bits` bits in `packed`, a byte each.

    Each word holds four groups of them, its bytes; the first of every group come first.
    """
    size = len(packed)
    value = int.from_bytes(packed, "little")
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * size, "little")
    out = array("I", bytes(size * ways))
    for way in range(ways):
        out[way::ways] = array("I", (value >> way * bits & mask).to_bytes(size, "little"))
    return out.tobytes()


def _tens(packed: bytes) -> list[int]:
    words = _words(packed)
    out = [0] * (3 * len(words))
    for way in range(3):
        out[way::3] = [word >> 10 * way & _LOW for word in words]
    return out


def _words(data: bytes) -> array[int]:
    words = array("I", data)
    if _SWAP:
        words.byteswap()
    return words
