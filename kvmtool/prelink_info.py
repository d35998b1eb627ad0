"""The property list of a prelinked kernel or kernel collection: what it says of each kext.

The list is written in the dialect of OSUnserializeXML, which no plist library reads: values may
carry an ID and be named again by an IDREF, integers may be hexadecimal and have a size in bits,
data may be hexadecimal, there are sets, and NULs pad the text. Tokens come from expat; entities
other than XML's own are refused, depth and number of objects are limited, and an IDREF shares its
object, so that nothing in a list can grow beyond its text.

Source: libkern/c++/OSUnserializeXML.y and libkern/libkern/prelink.h, xnu-11417.121.6.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64, unhexlify
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.parsers import expat

from kvmtool.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

SIZE_LIMIT = 64 << 20  # bytes of text; the largest known are some 10 MiB
DEPTH_LIMIT = 128
OBJECT_LIMIT = 4 * 131071  # four times what xnu itself accepts (MAX_OBJECTS)

CODELESS = 0x7FFFFFFFFFFFFFFF  # kOSKextCodelessKextLoadAddr: the kext has no executable


class KextInfo(NamedTuple):
    """One kext's entry. Addresses are as linked; None where the key is absent.

    `load_address` is where the Mach-O header will lie, `source_address` where it lies inside
    __PRELINK_TEXT; `size` and `link_state_size` are bytes; `module_index` is the place of a kext
    that is built into the kernel in __kmod_info and __kmod_start.
    """

    identifier: str
    version: str | None
    executable: str | None
    required: str | None
    bundle_path: str | None
    executable_path: str | None
    load_address: int | None
    source_address: int | None
    size: int | None
    kmod_info: int | None
    interface_uuid: bytes | None
    kcid: bytes | None
    link_state: int | None
    link_state_size: int | None
    module_index: int | None
    dependencies: tuple[str, ...]


class PrelinkInfo(NamedTuple):
    """The whole list. `kcid` is this collection's UUID, the others those it was linked against.

    `kaslr_offsets` are the packed u32 offsets into __PRELINK_TEXT of pointers that slide.
    """

    kexts: tuple[KextInfo, ...]
    kcid: bytes | None
    boot_kcid: bytes | None
    pageable_kcid: bytes | None
    kaslr_offsets: bytes | None


def parse_prelink_info(data: bytes, name: str, offset: int, arch: str) -> PrelinkInfo:
    """The list in `data`, which lies at file offset `offset` of the file `name`.

    `arch` chooses between keys that exist per machine (OSBundleLibraries_x86_64). Raises
    `FormatError` with the file offset where the text goes wrong.
    """
    root = parse_plist(data, name, offset)
    top = root if isinstance(root, dict) else {"_PrelinkInfoDictionary": root}
    entries = top.get("_PrelinkInfoDictionary", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(name, offset, "_PrelinkInfoDictionary: expected an array of dictionaries")
    kaslr = _get(top, "_PrelinkLinkKASLROffsets", bytes)
    if kaslr is not None:  # struct kaslrPackedOffsets: count, offsetsArray[]
        count = int.from_bytes(kaslr[:4], "little")
        if len(kaslr) < 4 + 4 * count:
            raise FormatError(
                name,
                offset,
                f"_PrelinkLinkKASLROffsets: {count:#x} offsets in {len(kaslr):#x} bytes",
            )
        kaslr = kaslr[4 : 4 + 4 * count]
    return PrelinkInfo(
        tuple(_kext_info(entry, arch) for entry in entries if "CFBundleIdentifier" in entry),
        _get(top, "_PrelinkKCID", bytes),
        _get(top, "_BootKCID", bytes),
        _get(top, "_PageableKCID", bytes),
        kaslr,
    )


def _get(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of `key` when it is of the type xnu expects; OSDynamicCast gives none else."""
    value = entry.get(key)
    return value if type(value) is kind else None


def _kext_info(entry: Mapping[str, Any], arch: str) -> KextInfo:
    libraries = _get(entry, f"OSBundleLibraries_{arch}", dict)
    if libraries is None:
        libraries = _get(entry, "OSBundleLibraries", dict) or {}
    load_address = _get(entry, "_PrelinkExecutableLoadAddr", int)
    return KextInfo(
        str(entry["CFBundleIdentifier"]),
        _get(entry, "CFBundleVersion", str),
        _get(entry, "CFBundleExecutable", str),
        _get(entry, "OSBundleRequired", str),
        _get(entry, "_PrelinkBundlePath", str),
        _get(entry, "_PrelinkExecutableRelativePath", str),
        None if load_address == CODELESS else load_address,
        _get(entry, "_PrelinkExecutableSourceAddr", int),
        _get(entry, "_PrelinkExecutableSize", int),
        _get(entry, "_PrelinkKmodInfo", int),
        _get(entry, "_PrelinkInterfaceUUID", bytes),
        _get(entry, "_PrelinkKCID", bytes),
        _get(entry, "_PrelinkLinkState", int),
        _get(entry, "_PrelinkLinkStateSize", int),
        _get(entry, "ModuleIndex", int),
        tuple(libraries),
    )


def parse_plist(data: bytes, name: str, offset: int = 0) -> Any:
    """The object in `data`: dict, list, str, bytes, int or bool; sets become lists.

    Text ends at the first NUL. Bytes that are not UTF-8 become lone surrogates. Objects named by
    an IDREF are shared, never copied, and cannot hold themselves. Integers are as xnu stores them,
    unsigned in their `size` bits. Raises `FormatError`; `offset` is where `data` lies in `name`.
    """
    end = data.find(b"\0")
    text = data if end < 0 else data[:end]
    if len(text) > SIZE_LIMIT:
        raise FormatError(
            name, offset, f"property list of {len(text):#x} bytes, expected at most {SIZE_LIMIT:#x}"
        )
    return _Builder(name, offset).build(text)


