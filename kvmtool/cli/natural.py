"""Objects in the form a person reads: pointers by symbol, times as dates, text as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.arithmetic import is_bytes
from kvmtool.as_c import quoted
from kvmtool.cli.render import Address
from kvmtool.errors import FaultError, KvmError
from kvmtool.macho import uuid_text
from kvmtool.object import Object
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    unqualified,
)
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from kvmtool.handle import Kvm
    from kvmtool.types.ctype import CType

_TEXT = Array(Base("char", 1, "char"), None)
_TEXT_LIMIT = 80  # characters shown of what a char * points at
_HEX = ("flag", "mask", "opaque")  # in the names of members that are sets of bits
_BYTES_SHOWN = 32
_EARLIEST = 100_000_000  # seconds: a time before 1973 is a span of time, or nothing
_TIMES = ("time_t", "__darwin_time_t")
_MICROSECONDS = {"tv_usec": 1, "tv_nsec": 1000}


class Natural(NamedTuple):
    """One value: as JSON has it, as the table has it, and what it means where that is more."""

    value: Any
    text: str
    meaning: str | None = None

    def __str__(self) -> str:
        return f"{self.text}  {self.meaning}" if self.meaning else self.text


def missing(fault: FaultError) -> Natural:
    """What stands where a value could not be read."""
    reason = f"{fault.reason} at {fault.address:#x}"
    return Natural(Unreadable(reason), f"? ({reason})")


class Forms:
    """How the values of one kernel are shown; `hexadecimal` is -x."""

    def __init__(self, kvm: Kvm, hexadecimal: bool = False) -> None:
        self._kvm, self._hexadecimal = kvm, hexadecimal
        self.target = kvm.scope.target

    def of(self, found: Object, name: str = "") -> Natural:
        """A number, pointer, enumeration, text, array of these, or bytes; `name` is the member's.

        What cannot be read is `Unreadable`. Raises `KvmError` for what has no value.
        """
        try:
            return self._read(found, name)
        except FaultError as fault:
            return missing(fault)

    def _read(self, found: Object, name: str) -> Natural:
        plain = unqualified(found.type)
        if isinstance(plain, Function) or self._is_code(found):
            return self._pointer(found.address)
        value = found.value()
        if isinstance(plain, Pointer):
            return self._pointer(value, plain)
        if isinstance(plain, Enum):
            known = found.enumerator()
            return Natural(value, f"{known} ({value})" if known else str(value), known)
        if isinstance(plain, Opaque):
            return self._unknown(found, value)
        if isinstance(plain, Array):
            return self._array(found, plain, value, name)
        if isinstance(plain, Compound):
            return Natural(value, "{…}", date_of(found))
        return self._number(found.type, plain, value, name)

    def _is_code(self, found: Object) -> bool:
        """Whether it is a symbol that nothing tells the type of, but that lies in code."""
        return found.type.kind == "unknown" and self._kvm.code_at(found.address).inside

    def _number(self, ctype: CType, plain: CType, value: Any, name: str) -> Natural:
        if isinstance(value, (bool, float)) or not isinstance(plain, Base):
            return Natural(value, str(value).lower())
        meaning = None
        if is_time(ctype):
            meaning = date(value)
        elif is_bytes(plain) and value >= 32 and chr(value & 0xFF).isprintable():
            return Natural(value, f"{self._digits(value, plain.size, name)} {chr(value & 0xFF)!r}")
        return Natural(value, self._digits(value, plain.size, name), meaning)

    def _digits(self, value: int, size: int, name: str = "") -> str:
        if self._hexadecimal or any(word in name.lower() for word in _HEX):
            return f"{value & (1 << 8 * size) - 1:#x}"
        return str(value)

    def _pointer(self, address: int, pointer: Pointer | None = None) -> Natural:
        meaning = self._named(address)
        if meaning is None and pointer is not None and address and is_bytes(pointer.target):
            meaning = self._text_at(address)
        return Natural(Address(address), f"{address:#x}", meaning)

    def _named(self, address: int) -> str | None:
        """`kext:symbol+offset`, or the kext alone; None for an address that is no one's."""
        if not address:
            return None
        code = self._kvm.code_at(address)
        if code.inside:
            return str(code)
        found = self._kvm.symbol_at(address)
        return None if found is None else found.expression

    def _text_at(self, address: int) -> str | None:
        try:
            text = Object(self.target, _TEXT, address).string(_TEXT_LIMIT)
        except KvmError:
            return None
        return quoted(text) if text and text.isprintable() else None

    def _unknown(self, found: Object, data: bytes) -> Natural:
        """Bytes of no known type: a number where that can be, named where it can be an address."""
        if len(data) not in (1, 2, 4, 8):
            return Natural(data.hex(), _bytes(data))
        arch = self._kvm.arch
        order = "little" if arch.byteorder == "<" else "big"
        number = int.from_bytes(data, order)  # type: ignore[arg-type]
        pointer = len(data) == arch.pointer_size
        address = found.cast("void *").value() if pointer else 0
        return Natural(Address(number), f"{number:#x}", self._named(address))

    def _array(self, found: Object, array: Array, value: Any, name: str) -> Natural:
        element = unqualified(array.target)
        if isinstance(value, bytes):
            return _text(found, value, element, name)
        if array.count is None:
            return Natural(None, "{…}", "its length is not known: index it")
        if isinstance(element, Pointer):
            return Natural([Address(item) for item in value], _runs([f"{n:#x}" for n in value]))
        size = element.size or 0
        integers = isinstance(element, (Base, Enum)) and not isinstance(next(iter(value), 0), float)
        words = [
            self._digits(item, size, name) if integers else str(item).lower() for item in value
        ]
        return Natural(value, _runs(words))


