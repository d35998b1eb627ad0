"""From a name to debugging entries: by the best table a file has, else by walking its units."""

from __future__ import annotations

import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_scan import Scanner, form_of, last_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.types.dwarf_dies import DebugInfo
    from kvmtool.types.dwarf_pub import PubTable
    from kvmtool.types.dwarf_scan import Named
    from kvmtool.types.dwarf_units import Unit

    Item = tuple[int, int | None]

_SCOPED_UNITS = 8  # units of C++ whose full names are kept
_PLACES = 4  # where a name is, or ends another, in the strings; more are not looked for


class Candidate(NamedTuple):
    """An entry of the name that was asked for; `rank` and `form` as in `dwarf_scan.Named`."""

    offset: int
    rank: int
    form: tuple[int | None, int | None]


class Lookup(Protocol):
    """A way from names to entries; `kind` is "tag", "typedef", "base" or "variable"."""

    def find(self, kind: str, name: str) -> Iterable[Candidate]:
        """Entries of that kind and full name, none that only declares a type.

        Of those with one rank and form the first stands for all.
        """

    def names(self, kind: str) -> Iterable[str]:
        """All names of that kind."""


class Table(Protocol):
    """A table in the file from names without scopes to entries: (offset, tag or None)."""

    def find(self, name: str) -> Iterable[Item]:
        """The entries of that name."""

    def names(self) -> Iterator[tuple[str, Any]]:
        """Each name with the place of its entries."""

    def items(self, place: Any) -> Iterable[Item]:
        """The entries at `place`."""

    def tags(self, place: Any) -> set[int] | None:
        """The tags of the entries at `place`; None where they are not told."""


class WalkLookup:
    """All units walked; those that cannot hold a name are left out while one name is asked for."""

    def __init__(self, info: DebugInfo) -> None:
        self._info, self._scanner = info, Scanner(info)
        self._walked: dict[int, dict[tuple[str, str], list[Candidate]]] = {}
        self._full: dict[tuple[str, str], list[Candidate]] | None = None
        self._scoped: dict[int, dict[int, str]] = {}

    def find(self, kind: str, name: str) -> list[Candidate]:
        """See `Lookup.find`."""
        if self._full is not None:
            return self._full.get((kind, name), [])
        found: dict[tuple[object, ...], Candidate] = {}
        for unit in self._units_with(name):
            for candidate in self._of_unit(unit).get((kind, name), ()):
                found.setdefault(candidate[1:], candidate)
        return list(found.values())

    def names(self, kind: str) -> Iterable[str]:
        """See `Lookup.names`."""
        if self._full is None:
            full: dict[tuple[str, str], dict[tuple[object, ...], Candidate]] = {}
            for unit in self._info.units.all:
                for named in self.walk(unit):
                    known = full.setdefault(named[:2], {})
                    known.setdefault(named[3:], Candidate(*named[2:]))
            self._full = {key: list(known.values()) for key, known in full.items()}
            self._walked.clear()
        return [name for other, name in self._full if other == kind]

    def _of_unit(self, unit: Unit) -> dict[tuple[str, str], list[Candidate]]:
        found = self._walked.get(unit.offset)
        if found is None:
            found = self._walked[unit.offset] = {}
            for named in self.walk(unit):
                found.setdefault(named[:2], []).append(Candidate(*named[2:]))
        return found

    def full_names(self, unit: Unit) -> dict[int, str]:
        """The names of a unit's types and variables with the scopes they are in, by offset."""
        found = self._scoped.pop(unit.offset, None)
        if found is None:
            found = {}
            for named in self._scanner.scan(unit):
                found.setdefault(named.offset, named.name)
            if len(self._scoped) >= _SCOPED_UNITS:
                del self._scoped[next(iter(self._scoped))]
        self._scoped[unit.offset] = found
        return found

    def walk(self, unit: Unit) -> Iterator[Named]:
        """The names of a unit, without those of types that it only declares."""
        return (named for named in self._scanner.scan(unit) if named.rank < 3)

    def first(self, kind: str, name: str) -> Candidate | None:
        """The best candidate of the first unit that has one."""
        for unit in self._units_with(name):
            found = self._of_unit(unit).get((kind, name))
            if found:
                return min(found, key=lambda one: one.rank)
        return None

    def _units_with(self, name: str) -> Iterator[Unit]:
        """The units whose bytes can name it: in themselves, or by an offset in `__debug_str`."""
        units = self._info.units.all
        text = last_part(name).encode("utf-8", "surrogateescape") + b"\0"
        offsets = self._string_offsets(text)
        if offsets is None:
            yield from units
            return
        indexed = self._units_indexing(offsets)
        needles = [text, *offsets]
        for unit in units:
            start, end = unit.first - unit.start, unit.end - unit.start
            if unit.offset in indexed or any(
                unit.section.find(needle, start, end) >= 0 for needle in needles
            ):
                yield unit

    def _string_offsets(self, text: bytes) -> list[bytes] | None:
        """Where `text` stands in `__debug_str`, as an entry writes it; None for many places."""
        strings = self._info.sections.get("__debug_str")
        found: list[bytes] = []
        at = -1 if strings is None else strings.find(text)
        while at >= 0 and strings is not None:
            if len(found) > _PLACES:
                return None
            found.append((at & 0xFFFFFFFF).to_bytes(4, self._info.order))
            at = strings.find(text, at + 1)
        return found

    def _units_indexing(self, offsets: Iterable[bytes]) -> set[int]:
        """The units (DWARF 5) in whose part of `__debug_str_offs` one of these stands."""
        table = self._info.sections.get("__debug_str_offs")
        if table is None:
            return set()
        bases = sorted(
            (self._info.strings_base(unit), unit.offset) for unit in self._info.units.all
        )
        found: set[int] = set()
        for needle in offsets:
            at = table.find(needle)
            while at >= 0:
                index = bisect_right(bases, (at, sys.maxsize)) - 1
                found.add(bases[max(index, 0)][1])
                after = bases[index + 1][0] if index + 1 < len(bases) else table.size
                at = table.find(needle, max(after, at + 1))
        return found


