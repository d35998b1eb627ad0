"""Types from DWARF 2 to 5 in a Mach-O: dSYMs, .o files, kernels with `__DWARF` inside.

One structure is found by a hash table or a list of names that the file has, without reading the
rest (`dwarf_lookup`), and an entry becomes a C type when it is asked for (`dwarf_types`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmtool.types.ctype import Compound, Enum, Typedef, unqualified
from kvmtool.types.dwarf_declared import DeclaredCompound
from kvmtool.types.dwarf_dies import DebugInfo
from kvmtool.types.dwarf_lookup import PubLookup, TableLookup, WalkLookup
from kvmtool.types.dwarf_sections import dwarf_sections
from kvmtool.types.dwarf_types import TypeMaker

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtool.macho import MachO
    from kvmtool.types.ctype import CType
    from kvmtool.types.dwarf_dies import Die
    from kvmtool.types.dwarf_lookup import Candidate, Lookup
    from kvmtool.types.dwarf_sections import Section


def open_dwarf(image: MachO) -> DwarfTypes | None:
    """The types that `image` describes in DWARF; None where there is none in it.

    Nothing but headers is read yet. The image's source must stay open as long as types are asked
    for. Raises `FormatError` or `TruncatedError` for damage.
    """
    sections = dwarf_sections(image)
    if "__debug_info" not in sections or "__debug_abbrev" not in sections:
        return None
    return DwarfTypes(image, sections)


class DwarfTypes:
    """A `TypeSource` over DWARF; `names` also takes the kind "variable"."""

    def __init__(self, image: MachO, sections: Mapping[str, Section]) -> None:
        self.byteorder = image.byteorder
        self.pointer_size = 8 if image.is64 else 4
        self.name = os.path.basename(image.source.name)
        self._info = info = DebugInfo(sections, image.byteorder)
        first = info.units.all[0].shape.version if info.units.all else 0
        self.origin = f"DWARF {first} of {image.source.name}"
        self._maker = TypeMaker(info, self._full_name, self._definition)
        self._walk = WalkLookup(info)
        self._lookup = _lookup(info, self._walk)
        self._found: dict[tuple[str, str], CType | None] = {}

    def __repr__(self) -> str:
        return f"<DwarfTypes {self.origin}>"

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`; of the kind "variable" as `variable`.

        Where units define a name differently, what has the most members counts: XNU's headers give
        the inside of `struct wait_queue` to some, and words named "opaque" to all others.
        """
        if kind == "variable":
            return self.variable(name)
        key = (kind, name)
        if key not in self._found:
            made = [self._maker.at(candidate.offset) for candidate in self._sorted(kind, name)]
            self._found[key] = max(made, key=_weight) if len(made) > 1 else next(iter(made), None)
        return self._found[key]

    def _sorted(self, kind: str, name: str) -> list[Candidate]:
        """The candidates of the best rank, in the order of the file."""
        found = sorted(self._lookup.find(kind, name), key=lambda one: (one.rank, one.offset))
        return [one for one in found if one.rank == found[0].rank]

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`; "variable" gives those of variables and functions."""
        return self._lookup.names(kind)

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`; a C++ one also by its mangled name.

        What is defined in assembly has no definition here: a declaration tells its type.
        """
        candidates = self._sorted("variable", name)
        if not candidates:
            declared = self._walk.first("variable", name)
            candidates = [] if declared is None else [declared]
        for candidate in candidates:
            found = self._maker.variable(self._info.die(candidate.offset))
            if found is not None:
                return found
        return None

    def _full_name(self, die: Die) -> str | None:
        name = self._info.name(die)
        if name is None or not self._info.cplusplus(die.unit):
            return name
        return self._walk.full_names(die.unit).get(die.offset, name)

    def _definition(self, die: Die) -> CType | None:
        """What defines the structure or enumeration that `die` declares, maybe in another unit."""
        name = self._full_name(die)
        return None if name is None else self.find("tag", name)


def _weight(ctype: CType) -> int:
    """How much a definition tells. A declaration is not asked: it would ask for the definition."""
    if isinstance(ctype, DeclaredCompound):
        return 0
    if isinstance(ctype, Typedef):
        ctype = unqualified(ctype)
        return 1 + _weight(ctype)
    if isinstance(ctype, Compound) and ctype.complete:
        return 1 + len(ctype.fields)
    return len(ctype.values) if isinstance(ctype, Enum) else 0


def _lookup(info: DebugInfo, walk: WalkLookup) -> Lookup:
    """The best way from names to entries that the file offers."""
    sections, order = info.sections, info.byteorder
    strings = sections.get("__debug_str")
    if strings is not None and "__debug_names" in sections:
        from kvmtool.types.dwarf_names import NamesTable

        both = NamesTable(sections["__debug_names"], strings, order)
        return TableLookup(info, walk, both, both)
    if strings is not None and ("__apple_types" in sections or "__apple_names" in sections):
        from kvmtool.types.dwarf_apple import AppleTable

        tables = [
            AppleTable(sections[name], strings, order) if name in sections else None
            for name in ("__apple_types", "__apple_names")
        ]
        return TableLookup(info, walk, *tables)
    if "__debug_pubtypes" in sections:
        from kvmtool.types.dwarf_pub import PubTable

        lists = [
            PubTable(sections[name], order) if name in sections else None
            for name in ("__debug_pubtypes", "__debug_pubnames")
        ]
        return PubLookup(info, walk, *lists)
    return walk
