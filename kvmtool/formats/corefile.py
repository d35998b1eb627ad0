"""The file into which a panicking XNU writes logs and cores on its own disk.

A header of one of three kinds (`osfmk/mach_debug/mach_debug_types.h`), all little-endian:
"Sad Mac" (xnu 3247, 10.11), "Rad Mac" (4570, 10.13) and "Boss Mac" (8019, macOS 12), then the panic
log, then the members, of which "kernel" is the core of the kernel itself. The file is preallocated
and may be longer than what is in it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FormatError, UnsupportedError
from kvmtool.source import FileSource, SliceSource

if TYPE_CHECKING:
    from kvmtool.source import Source

SIGNATURES = {b"Sad Mac\0": 0, b"Rad Mac\0": 1, b"Boss Mac": 2}

# osfmk/mach_debug/mach_debug_types.h
HEADER_FLAG_LOG_ENCRYPTED_AEA = 1 << 0
FLAG_ENCRYPTED_AEA = 1 << 0
FLAG_COMPRESSED_ZLIB = 1 << 8
FLAG_COMPRESSED_LZ4 = 1 << 9
_KNOWN_FLAGS = FLAG_ENCRYPTED_AEA | FLAG_COMPRESSED_ZLIB | FLAG_COMPRESSED_LZ4

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_LOG = 64 << 20  # bytes; XNU's buffers for it are under 1 MiB


class CorefileMember(NamedTuple):
    """A file inside: `length` bytes at `offset`, as stored.

    `stage` is what they went through: "gzip", "lz4", "stored" or "aea" (encrypted, whatever else);
    `flags` are version 2's own, else 0.
    """

    name: str
    offset: int
    length: int
    stage: str
    flags: int = 0


class Corefile:
    """An on-disk corefile, version 0, 1 or 2. Does not own its source."""

    name = "corefile"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """Whether a file that begins with `head` is a corefile."""
        return head[:8] in SIGNATURES

    def __init__(self, source: Source) -> None:
        """Read and check the header. Raises `FormatError`."""
        self.source = source
        signature = source.read_at(0, min(8, source.size))
        if signature not in SIGNATURES:
            raise self._error(0, f"signature: expected Sad, Rad or Boss Mac, got {signature!r}")
        self.version = SIGNATURES[signature]
        layout = _layouts()[self.version]
        header = layout.header.parse(source.read_at(0, layout.header.sizeof()))
        self.flags = int(header.get("flags", 0))
        self.log_offset = int(header.log_offset)
        self.log_length = int(header.log_length)
        if self.version == 2:
            self._check_boss(header)
        entries = self._entries(header, layout)
        self.members = tuple(self._member(entry) for entry in entries)
        self._check_places(layout)

    def log(self) -> bytes:
        """The text of the panic log and of the writer's own log, without the padding.

        Raises `UnsupportedError` if it is encrypted.
        """
        if self.flags & HEADER_FLAG_LOG_ENCRYPTED_AEA:
            raise self._encrypted("the panic log")
        if not self.log_length:
            return b""
        return self.source.read_at(self.log_offset, self.log_length).strip(b"\0")

    def kernel_member(self) -> CorefileMember:
        """The core of the kernel. Raises `FormatError` that lists what is there instead."""
        for member in self.members:
            if member.name == "kernel":
                return member
        there = ", ".join(repr(member.name) for member in self.members) or "no member at all"
        raise self._error(0, f"expected a member 'kernel', got {there}")

    def open_member(self, member: CorefileMember) -> Source:
        """The decoded bytes of `member`; the source of the corefile must stay open.

        Raises `UnsupportedError` for what is encrypted, `FormatError` for what is not what the
        header says. Offsets in messages about the member count from its own beginning.
        """
        if member.flags & ~_KNOWN_FLAGS:
            raise UnsupportedError(
                f"{self.source.name}: member {member.name!r} has unknown flags {member.flags:#x}"
            )
        if member.stage == "aea":
            raise self._encrypted(f"member {member.name!r}")
        name = f"{self.source.name}({member.name})"
        stored = SliceSource(self.source, member.offset, member.length, name)
        if member.stage == "gzip":
            from kvmtool.gzip_source import GzipSource

            return GzipSource(stored, self.source if isinstance(self.source, FileSource) else None)
        if member.stage == "lz4":
            from kvmtool.lz4_source import Lz4Source

            return Lz4Source(stored)
        return stored

    def _entries(self, header: Any, layout: _Layout) -> list[Any]:
        """The header's records of members."""
        if layout.record is None:  # version 0: one member, in the header, absent if all zero
            return [header] if header.offset or header.length else []
        if header.num_files > layout.room:
            raise self._error(
                layout.count_at, f"expected at most {layout.room} members, got {header.num_files}"
            )
        start, size = layout.header.sizeof(), layout.record.sizeof()
        table = self.source.read_at(start, header.num_files * size)
        return [layout.record.parse(table[at : at + size]) for at in range(0, len(table), size)]

    def _member(self, entry: Any) -> CorefileMember:
        raw = bytes(entry.get("name", b"kernel"))
        name = raw.partition(b"\0")[0].decode("latin-1").encode("unicode_escape").decode("ascii")
        flags = int(entry.get("flags", 0)) if self.version == 2 else 0
        offset, length = int(entry.offset), int(entry.length)
        if self.version < 2:
            # gzip unless the kernel was told DB_DISABLE_GZIP_CORE (osfmk/kern/debug.h)
            gzip = self._starts_with_gzip(offset)
            return CorefileMember(name, offset, length, "gzip" if gzip else "stored")
        if flags & FLAG_COMPRESSED_ZLIB and flags & FLAG_COMPRESSED_LZ4:
            raise self._error(None, f"member {name!r} is both zlib and LZ4 (flags {flags:#x})")
        stage = "stored"
        if flags & FLAG_ENCRYPTED_AEA:
            stage = "aea"
        elif flags & FLAG_COMPRESSED_ZLIB:
            stage = "gzip"
        elif flags & FLAG_COMPRESSED_LZ4:
            stage = "lz4"
        return CorefileMember(name, offset, length, stage, flags)

    def _starts_with_gzip(self, offset: int) -> bool:
        return offset + 2 <= self.source.size and self.source.read_at(offset, 2) == _GZIP_MAGIC

    def _check_boss(self, header: Any) -> None:
        if header.version != 2:
            raise self._error(8, f"version: expected 0x2, got {header.version:#x}")
        end = header.pub_key_offset + header.pub_key_length
        if header.pub_key_length and end > self.source.size:
            raise self._error(24, f"public key ends at {end:#x}, the file at {self.source.size:#x}")

    def _check_places(self, layout: _Layout) -> None:
        """Everything lies in the file, behind the header, and nothing on top of another."""
        size = layout.record.sizeof() if layout.record is not None else 0
        start = layout.header.sizeof()
        places = [
            (
                member.offset,
                member.length,
                f"member {member.name!r}",
                layout.table_at + size * index,
            )
            for index, member in enumerate(self.members)
        ]
        if self.log_length:
            places.append((self.log_offset, self.log_length, "panic log", layout.log_at))
        if self.log_length > _MAX_LOG:
            raise self._error(
                layout.log_at, f"panic log: expected {_MAX_LOG:#x} bytes, got {self.log_length:#x}"
            )
        before, end = "header", start + size * len(self.members)
        for offset, length, what, claim in sorted(places):
            if not length:
                raise self._error(claim, f"{what} at {offset:#x} has no bytes")
            if offset < end:
                raise self._error(claim, f"{what} at {offset:#x} lies over the {before}")
            before, end = what, offset + length
            if end > self.source.size:
                raise self._error(
                    claim, f"{what} ends at {end:#x}, the file at {self.source.size:#x}"
                )

    def _error(self, offset: int | None, message: str) -> FormatError:
        return FormatError(self.source.name, offset, f"corefile: {message}")

    def _encrypted(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.source.name}: {what} is encrypted (AEA): it can be read only after decryption "
            "with the private key that belongs to the key the Mac was given"
        )


