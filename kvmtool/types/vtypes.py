"""C types from Volatility 2's profiles of Macs: a zip of vtypes and a listing of symbols.

The vtypes are Python 2 source, "mac_types = { 'proc': [ 0x4a8, { 'p_pid': [0x10, ['int']], ..."
written by Volatility's dwarf.py from dwarfdump's text. The structures' heads are found in one pass,
a structure is parsed when it is asked for. What the format does not say: typedefs, the tags of
enumerations, the declared types of bit-fields, struct or union (the latter is taken where all
members lie at 0). Known defects of the public profiles:

- From 10.11 on every array's count is 0. It is counted again from the distance to what follows,
  which includes padding; where that is no answer it stays 0, and one `KvmWarning` says so.
- In 10.13's, bit-fields of 10 bits and more have wrong widths: one `KvmWarning`.
- Bit-fields that straddle their unit have positions 2^64 too low: put right.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError, KvmWarning
from kvmtool.types import dsymutil
from kvmtool.types.ctype import Array, Base, Compound, Enum, Field, Function, Opaque, Pointer, Void
from kvmtool.types.literal import LiteralError, parse_literal, whole_number
from kvmtool.types.near import one_line
from kvmtool.types.profile_zip import is_profile, read_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtool.nlist import Nlist
    from kvmtool.types.ctype import CType
    from kvmtool.types.profile_zip import ProfileText

__all__ = ["ProfileTypes", "is_profile", "open_profile"]

_HEAD = re.compile(
    r"'([^'\\\n]{1,512})'[ \t]*:[ \t]*\[\s{0,16}(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})[lL]?\s{0,16}"
    r",\s{0,16}(?=\{)"
)
_COUNTED = re.compile(r"'array',(?!\s{0,4}0[xX]?0*[lL]?,)")
_UNNAMED = re.compile(r"__unnamed_\d+(_class)?$|\$_\d+$")
_STRUCTS_LIMIT = 200_000
_SIZE_LIMIT = 1 << 32
_DEPTH_LIMIT = 64
_WIDE_FIELD = 10  # bits from which on 10.13's widths are wrong
_CLASS = "_class"  # Volatility's mark on the names of C++ classes
# Apple's numbers: bytes (0: those of a pointer), form, signed
_BASES = {
    "char": (1, "char", True),
    "signed char": (1, "char", True),
    "unsigned char": (1, "char", False),
    "short": (2, "int", True),
    "unsigned short": (2, "int", False),
    "int": (4, "int", True),
    "unsigned int": (4, "int", False),
    "long": (0, "int", True),
    "unsigned long": (0, "int", False),
    "long long": (8, "int", True),
    "unsigned long long": (8, "int", False),
    "__int128": (16, "int", True),
    "unsigned __int128": (16, "int", False),
    "bool": (1, "bool", False),
    "_Bool": (1, "bool", False),
    "float": (4, "float", True),
    "double": (8, "float", True),
    "long double": (16, "float", True),
}


class ProfileTypes:
    """A `TypeSource` over one profile, and the symbols in it."""

    def __init__(self, text: ProfileText, source_name: str) -> None:
        """Raises `FormatError` for a text without structures."""
        self._path, self._vtypes, self._listing = source_name, text.vtypes, text.symbols
        self.name = os.path.basename(source_name)
        self.origin = f"Volatility 2 profile {source_name}"
        # name -> (size, where the members' dictionary begins); the last of one name counts
        self._heads: dict[str, tuple[int, int]] = {}
        for found in _HEAD.finditer(text.vtypes):
            self._heads[found[1]] = whole_number(found[2]), found.end()
            if len(self._heads) > _STRUCTS_LIMIT:
                raise self._bad(found.start(), f"more than {_STRUCTS_LIMIT} structures")
        if not self._heads:
            raise FormatError(source_name, None, "expected vtypes, got no structure")
        arch = dsymutil.architecture(text.symbols)
        self.byteorder = ">" if arch is not None and arch.startswith("ppc") else "<"
        self.pointer_size = self._word(arch)
        self._uncounted = "'array'" in text.vtypes and _COUNTED.search(text.vtypes) is None
        self._tags = self._by_tag()
        self._made: dict[str, Compound] = {}
        self._warned: set[str] = set()

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        if kind == "base" and name in _BASES:
            return self._base(name)
        return self._struct(self._tags[name]) if kind == "tag" and name in self._tags else None

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        return self._tags if kind == "tag" else _BASES if kind == "base" else ()

    def variable(self, name: str) -> CType | None:
        """None: a profile does not say the types of variables."""
        return None

    def entries(self) -> Iterable[Nlist]:
        """Every named entry of the kernel's symbol table, stabs too, as linked."""
        return dsymutil.entries(self._listing)

    def addresses(self) -> dict[str, int]:
        """Link addresses of the defined symbols by C name (no leading underscore)."""
        return dsymutil.addresses(self._listing)

    def _bad(self, at: int, message: str) -> FormatError:
        return FormatError(self._path, None, one_line(f"vtypes at character {at:#x}: {message}"))

    def _word(self, arch: str | None) -> int:
        """Bytes of a pointer: as the listing's processor has it, else half of two in a row."""
        if arch is not None:
            return 8 if "64" in arch else 4
        size, _ = self._heads.get("queue_entry", (16, 0))
        return 4 if size == 8 else 8

    def _by_tag(self) -> dict[str, str]:
        """The names of structures that have tags in C, by these."""
        tags = {name: name for name in self._heads if not _UNNAMED.match(name)}
        for name in [name for name in tags if name.endswith(_CLASS)]:
            tags.setdefault(name.removesuffix(_CLASS), tags.pop(name))
        return tags

    def _base(self, name: str) -> Base:
        size, form, signed = _BASES[name]
        return Base(name, size or self.pointer_size, form, signed)

    def _struct(self, name: str) -> Compound:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Compound:
        is_class = name.endswith(_CLASS)
        tag = None if _UNNAMED.match(name) else one_line(name.removesuffix(_CLASS))
        kind = "class" if is_class else "struct"
        if name not in self._heads:
            return Compound(kind, tag, None)
        size, at = self._heads[name]
        if size > _SIZE_LIMIT:
            raise self._bad(at, f"{name}: {size:#x} bytes, expected a 32-bit size")
        members = self._members(name, at)
        together = len(members) > 1 and not any(offset for offset, _ in members.values())
        if together and not any(form[0] == "BitField" for _, form in members.values()):
            kind = "union"
        return Compound(kind, tag, size, partial(self._fields, name, size, members))

    def _members(self, name: str, at: int) -> dict[str, tuple[int, list[Any]]]:
        """Offset and description of each member."""
        try:
            found = parse_literal(self._vtypes, at)
        except LiteralError as exc:
            raise self._bad(exc.offset, f"{name}: {exc}") from exc
        members = {}
        for field, value in found.items():
            match value:
                case [int(offset), [str(), *_] as form] if 0 <= offset <= _SIZE_LIMIT:
                    members[str(field)] = offset, form
                case _:
                    message = f"{name}.{field}: expected an offset and a type, got {value!r:.60}"
                    raise self._bad(at, message)
        return members

    def _fields(
        self, name: str, size: int, members: Mapping[str, tuple[int, list[Any]]]
    ) -> list[Field]:
        fields = []
        for field, (offset, form) in members.items():
            where = f"{name}.{field}"
            if form[0] == "array" and self._uncounted:
                offsets = [other for other, _ in members.values()]
                form = ["array", self._counted(where, form, offset, size, offsets), *form[2:]]
            shown = None if _UNNAMED.match(field) else one_line(field)
            if form[0] == "BitField":
                fields.append(self._bit_field(shown, where, offset, form))
            else:
                fields.append(Field(shown, self._type(form, where), offset))
        fields.sort(key=lambda field: (field.offset, field.bit_offset or 0))
        return fields

    def _counted(
        self, where: str, form: list[Any], offset: int, size: int, offsets: list[int]
    ) -> int:
        """The count of an array whose own is lost, from the distance to what follows it."""
        room = min([other for other in offsets if other > offset], default=size) - offset
        inner = self._type(form[2], where) if len(form) == 3 else Void()
        shared = offsets.count(offset) > 1
        if shared and any(offsets) and inner.name == "char":
            return 0  # one of the pads of no bytes around a system call's argument
        if room > 0 and not shared and inner.size and room % inner.size == 0:
            return room // inner.size
        if room > 0:
            self._warn("array", f"{where}: its array's count is lost")
        return 0

    def _bit_field(self, shown: str | None, where: str, offset: int, form: list[Any]) -> Field:
        match form:
            case [_, {"start_bit": int(start), "end_bit": int(end)}]:
                start, end = start % (1 << 64), end % (1 << 64)
            case _:
                raise self._bad(0, f"{where}: expected start_bit and end_bit, got {form!r:.60}")
        width = end - start
        if not 0 <= width <= 1024 or start > 1024:
            raise self._bad(0, f"{where}: a bit-field of bits {start:#x} to {end:#x}")
        if width > 64:  # not one: how dwarf.py understood a C++ pointer to a member
            return Field(shown, Opaque(width // 8), offset + start // 8)
        if width >= _WIDE_FIELD and self._uncounted:
            self._warn("bits", f"{where}: 10.13's widths of {_WIDE_FIELD} bits or more are wrong")
        kind = self._base("unsigned int" if end <= 32 else "unsigned long long")
        return Field(shown, kind, offset, start, width)

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                KvmWarning(f"{self._path}: {one_line(message)} (a defect of profiles since 10.11)"),
                stacklevel=2,
            )

    def _type(self, form: object, where: str, depth: int = 0) -> CType:
        if depth > _DEPTH_LIMIT:
            raise self._bad(0, f"{where}: a type nested deeper than {_DEPTH_LIMIT}")
        match form:
            case ["pointer", inner]:
                return Pointer(partial(self._type, inner, where, depth + 1), self.pointer_size)
            case ["array", int(count), inner] if 0 <= count <= _SIZE_LIMIT:
                return Array(self._type(inner, where, depth + 1), count)
            case ["Enumeration", {"choices": dict(choices)}]:
                return Enum(None, 4, partial(_constants, choices))
            case ["void"]:
                return Void()
            case [str(name)] if name in _BASES:
                return self._base(name)
            case ["function"] if "function" not in self._heads:
                return Function(Void())
            case [str(name)]:
                return self._struct(name)
        raise self._bad(0, f"{where}: expected a type, got {form!r:.60}")


def _constants(choices: dict[Any, Any]) -> list[tuple[str, int]]:
    """Names and numbers, as 32-bit ones: -1 is written 18446744073709551615L."""
    pairs = [
        (one_line(str(name)), number) for number, name in choices.items() if isinstance(number, int)
    ]
    return sorted(
        ((name, (number + 0x80000000) % (1 << 32) - 0x80000000) for name, number in pairs),
        key=lambda pair: pair[1],
    )


def open_profile(path: str) -> ProfileTypes:
    """The types and symbols of the Volatility 2 profile at `path`.

    Raises OSError; `FormatError` for what is damaged, is no profile, or is larger than any.
    """
    return ProfileTypes(read_profile(path), path)
