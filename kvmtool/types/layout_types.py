"""The built-in layouts as C types: where every member lies, and what it is where that is known.

The database keeps offsets, and beside them what most members are ("proc*"). A member's bytes that
nothing is known of are `Opaque`, as long as the distance to what comes next; dotted names
("p_list.le_next") become structures in structures. What never changed is not in the database but
in `fixed`, and what the kernel's variables are in `variables`.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

from kvmtool.types.ctype import Array, Base, Compound, Field, Opaque, Pointer, Void

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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
        texts: Callable[[str], Mapping[str, str]] | None = None,
    ) -> None:
        """`aliases` maps typedef names to tags; `texts` gives what the members of a tag are."""
        self.name, self.origin = name, origin
        self.byteorder, self.pointer_size = "<", pointer_size
        self._tags = frozenset(tags)
        self._load, self._texts = load, texts
        self._aliases = aliases or {}
        self._flat: dict[str, Struct] = {}
        self._made: dict[str, Compound] = {}

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
            if name not in self._made:
                self._made[name] = self._compound(name)
            return self._made[name]
        if kind == "typedef":
            if self._aliases.get(name) in self._tags:
                return self.find("tag", self._aliases[name])
            from kvmtool.types.variables import typedef

            return typedef(name, self)
        return self._fixed.find(kind, name)

    @cached_property
    def _fixed(self) -> FixedTypes:
        from kvmtool.types.fixed import FixedTypes

        return FixedTypes(self.pointer_size, partial(self.find, "tag"))

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        if kind == "tag":
            return {*self._tags, *self._fixed.names("tag")}
        if kind != "typedef":
            return ()
        from kvmtool.types.variables import TYPEDEFS

        return [*(alias for alias, tag in self._aliases.items() if tag in self._tags), *TYPEDEFS]

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`."""
        from kvmtool.types.variables import variable

        return variable(name, self)

    def named(self, text: str) -> CType | None:
        """The type a text of `layout_texts` names; None for a structure that is not known."""
        from kvmtool.types.layout_texts import shape

        name, stars, counts = shape(text)
        found: CType | None
        if stars:
            found = Pointer(partial(self._target, name), self.pointer_size)
            for _ in range(stars - 1):
                found = Pointer(found, self.pointer_size)
        else:
            found = self._base(name) or self.find("tag", self._aliases.get(name, name))
        for count in reversed(counts):
            found = None if found is None else Array(found, count)
        return found

    def _target(self, name: str) -> CType:
        """What a pointer leads to; of an unknown structure the declaration."""
        tag = self._aliases.get(name, name)
        return self._base(name) or self.find("tag", tag) or Compound("struct", name, None)

    def _base(self, name: str) -> CType | None:
        from kvmtool.types.layout_texts import BASES

        if name == "void":
            return Void()
        base = BASES.get(name)
        if base is None:
            return None
        return Base(name, base.size or self.pointer_size, base.form, base.signed)

    def _compound(self, tag: str) -> Compound:
        flat = self.flat(tag)
        assert flat is not None
        members = flat.members
        kind = "union" if _is_union([m for name, m in members.items() if "." not in name]) else ""
        return Compound(kind or "struct", tag, flat.size, partial(self._fields, tag, flat))

    def _fields(self, tag: str, flat: Struct) -> list[Field]:
        texts = self._texts(tag) if self._texts is not None else {}
        return _Members(self, flat.members, texts).below("", 0, flat.size)


class _Members:
    """The members of one structure, on their way from dotted names to a tree."""

    def __init__(
        self, source: LayoutTypes, members: Mapping[str, Member], texts: Mapping[str, str]
    ) -> None:
        self._source, self._texts = source, texts
        self._inside: dict[str, list[Member]] = {}
        for name, member in members.items():
            self._inside.setdefault(name.rpartition(".")[0], []).append(member)

    def below(self, name: str, base: int, end: int) -> list[Field]:
        """The members directly in member `name` ("": the structure) from `base` to `end`."""
        direct = self._inside.get(name, [])
        starts = sorted({member.offset for member in direct} | {end})
        fields = []
        for member in direct:
            last = self._last(member)
            after = next((start for start in starts if start > last), end)
            kind = self._type(member, after, end)
            place = (member.bit_offset, member.bit_size)
            own = member.name.rpartition(".")[2]
            fields.append(Field(own, kind, member.offset - base, *place))
        return fields

    def _last(self, member: Member) -> int:
        """Where the last member inside one begins: behind its sibling's start in a union."""
        inside = self._inside.get(member.name, ())
        return max((self._last(inner) for inner in inside), default=member.offset)

    def _type(self, member: Member, after: int, end: int) -> CType:
        """What lies from the member up to `after`, where its sibling is; in a union up to `end`."""
        if member.bit_size is not None:
            return _bits(member)
        text, room = self._texts.get(member.name, ""), after - member.offset
        inner = self._inside.get(member.name, [])
        known = self._source.named(text) if text else None
        fits = known is not None and 0 < (known.size or 0) <= end - member.offset
        if known is not None and fits and (not inner or self._has_all(text, member)):
            return known
        if not inner:
            return Opaque(max(0, room))
        kind = "union" if _is_union(inner) else "struct"
        tag = text if text.isidentifier() else None
        fields = self.below(member.name, member.offset, after)
        return Compound(kind, tag, max(0, room), fields)

    def _has_all(self, tag: str, member: Member) -> bool:
        """Whether the structure `tag` by itself has the members that are known inside `member`."""
        flat = self._source.flat(tag)
        alone = flat.members if flat is not None else {}
        cut = len(member.name) + 1
        for inner in self._below(member):
            found = alone.get(inner.name[cut:])
            if found is None or found.offset != inner.offset - member.offset:
                return False
        return True

    def _below(self, member: Member) -> Iterator[Member]:
        for inner in self._inside.get(member.name, ()):
            yield inner
            yield from self._below(inner)


def _is_union(members: list[Member]) -> bool:
    """Whether all members begin where the first does, and none is a bit-field."""
    places = {member.offset for member in members}
    return len(members) > 1 and len(places) == 1 and all(m.bit_size is None for m in members)


def _bits(member: Member) -> Base:
    """The number that a bit-field is cut from; which of C's own it is declared as is not kept."""
    end = (member.bit_offset or 0) + (member.bit_size or 0)
    wide = end > 32  # bits of an unsigned int
    return Base("unsigned long long" if wide else "unsigned int", 8 if wide else 4, signed=False)
