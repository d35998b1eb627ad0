"""The built-in layouts as C types: where every member lies, and what it is where that is known.

The database keeps offsets. A member's bytes that nothing is known of are `Opaque`, as long as the
distance to what comes next; dotted names ("p_list.le_next") become structures in structures. What
never changed is not in the database but in `fixed`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from kvmtool.types.ctype import Compound, Field, Opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvmtool.types.ctype import CType
    from kvmtool.types.fixed import FixedTypes
    from kvmtool.types.flatten import Member, Struct


class LayoutTypes:
    """A `TypeSource` over flattened structures; `load` gives that of a tag in `tags`."""

    def __init__(
        self,
        name: str,
        origin: str,
        tags: Iterable[str],
        load: Callable[[str], Struct],
        aliases: Mapping[str, str] | None = None,
        pointer_size: int = 8,
    ) -> None:
        """`aliases` maps typedef names to tags."""
        self.name, self.origin = name, origin
        self.byteorder, self.pointer_size = "<", pointer_size
        self._tags = frozenset(tags)
        self._load = load
        self._aliases = aliases or {}
        self._flat: dict[str, Struct] = {}

    def flat(self, name: str) -> Struct | None:
        """The structure of that tag or typedef name, as the database has it."""
        tag = name if name in self._tags else self._aliases.get(name, name)
        if tag not in self._tags:
            return self._fixed.flat(name)
        if tag not in self._flat:
            self._flat[tag] = self._load(tag)
        return self._flat[tag]

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        if kind == "tag" and name in self._tags:
            return _compound(self._load(name))
        if kind == "typedef" and self._aliases.get(name) in self._tags:
            return self.find("tag", self._aliases[name])
        return self._fixed.find(kind, name)

    @cached_property
    def _fixed(self) -> FixedTypes:
        from kvmtool.types.fixed import FixedTypes

        return FixedTypes(self.pointer_size)

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        if kind == "tag":
            return self._tags
        return [a for a, tag in self._aliases.items() if tag in self._tags and kind == "typedef"]

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`."""
        return None


def _compound(flat: Struct) -> Compound:
    return Compound("struct", flat.name, flat.size, lambda: _fields(flat.members, "", 0, flat.size))


def _fields(members: Mapping[str, Member], prefix: str, base: int, end: int) -> list[Field]:
    """The members directly below `prefix`, which lies at `base` and ends at `end`."""
    direct = [
        member
        for name, member in members.items()
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    ]
    starts = sorted({member.offset for member in direct} | {end})
    fields = []
    for member in direct:
        after = next((start for start in starts if start > member.offset), end)
        name, inner = member.name, f"{member.name}."
        kind: CType = Opaque(max(0, after - member.offset))
        if any(other.startswith(inner) for other in members):
            kind = Compound(
                "struct",
                None,
                max(0, after - member.offset),
                _fields(members, inner, member.offset, after),
            )
        place = (member.bit_offset, member.bit_size)
        fields.append(Field(name[len(prefix) :], kind, member.offset - base, *place))
    return fields
