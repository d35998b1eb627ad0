"""The names in CTF: one is found by its string, all of them in one pass over the types.

Of several types of one name the first counts; of structures the one with most members, since a
source file that knows less of a structure than others gets a record of its own; of numbers one
that is no bit-field.
"""

from __future__ import annotations

from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.types import ctf_format as ctf

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable

    from kvmtool.types.ctf_format import CtfBody

_KINDS = {
    "tag": frozenset((ctf.STRUCT, ctf.UNION, ctf.ENUM, ctf.FORWARD)),
    "typedef": frozenset((ctf.TYPEDEF,)),
    "base": frozenset((ctf.INTEGER, ctf.FLOAT)),
}
_FEW = 64  # names asked for one by one; then the pass over all is worth it


class NameIndex:
    """Places of types (from 0) by the kind of their names ("tag", ...) and by name."""

    def __init__(self, body: CtfBody, offsets: array[int], kinds: bytes) -> None:
        self._body, self._offsets, self._kinds = body, offsets, kinds
        self._words = body.names(offsets)
        self._found: dict[tuple[str, str], int | None] = {}

    def find(self, kind: str, name: str) -> int | None:
        """The place of that type; None if there is none.

        Raises `FormatError` where names cannot be read.
        """
        if kind not in _KINDS or not name:
            return None
        if len(self._found) > _FEW:
            return self._all[kind].get(name)
        key = kind, name
        if key not in self._found:
            words = self._body.places_of(name)
            places = [place for word in words for place in self._with(word)]
            best = self._best(kind, sorted(places))
            if best is None and (words or not name.isidentifier()):
                best = self._all[kind].get(name)  # a string used otherwise, or one shown escaped
            self._found[key] = best
        return self._found[key]

    def names(self, kind: str) -> Iterable[str]:
        """All names of that kind. Raises as `find`."""
        return self._all.get(kind, {})

    def _with(self, word: int) -> Iterable[int]:
        """The places of the types whose name stands at `word` of the string table."""
        at = -1
        for _ in range(self._words.count(word)):
            at = self._words.index(word, at + 1)
            yield at

    def _best(self, kind: str, places: Iterable[int]) -> int | None:
        """Which of `places`, types of one name in order, is meant by it."""
        best, most = None, -2
        for place in places:
            weight = self._weight(kind, place)
            if weight is not None and weight > most:
                best, most = place, weight
        return best

    def _weight(self, kind: str, place: int) -> int | None:
        """How much the type counts among those of its name; None if it is not of that kind."""
        found = self._kinds[place]
        if found not in _KINDS[kind]:
            return None
        if kind == "tag":
            return -1 if found == ctf.FORWARD else self._body.count(self._offsets[place])
        return None if found == ctf.INTEGER and self._narrow(self._offsets[place]) else 0

    def _narrow(self, at: int) -> bool:
        """Whether the number at body offset `at` is the type of bit-fields only."""
        record = self._body.record(at)
        (word,) = Struct(self._body.byteorder + "I").unpack_from(self._body.data, record.tail)
        return int(word) & 0xFFFF < record.size * 8

    @cached_property
    def _all(self) -> dict[str, dict[str, int]]:
        strings = {0: ""}
        room = 4 * self._body.header.strlen + 0x10000
        groups: dict[str, dict[str, list[int]]] = {kind: {} for kind in _KINDS}
        wanted = {number: kind for kind, numbers in _KINDS.items() for number in numbers}
        for place, (number, word) in enumerate(zip(self._kinds, self._words, strict=True)):
            kind = wanted.get(number)
            if kind is None:
                continue
            name = strings.get(word)
            if name is None:
                name = strings[word] = self._body.string(word)
                room -= len(name)
                if room < 0:
                    message = "names overlap each other without end"
                    raise self._body.bad(self._offsets[place], message)
            groups[kind].setdefault(name, []).append(place)
        index: dict[str, dict[str, int]] = {}
        for kind, names in groups.items():
            names.pop("", None)
            best = ((name, self._best(kind, places)) for name, places in names.items())
            index[kind] = {name: place for name, place in best if place is not None}
        return index