class TableLookup:
    """One table of types and one of variables; either may be missing."""

    def __init__(
        self, info: DebugInfo, walk: WalkLookup, types: Table | None, variables: Table | None
    ) -> None:
        self._info, self._walk = info, walk
        self._types, self._variables = types, variables

    def find(self, kind: str, name: str) -> Iterable[Candidate]:
        """See `Lookup.find`."""
        table = self._variables if kind == "variable" else self._types
        if table is None:
            return self._walk.find(kind, name)
        return candidates(self._info, self._walk, kind, name, table.find(last_part(name)))

    def names(self, kind: str) -> Iterable[str]:
        """See `Lookup.names`."""
        table = self._variables if kind == "variable" else self._types
        if table is None:
            yield from self._walk.names(kind)
            return
        scoped = [unit for unit in self._info.units.all if self._info.cplusplus(unit)]
        found: set[str] = set()
        for unit in scoped:
            found.update(n.name for n in self._walk.walk(unit) if n.kind == kind and n.rank < 2)
        wanted, within = dw.TAGS_OF[kind], {unit.offset for unit in scoped}
        for name, place in table.names():
            tags = table.tags(place)
            if name in found or (tags is not None and tags.isdisjoint(wanted)):
                continue
            if (tags is not None and not within) or any(
                self._has(kind, item, within) for item in table.items(place)
            ):
                found.add(name)
        yield from found

    def _has(self, kind: str, item: Item, scoped: set[int]) -> bool:
        """Whether the entry is one of `kind` in a unit that is not among `scoped`."""
        offset, tag = item
        if tag is not None and tag not in dw.TAGS_OF[kind]:
            return False
        unit = self._info.units.at(offset)
        return unit.offset not in scoped and (
            tag is not None or self._info.die(offset, unit).tag in dw.TAGS_OF[kind]
        )


class PubLookup:
    """The lists gcc wrote, which leave out what is static: that is walked for."""

    def __init__(
        self, info: DebugInfo, walk: WalkLookup, types: PubTable | None, variables: PubTable | None
    ) -> None:
        self._info, self._walk = info, walk
        self._types, self._variables = types, variables

    def find(self, kind: str, name: str) -> Iterable[Candidate]:
        """See `Lookup.find`."""
        table = self._variables if kind == "variable" else self._types
        offsets = [] if table is None else table.find(name)
        items = [(offset, None) for offset in offsets]
        found = candidates(self._info, self._walk, kind, name, items)
        return found or self._walk.find(kind, name)

    def names(self, kind: str) -> Iterable[str]:
        """See `Lookup.names`."""
        return self._walk.names(kind)


def candidates(
    info: DebugInfo, walk: WalkLookup, kind: str, name: str, items: Iterable[Item]
) -> list[Candidate]:
    """Those of the entries which are of `kind`, have that full name, and do not only declare."""
    found: dict[tuple[object, ...], Candidate] = {}
    wanted = dw.TAGS_OF[kind]
    for offset, tag in items:
        if tag is not None and tag not in wanted:
            continue
        unit = info.units.at(offset)
        die = info.die(offset, unit)
        declared = bool(die.number(dw.AT_DECLARATION))
        if die.tag not in wanted or (declared and kind != "variable"):
            continue
        candidate = Candidate(offset, 2 if declared else 0, form_of(die))
        if candidate[1:] in found:
            continue
        scoped = info.cplusplus(unit) and not _is_mangled(name)
        if not scoped or walk.full_names(unit).get(offset) == name:
            found[candidate[1:]] = candidate
    return list(found.values())


def _is_mangled(name: str) -> bool:
    return name.startswith("_Z")  # Itanium C++ ABI 5.1.1