def _text(found: Object, data: bytes, element: CType, name: str) -> Natural:
    """An array of char; of unsigned char it is text only where it looks like that."""
    text = found.string()
    length = len(text.encode("utf-8", "surrogateescape"))
    looks = text != "" and text.isprintable() and not data[length:].strip(b"\0")
    if element.name != "unsigned char" or looks:
        return Natural(text, quoted(text))
    meaning = uuid_text(data) if len(data) == 16 and "uuid" in name.lower() else None
    return Natural(data.hex(), _bytes(data), meaning)


def _bytes(data: bytes) -> str:
    if not data.strip(b"\0"):
        return f"{len(data)} bytes of 00"
    more = f" … {len(data)} bytes" if len(data) > _BYTES_SHOWN else ""
    return data[:_BYTES_SHOWN].hex(" ") + more


def _runs(words: list[str]) -> str:
    """The words in braces; what repeats is counted, as gdb does."""
    from itertools import groupby

    parts = []
    for word, same in groupby(words):
        count = sum(1 for _ in same)
        parts += [f"{word} <{count} times>"] if count > 3 else [word] * count
    return "{" + ", ".join(parts) + "}"


def is_time(ctype: CType) -> bool:
    """Whether C calls it a time."""
    for _ in range(16):
        if isinstance(ctype, Typedef) and ctype.name in _TIMES:
            return True
        if not isinstance(ctype, (Typedef, Qualified)):
            return False
        ctype = ctype.target
    return False


def date(seconds: int, micros: int = 0) -> str | None:
    """The time as ISO 8601 in UTC; None for what is no date but a span, or nothing."""
    if not _EARLIEST <= seconds < 1 << 34 or not 0 <= micros < 1_000_000:
        return None
    from kvmtool.xnu.proc import iso_time

    return iso_time((seconds, micros))


def date_of(found: Object) -> str | None:
    """What a struct timeval or timespec says, if it is a date; None for any other structure."""
    plain = unqualified(found.type)
    names = [field.name for field in plain.fields] if isinstance(plain, Compound) else []
    if len(names) != 2 or names[0] != "tv_sec" or names[1] not in _MICROSECONDS:
        return None
    try:
        seconds, fraction = (int(found.member(name or "")) for name in names)
    except FaultError:
        return None
    return date(seconds, fraction // _MICROSECONDS[names[1]])
