"""C types from Volatility 3's Intermediate Symbol Format: JSON, plain or packed (gzip, xz, zstd).

Schema 4.0 to 6.2 (volatility3/schemas). The whole file is parsed at once, within bounds that real
files (60 MB) stay far below; C types are made from it when they are asked for. ISF knows no
typedefs; what has no tag in C has one here ("unnamed_5f3c", "__unnamed_123", "$_7"), and is unnamed
again in what this reader gives. Members are in the order they have in memory, since producers sort
them by name.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Pointer,
    Void,
)
from kvmtool.types.near import one_line
from kvmtool.types.packed_text import TextLimits, first_bytes, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtool.source import Source
    from kvmtool.types.ctype import CType

    Json = dict[str, Any]

_PARTS = ("base_types", "user_types", "enums", "symbols")
_START = re.compile(rb'\s*\{\s*"(?:metadata|base_types|user_types|enums|symbols)"\s*:\s*\{')
_UNNAMED = re.compile(r"(__)?unnamed_[0-9a-fx]+(_class)?$|unnamed_field_[0-9a-fx]+$|\$_\d+$")
_COMPOUNDS = ("struct", "union", "class")
_FORMS = {"int": "int", "char": "char", "float": "float", "bool": "bool"}
# Bounded by what Python needs to hold them: some 60 bytes a value, 230 an object
_LIMITS = TextLimits(size=192 << 20, counts={b"{": 3_000_000, b"[": 1_000_000, b",": 10_000_000})
_SIZE_LIMIT = 1 << 32
_DEPTH_LIMIT = 64  # of pointers to pointers, arrays of arrays
_MASK = 0xFFFFFFFFFFFFFFFF


class IsfTypes:
    """A `TypeSource` over one ISF file, and the symbols in it."""

    def __init__(self, content: Json, source_name: str) -> None:
        """`content` is the JSON's top level, every part of `_PARTS` an object."""
        self._path = source_name
        self._bases: Json = content["base_types"]
        self._structs: Json = content["user_types"]
        self._enums: Json = content["enums"]
        self._symbols: Json = content["symbols"]
        metadata = content.get("metadata")
        version = metadata.get("format") if isinstance(metadata, dict) else None
        self.name = os.path.basename(source_name)
        self.origin = f"ISF {version or 'of unknown version'} in {source_name}"
        pointer = self._bases.get("pointer")
        wide = pointer.get("size") if isinstance(pointer, dict) else None
        self.pointer_size = wide if wide in (4, 8) else 8
        big = isinstance(pointer, dict) and pointer.get("endian") == "big"
        self.byteorder = ">" if big else "<"
        self._made: dict[tuple[str, str], CType] = {}

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        if kind == "tag" and (name in self._structs or name in self._enums):
            return self._named("struct" if name in self._structs else "enum", name)
        return self._named("base", name) if kind == "base" and name in self._bases else None

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        if kind == "tag":
            tags = {**self._structs, **self._enums}
            return [tag for tag in tags if not _UNNAMED.match(tag)]
        return list(self._bases) if kind == "base" else []

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`."""
        symbol = self._symbols.get(name)
        described = symbol.get("type") if isinstance(symbol, dict) else None
        return self._type(described, f"symbol {name}") if isinstance(described, dict) else None

    def addresses(self) -> dict[str, int]:
        """Link addresses of the symbols by C name (no leading underscore); 0 means undefined."""
        found = {}
        for name, symbol in self._symbols.items():
            address = symbol.get("address") if isinstance(symbol, dict) else None
            if isinstance(address, int) and address:
                found[name] = address & _MASK
        return found

    def constant(self, name: str) -> bytes | None:
        """The bytes of a variable that never changes ("version"); None if they are not told.

        Raises `FormatError` for what is no base64.
        """
        symbol = self._symbols.get(name)
        data = symbol.get("constant_data") if isinstance(symbol, dict) else None
        if not isinstance(data, str):
            return None
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as exc:
            raise self._bad(f"symbol {name}", f"constant_data is no base64 ({exc})") from exc

    def _bad(self, where: str, message: str) -> FormatError:
        return FormatError(self._path, None, one_line(f"{where}: {message}"))

    def _named(self, kind: str, name: str) -> CType:
        """The base type, structure or enumeration `name`; a declaration if it is not described."""
        key = ("struct" if kind in _COMPOUNDS else kind, name)
        if key not in self._made:
            self._made[key] = self._make(kind, name)
        return self._made[key]

    def _make(self, kind: str, name: str) -> CType:
        if kind == "base":
            return self._base(name)
        tag = None if _UNNAMED.match(name) else one_line(name)
        part = self._enums if kind == "enum" else self._structs
        found = part.get(name)
        if found is None:
            return Enum(tag, None) if kind == "enum" else Compound(kind, tag, None)
        if not isinstance(found, dict):
            raise self._bad(name, f"expected an object, got {found!r:.40}")
        size = self._number(found, "size", name, _SIZE_LIMIT)
        if kind == "enum":
            base = self._bases.get(str(found.get("base")))
            signed = not isinstance(base, dict) or bool(base.get("signed", True))
            return Enum(tag, size, partial(self._constants, name, found), signed)
        told = found.get("kind")
        return Compound(
            told if told in _COMPOUNDS else "struct", tag, size, partial(self._fields, name, found)
        )

    def _base(self, name: str) -> CType:
        found = self._bases.get(name)
        if name == "void" or (isinstance(found, dict) and found.get("kind") == "void"):
            return Void()
        if not isinstance(found, dict):
            raise self._bad(f"base type {name}", "expected a description, there is none")
        size = self._number(found, "size", f"base type {name}", 32)
        form = _FORMS.get(str(found.get("kind")), "int")
        return Base(one_line(name), size, form, bool(found.get("signed", form == "int")))

    def _constants(self, name: str, found: Json) -> list[tuple[str, int]]:
        constants = found.get("constants")
        if not isinstance(constants, dict) or not all(_is_int(n) for n in constants.values()):
            raise self._bad(f"enum {name}", "expected numbers as constants")
        return sorted(
            ((one_line(text), value) for text, value in constants.items()), key=lambda pair: pair[1]
        )

    def _fields(self, name: str, found: Json) -> list[Field]:
        described = found.get("fields")
        if not isinstance(described, dict):
            raise self._bad(name, f"expected fields, got {described!r:.40}")
        fields = [self._field(name, field, value) for field, value in described.items()]
        if found.get("kind") != "union":
            fields.sort(key=lambda field: (field.offset, field.bit_offset or 0))
        return fields

    def _field(self, struct: str, name: str, value: object) -> Field:
        where = f"{struct}.{name}"
        described = value.get("type") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(described, dict):
            raise self._bad(where, f"expected an offset and a type, got {value!r:.40}")
        offset = self._number(value, "offset", where, _SIZE_LIMIT)
        unnamed = value.get("anonymous") is True or _UNNAMED.match(name) is not None
        shown = None if unnamed else one_line(name)
        if described.get("kind") != "bitfield":
            return Field(shown, self._type(described, where), offset)
        inner = described.get("type")
        kind = self._type(inner if isinstance(inner, dict) else {}, where)
        unit = 8 * (kind.size or 0)
        width = self._number(described, "bit_length", where, unit)
        position = self._number(described, "bit_position", where, unit - width)
        if self.byteorder == ">":  # counted from the lowest bit here, from the first byte there
            position = unit - position - width
        return Field(shown, kind, offset, position, width)

    def _type(self, described: Mapping[str, Any], where: str, depth: int = 0) -> CType:
        if depth > _DEPTH_LIMIT:
            raise self._bad(where, f"a type nested deeper than {_DEPTH_LIMIT}")
        kind, name = described.get("kind"), described.get("name")
        if kind == "pointer":
            return Pointer(partial(self._inner, described, where, depth), self.pointer_size)
        if kind == "array":
            count = self._number(described, "count", where, _SIZE_LIMIT)
            return Array(self._inner(described, where, depth), count)
        if kind == "function":
            return Function(Void())
        if kind in ("base", "enum", *_COMPOUNDS) and isinstance(name, str):
            return self._named(str(kind), name)
        raise self._bad(where, f"expected a type, got {dict(described)!r:.60}")

    def _inner(self, described: Mapping[str, Any], where: str, depth: int) -> CType:
        inner = described.get("subtype")
        if not isinstance(inner, dict):
            raise self._bad(where, f"expected a subtype, got {inner!r:.40}")
        return self._type(inner, where, depth + 1)

    def _number(self, described: Mapping[str, Any], key: str, where: str, most: int) -> int:
        number = described.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
            raise self._bad(where, f"expected a {key} of 0 to {most:#x}, got {number!r:.40}")
        return number


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parsed(text: bytes) -> Any:
    """The JSON in `text`. Raises ValueError, RecursionError."""
    import gc
    import json

    # Half a million dictionaries that all stay: looking for dead ones takes two thirds of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if collecting:
            gc.enable()


def is_isf(source: Source) -> bool:
    """Whether this is ISF: JSON, also packed, that begins with a part of it."""
    return _START.match(first_bytes(source)) is not None


def open_isf(path: str) -> IsfTypes:
    """The types in the ISF file at `path`.

    Raises OSError, `FormatError` for what is damaged, is not ISF, or is larger than any real file.
    """
    text = unpacked(path, _LIMITS)
    try:
        content = _parsed(text)
    except RecursionError as exc:
        raise FormatError(path, None, "JSON nested deeper than any ISF is") from exc
    except ValueError as exc:  # JSONDecodeError, and numbers and text that Python refuses
        raise FormatError(path, None, one_line(f"is not JSON: {str(exc)[:200]}")) from exc
    if not isinstance(content, dict) or not isinstance(content.get("user_types"), dict):
        raise FormatError(path, None, "expected ISF, got JSON without user_types")
    for part in _PARTS:
        if not isinstance(content.setdefault(part, {}), dict):
            raise FormatError(path, None, f"expected an object as {part}")
    return IsfTypes(content, path)