class _Layout(NamedTuple):
    header: Any
    record: Any  # of a member; None: it is in the header
    room: int  # for that many members
    table_at: int  # offsets in the file, for messages
    count_at: int
    log_at: int


@cache
def _layouts() -> tuple[_Layout, _Layout, _Layout]:
    """The records of version 0, 1 and 2."""
    from construct import Bytes, Int16ul, Int32ul, Int64ul, Padding, Struct

    log = "log_offset" / Int64ul, "log_length" / Int64ul
    place = "offset" / Int64ul, "length" / Int64ul
    named = (*place, "name" / Bytes(16))
    sad = Struct("signature" / Bytes(8), *log, *place)
    rad = Struct("signature" / Bytes(8), *log, "num_files" / Int64ul)
    boss = Struct(  # aligned as the compiler does: the diagram in the header hides the gaps
        "signature" / Bytes(8),
        "version" / Int32ul,
        Padding(4),
        "flags" / Int64ul,
        "pub_key_offset" / Int64ul,
        "pub_key_length" / Int16ul,
        Padding(6),
        *log,
        "num_files" / Int64ul,
    )
    return (
        _Layout(sad, None, 1, table_at=24, count_at=24, log_at=8),
        _Layout(rad, Struct(*named), 16, table_at=32, count_at=24, log_at=8),
        _Layout(boss, Struct("flags" / Int64ul, *named), 64, table_at=64, count_at=56, log_at=40),
    )