class _Open(NamedTuple):
    """An element that has begun: `items` collects what lies inside."""

    tag: str
    attributes: Mapping[str, str]
    items: list[Any]
    text: list[str]


_LEAVES = frozenset(("key", "string", "integer", "data", "true", "false"))
_TAGS = _LEAVES | {"dict", "array", "set", "plist"}
_MISSING = object()


class _Key(str):
    """A dictionary's key, told from a string that is a value."""

    __slots__ = ()


class _Builder:
    """Builds objects from expat's events."""

    def __init__(self, name: str, offset: int) -> None:
        self._name, self._offset = name, offset
        # Every byte is a character in Latin-1: what is no UTF-8 cannot stop the reading, and
        # expat's byte index stays the place in the file.
        self._parser = parser = expat.ParserCreate("iso-8859-1")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.EntityDeclHandler = self._entity
        parser.SkippedEntityHandler = self._entity
        self._stack = [_Open("", {}, [], [])]
        self._shared: dict[int, Any] = {}
        self._count = 0

    def build(self, text: bytes) -> Any:
        try:
            self._parser.Parse(text, True)
        except expat.ExpatError as error:
            self._bad(f"property list: {expat.ErrorString(error.code)}", cause=error)
        roots = self._stack[0].items
        if len(roots) != 1 or type(roots[0]) not in (dict, list):
            self._bad("property list: expected one dictionary or array")
        return roots[0]

    def _bad(self, message: str, cause: Exception | None = None) -> NoReturn:
        syntax = isinstance(cause, expat.ExpatError)
        index = self._parser.ErrorByteIndex if syntax else self._parser.CurrentByteIndex
        raise FormatError(self._name, self._offset + max(index, 0), message) from cause

    def _entity(self, name: str, *_rest: object) -> None:
        self._bad(f"property list: entity {name!r}, expected none")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag not in _TAGS or self._stack[-1].tag in _LEAVES:
            self._bad(f"property list: unexpected <{tag}>")
        if len(self._stack) > DEPTH_LIMIT:
            self._bad(f"property list: elements nested deeper than {DEPTH_LIMIT}")
        self._stack.append(_Open(tag, attributes, [], []))

    def _text(self, text: str) -> None:
        top = self._stack[-1]
        if top.tag in _LEAVES:
            top.text.append(text)
        elif not text.isspace():
            self._bad(f"property list: text in <{top.tag}>")

    def _end(self, tag: str) -> None:
        element = self._stack.pop()
        into = self._stack[-1]
        if tag == "plist":
            if into.tag:
                self._bad("property list: <plist> inside another element")
            into.items.extend(element.items)
            return
        self._count += 1
        if self._count > OBJECT_LIMIT:
            self._bad(f"property list: more than {OBJECT_LIMIT:#x} objects")
        into.items.append(self._object(element))

    def _object(self, element: _Open) -> Any:
        attributes = element.attributes
        if "IDREF" in attributes:
            shared = self._shared.get(self._number(attributes["IDREF"]), _MISSING)
            if shared is _MISSING:
                self._bad(f"property list: IDREF {attributes['IDREF']!r} has no ID before it")
            return shared
        value = self._value(element)
        if "ID" in attributes:
            plain = str(value) if type(value) is _Key else value
            self._shared[self._number(attributes["ID"])] = plain
        return value

    def _value(self, element: _Open) -> Any:
        tag = element.tag
        if tag == "dict":
            return self._dictionary(element.items)
        if tag in ("array", "set"):
            if any(type(item) is _Key for item in element.items):
                self._bad(f"property list: <key> in <{tag}>")
            return element.items
        text = "".join(element.text)
        if tag in ("key", "string"):
            string = text.encode("latin-1").decode("utf-8", "surrogateescape")
            return _Key(string) if tag == "key" else string
        if tag == "integer":
            bits = self._number(element.attributes.get("size", "64"))
            if not 1 <= bits <= 64:
                self._bad(f"property list: integer of {bits} bits, expected 1 to 64")
            return self._number(text or "0") & ((1 << bits) - 1)
        if tag == "data":
            return self._data(text, element.attributes.get("format") == "hex")
        return tag == "true"

    def _dictionary(self, items: list[Any]) -> dict[str, Any]:
        keys, values = items[::2], items[1::2]
        even = len(keys) == len(values)
        if not (even and all(type(key) is _Key for key in keys)) or any(
            type(value) is _Key for value in values
        ):
            self._bad("property list: expected <key> and value by turns in <dict>")
        return dict(zip(map(str, keys), values, strict=True))

    def _number(self, text: str) -> int:
        text = text.strip()
        digits = text.removeprefix("-")
        base = 16 if digits[:2] in ("0x", "0X") else 10
        if base == 16:
            digits = digits[2:]
        if not (digits.isascii() and digits.isalnum() and len(digits) <= 32):
            self._bad(f"property list: expected a number, got {text[:32]!r}")
        try:
            value = int(digits, base)
        except ValueError as error:
            self._bad(f"property list: expected a number, got {text[:32]!r}", cause=error)
        return -value if text[0] == "-" else value

    def _data(self, text: str, is_hex: bool) -> bytes:
        try:
            packed = "".join(text.split())
            return unhexlify(packed) if is_hex else a2b_base64(packed)
        except (Base64Error, ValueError) as error:
            self._bad(f"property list: data: {error}", cause=error)
