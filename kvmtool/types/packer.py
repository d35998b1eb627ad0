"""Types of any source into the form that `packed` reads."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvmtool.errors import KvmError
from kvmtool.types import packed
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    CType,
    Enum,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtool.types.model import TypeSource
    from kvmtool.types.packed import Identity

_DEPTH = 200  # of pointers, arrays, typedefs around each other
_NODES = 1 << 20  # more than any kernel has


def pack(
    source: TypeSource,
    roots: Iterable[tuple[str, str]] | None = None,
    identity: Identity | None = None,
) -> bytes:
    """The types of `source` in packed form.

    Of all its names, with all that is reachable from them; or of `roots`, pairs of a kind ("tag",
    "typedef", "base", "variable") and a name, with what lies in them, while pointers lead on by
    name. A root that the source does not have is remembered as absent.

    Raises what the source raises for damaged types, and `KvmError` for what the form cannot hold.
    """
    return _Packer(source, cut=roots is not None).packed(roots, identity)


class _Packer:
    def __init__(self, source: TypeSource, cut: bool) -> None:
        self._source, self._cut = source, cut
        self._columns = {name: array(code) for name, code in packed.COLUMNS if name != "strings"}
        self._strings = bytearray(b"\0")
        self._texts: dict[str, int] = {}
        self._by_shape: dict[tuple[object, ...], int] = {}
        self._by_id: dict[int, int] = {}
        self._kept: list[CType] = []  # alive, since their ids are in use
        self._waiting: list[tuple[int, Compound | Enum]] = []

    def packed(self, roots: Iterable[tuple[str, str]] | None, identity: Identity | None) -> bytes:
        """See `pack`."""
        source = self._source
        about = identity or packed.Identity(
            source.name, source.origin, source.byteorder, source.pointer_size
        )
        complete = roots is None
        if roots is None:
            roots = [(kind, name) for kind in packed.KINDS for name in source.names(kind)]
        index = []
        for kind, name in dict.fromkeys(roots):
            found = source.variable(name) if kind == "variable" else source.find(kind, name)
            node = packed.ABSENT if found is None else self._node(found)
            self._inside()
            key = packed.KINDS.index(kind), name.encode("utf-8", "surrogateescape")
            index.append((*key, self._text(name), node))
        for number, _, text, node in sorted(index):
            self._row("index", kind=number, name=text, node=node)
        flags = packed.COMPLETE * complete | packed.HAS_UUID * (about.uuid is not None)
        header = packed.HEADER.pack(
            packed.MAGIC,
            about.byteorder == ">",
            about.pointer_size,
            flags,
            self._text(about.name),
            self._text(about.origin),
            self._text(about.banner),
            0,
            about.uuid or b"",
        )
        columns = [self._columns[name] for name, _ in packed.COLUMNS if name != "strings"]
        lengths = array("I", [*map(len, columns), len(self._strings)])
        parts = [header, _little(lengths), *(column.tobytes() for column in columns)]
        return b"".join([*parts, bytes(self._strings)])

    def _row(self, table: str, **cells: int) -> None:
        try:
            for name, cell in cells.items():
                self._columns[f"{table}_{name}" if table else name].append(cell)
        except OverflowError as error:
            raise KvmError(f"types do not fit the cache's form: {error}") from error

    def _text(self, text: str | None) -> int:
        """The offset of a string; 0 for none. A NUL in one cannot be kept."""
        if text is None:
            return 0
        if text not in self._texts:
            raw = text.encode("utf-8", "surrogateescape")
            if 0 in raw:
                raise KvmError("types do not fit the cache's form: a NUL in a name")
            self._texts[text] = len(self._strings)
            self._strings += raw + b"\0"
        return self._texts[text]

    # nodes

    def _add(self, kind: int, flags: int = 0, a: int = 0, size: int = 0, c: int = 0) -> int:
        number = len(self._columns["kind"])
        if number >= _NODES:
            raise KvmError(f"types do not fit the cache's form: more than {_NODES}")
        self._row("", kind=kind, flags=flags, a=a, size=size, c=c, d=0)
        return number

    def _shared(self, kind: int, flags: int = 0, a: int = 0, size: int = 0, c: int = 0) -> int:
        """The node of these numbers, made once."""
        key = kind, flags, a, size, c
        if key not in self._by_shape:
            self._by_shape[key] = self._add(*key)
        return self._by_shape[key]

    def _node(self, ctype: CType, depth: int = 0, behind: bool = False) -> int:
        """The number of a type; `behind` a pointer names are enough, if the pack is a cut one."""
        if depth > _DEPTH:
            raise KvmError(f"a type leads through more than {_DEPTH} others")
        if behind and self._cut and isinstance(ctype, (Compound, Enum, Typedef)):
            named = self._named(ctype)
            if named is not None:
                return named
        if isinstance(ctype, (Compound, Enum)):
            return self._later(ctype)
        if isinstance(ctype, Pointer):
            target = self._node(ctype.target, depth + 1, behind=True)
            told = ctype.ptrauth is not None
            return self._shared(packed.POINTER, told, target, ctype.size, ctype.ptrauth or 0)
        if isinstance(ctype, Array):
            target = self._node(ctype.target, depth + 1, behind)
            return self._shared(packed.ARRAY, ctype.count is None, target, ctype.count or 0)
        if isinstance(ctype, Typedef):
            target = self._node(ctype.target, depth + 1, behind)
            return self._shared(packed.TYPEDEF, 0, self._text(ctype.name), 0, target)
        if isinstance(ctype, Qualified):
            target = self._node(ctype.target, depth + 1, behind)
            return self._shared(packed.QUALIFIED, 0, self._text(ctype.qualifier), 0, target)
        if isinstance(ctype, Function):
            return self._function(ctype, depth)
        return self._plain(ctype)

    def _plain(self, ctype: CType) -> int:
        if isinstance(ctype, Base):
            flags = packed.FORMS.index(ctype.form) << 1 | ctype.signed
            return self._shared(packed.BASE, flags, self._text(ctype.name), ctype.size)
        if isinstance(ctype, Opaque):
            return self._shared(packed.OPAQUE, 0, 0, ctype.size)
        if isinstance(ctype, Void):
            return self._shared(packed.VOID)
        raise KvmError(f"types do not fit the cache's form: {ctype!r}")

    def _function(self, ctype: Function, depth: int) -> int:
        result = self._node(ctype.result, depth + 1, behind=True)
        given = ctype.parameters
        numbers = [self._node(one, depth + 1, behind=True) for one in given or ()]
        key = ("function", result, ctype.variadic, given is None, *numbers)
        if key not in self._by_shape:
            flags = bool(ctype.variadic) | (given is not None) << 1
            first = len(self._columns["parameter"])
            number = self._add(packed.FUNCTION, flags, result, 0, first)
            self._columns["d"][number] = len(numbers)
            self._columns["parameter"].extend(numbers)
            self._by_shape[key] = number
        return self._by_shape[key]

    def _named(self, ctype: Compound | Enum | Typedef) -> int | None:
        """A node that leads on by name; None where the source has another under that name."""
        kind, name = ("typedef" if isinstance(ctype, Typedef) else "tag"), ctype.name
        if name is None:
            return None
        key = ("named", kind, name, ctype.size)
        if key not in self._by_shape:
            found = self._source.find(kind, name)
            if found is None or type(found) is not type(ctype) or found.size != ctype.size:
                return None
            flags = packed.KINDS.index(kind)
            self._by_shape[key] = self._shared(packed.NAMED, flags, self._text(name))
        return self._by_shape[key]

    def _later(self, ctype: Compound | Enum) -> int:
        """A node whose inside is packed by `_inside`, since it may lead back to this."""
        if id(ctype) not in self._by_id:
            complete = ctype.size is not None
            if isinstance(ctype, Compound):
                flags = packed.COMPOUNDS.index(ctype.kind) << 1 | complete
                number = self._add(packed.COMPOUND, flags, self._text(ctype.tag), ctype.size or 0)
            else:
                flags = ctype.signed << 1 | complete
                number = self._add(packed.ENUM, flags, self._text(ctype.tag), ctype.size or 0)
            self._by_id[id(ctype)] = number
            self._kept.append(ctype)
            self._waiting.append((number, ctype))
        return self._by_id[id(ctype)]

    def _inside(self) -> None:
        """The members of every structure that waits for them."""
        while self._waiting:
            number, ctype = self._waiting.pop()
            if isinstance(ctype, Enum):
                self._fill(number, "value_name", len(ctype.values))
                for name, value in ctype.values:
                    high = value >= 1 << 63
                    wrapped = value - (1 << 64) if high else value
                    self._row("value", name=self._text(name))
                    self._row("", value=wrapped, value_high=high)
                continue
            fields = [(field, self._node(field.type)) for field in ctype.fields]
            self._fill(number, "field_name", len(fields))
            for field, node in fields:
                self._row(
                    "field",
                    name=self._text(field.name),
                    type=node,
                    offset=field.offset,
                    bit=packed.NO_BITS if field.bit_offset is None else field.bit_offset,
                    bits=packed.NO_BITS if field.bit_size is None else field.bit_size,
                )

    def _fill(self, number: int, table: str, count: int) -> None:
        self._columns["c"][number] = len(self._columns[table])
        self._columns["d"][number] = count


def _little(numbers: array[int]) -> bytes:
    import sys

    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
