"""What every source of types gives: a TypeTable of Structs of Members.

Offsets and sizes are bytes. A member of a nested structure or union has a dotted name
("p_list.le_next") and its offset, as every other, counts from the start of the outermost structure;
members of unnamed unions and structures go by their own names, as in C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


class Member(NamedTuple):
    """One member: `offset` in bytes; for a bit-field also which bits.

    A bit-field's value is `(n >> bit_offset) & ((1 << bit_size) - 1)`, where n is the little-endian
    number that starts at byte `offset` (all kernels we know bit-fields of are little-endian) and is
    wide enough to hold the field. `bit_offset` may exceed 7. A `bit_size` of 0 is C's unnamed
    zero-width field. Both are None for what is not a bit-field.
    """

    name: str
    offset: int
    bit_offset: int | None = None
    bit_size: int | None = None


class Struct:
    """A structure or union: its C tag, its size in bytes, its members by name, in memory order."""

    __slots__ = ("members", "name", "size")

    def __init__(self, name: str, size: int, members: Mapping[str, Member]) -> None:
        self.name = name
        self.size = size
        self.members = members

    def __repr__(self) -> str:
        return f"<Struct {self.name}: {self.size:#x} bytes, {len(self.members)} members>"


class TypeTable:
    """The structures of one kernel, each decoded when it is first asked for.

    `name` says which layout this is ("10.9.5 x86_64"), `origin` where its numbers come from.
    `load` gives the structure of a C tag in `tags`; `aliases` maps typedef names to tags.
    """

    def __init__(
        self,
        name: str,
        origin: str,
        tags: Iterable[str],
        load: Callable[[str], Struct],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.origin = origin
        self._tags = frozenset(tags)
        self._load = load
        self._aliases = aliases or {}
        self._loaded: dict[str, Struct] = {}

    def __repr__(self) -> str:
        return f"<TypeTable {self.name}: {len(self._tags)} structures, {self.origin}>"

    def struct(self, name: str) -> Struct:
        """The structure with this C tag, or typedef name of one.

        Raises: NotFoundError("structure") with near misses.
        """
        found = self._loaded.get(name)
        if found is not None:
            return found
        tag = name if name in self._tags else self._aliases.get(name, name)
        if tag not in self._tags:
            near = near_misses(name, sorted(self._tags.union(self._aliases)))
            raise NotFoundError("structure", name, near, f"types are those of {self.name}")
        found = self._loaded.get(tag) or self._load(tag)
        self._loaded[name] = self._loaded[tag] = found
        return found

    def has(self, struct: str, member: str | None = None) -> bool:
        """Whether there is such a structure, and such a member in it (bit-fields included)."""
        if struct not in self._tags and self._aliases.get(struct) not in self._tags:
            return False
        return member is None or member in self.struct(struct).members

    def offset(self, struct: str, member: str) -> int:
        """Bytes from the start of `struct` to `member`; of a bit-field, to the byte it counts from.

        Raises: NotFoundError("structure") or ("member"), with near misses.
        """
        members = self.struct(struct).members
        found = members.get(member)
        if found is None:
            near = [f"{struct}.{name}" for name in _near_members(member, list(members))]
            hint = f"types are those of {self.name}"
            raise NotFoundError("member", f"{struct}.{member}", near, hint)
        return found.offset

    def size(self, struct: str) -> int:
        """sizeof(struct), in bytes. Raises: NotFoundError("structure")."""
        return self.struct(struct).size

    def structs(self) -> list[str]:
        """The C tags, sorted; typedef names are found too, but not listed."""
        return sorted(self._tags)


def near_misses(wanted: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """Up to `limit` names of `known` that `wanted` may have meant, likeliest first."""
    from difflib import get_close_matches  # 4 ms, and only a mistake needs it

    return get_close_matches(wanted, known, limit)


def _near_members(wanted: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """As near_misses, but first what has the same last component ("fd_cdir" → "p_fd.fd_cdir")."""
    last = wanted.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return list(dict.fromkeys([*same, *near_misses(wanted, known, limit)]))[:limit]
