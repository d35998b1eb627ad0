"""The names in CTF: one pass over all types, for the first question by name."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.types import ctf_format as ctf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtool.types.ctf_format import CtfBody

_KINDS_OF_NAMES = {
    **dict.fromkeys((ctf.INTEGER, ctf.FLOAT), "base"),
    **dict.fromkeys((ctf.STRUCT, ctf.UNION, ctf.ENUM, ctf.FORWARD), "tag"),
    ctf.TYPEDEF: "typedef",
}


def index_names(
    body: CtfBody, offsets: Sequence[int], kinds: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Places of the types (from 0) by the kind of their names ("tag", ...), then by name.

    Of several types of one name the first counts; of structures the one with most members, since
    a source file that knows less of a structure than others gets a record of its own; of numbers
    one that is no bit-field. Raises `FormatError` for names that cannot be read.
    """
    index: dict[str, dict[str, int]] = {"tag": {}, "typedef": {}, "base": {}}
    weights: dict[str, int] = {}
    strings: dict[int, str] = {0: ""}
    room = 4 * body.header.strlen + 0x10000
    for place, kind in enumerate(kinds):
        which = _KINDS_OF_NAMES.get(kind)
        if which is None:
            continue
        at = offsets[place]
        word, vlen = body.name_and_vlen(at)
        name = strings.get(word)
        if name is None:
            name = strings[word] = body.string(word)
            room -= len(name)
            if room < 0:
                raise body.bad(at, "names overlap each other without end")
        if which == "tag":
            weight = -1 if kind == ctf.FORWARD else vlen
            if weight <= weights.get(name, -2):
                continue
            weights[name] = weight
        elif name in index[which] or (which == "base" and narrow(body, at) is not None):
            continue
        index[which][name] = place
    for names in index.values():
        names.pop("", None)
    return index


def narrow(body: CtfBody, at: int) -> int | None:
    """The width in bits of the number at body offset `at` if it is a bit-field's; else None."""
    record = body.record(at)
    if record.kind != ctf.INTEGER:
        return None
    (word,) = Struct(body.byteorder + "I").unpack_from(body.data, record.tail)
    width = int(word) & 0xFFFF
    return width if width < record.size * 8 else None
