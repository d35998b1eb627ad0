"""MH_CORE: the cores XNU writes at a panic, from 10.4 to macOS 15, and lldb's.

Every writer left its traps: segments that overlap, that lie beyond the end of the file, that are
not sorted, command counts that overstate. Source: osfmk/kdp/ml/i386/kdp_vm.c (xnu-792..1699),
kdp_x86_common.c (2050..2782), osfmk/kdp/kdp_core.c and processor_core.c (3247..11417).
"""

from __future__ import annotations

import sys
from array import array
from itertools import repeat
from operator import add
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool import macho
from kvmtool.errors import FormatError
from kvmtool.formats import Facts, Note, Run, Thread
from kvmtool.macho import MachO
from kvmtool.memory import RunMemory
from kvmtool.segment_table import segment_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

_FILETYPE = {order: Struct(order + "I") for order in "<>"}
_UNKNOWN = (1 << 64) - 1  # "main bin spec": all ones is not known
_WRAP = 1 << 32
_KERNEL = 1  # "main bin spec" type
_LAST = (1 << 64) - 1  # the last address
_NOTE_LIMIT = 1 << 20  # bytes; the longest note XNU writes is under 300
_VERSION_SIZE = 256

_AT_ONCE = 1 << 16  # elements of a column


class MachOCore:
    """A Mach-O kernel core."""

    name = "macho-core"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        magic = macho.MAGICS.get(head[:4])
        if magic is None or len(head) < 16:
            return False
        return bool(_FILETYPE[magic[0]].unpack_from(head, 12)[0] == macho.MH_CORE)

    def __init__(self, source: Source) -> None:
        """Read header, segment table, threads and notes. Raises `FormatError`."""
        self.source = source
        self.container: Any = None
        self.macho = MachO(source)
        if self.macho.filetype != macho.MH_CORE:
            raise FormatError(
                source.name, 12, f"filetype {self.macho.filetype:#x}, expected 0x4 (MH_CORE)"
            )
        self.warnings: list[str] = []
        self._table = segment_table(self.macho)
        if not self.macho.is64 and source.size > _WRAP:
            self._unwrap()
        self.warnings += self.macho.warnings
        self.lost = self._clip()
        self.notes = tuple(Note(*note) for note in self.macho.notes)
        self.facts = self._facts()

    def _unwrap(self) -> None:
        # kern_dump() of 32-bit kernels counts file offsets in 32 bits (kdp_x86_common.c): past
        # 4 GiB they start again at 0, while the segments still follow each other in the file.
        carry = before = 0
        for index, fileoff in enumerate(self._table.fileoff):
            if fileoff < before:
                carry += _WRAP
            before = fileoff
            self._table.fileoff[index] = fileoff + carry

    def _clip(self) -> list[tuple[int, int]]:
        """Cut what lies past the end of the file off the table; returns the addresses lost."""
        size = self.source.size
        lost: list[tuple[int, int]] = []
        table = self._table
        largest = max(table.filesize, default=0)
        if (
            table.filesize == table.vmsize
            and max(table.fileoff, default=0) + largest <= size
            and max(table.vmaddr, default=0) + largest <= 1 << 64
        ):
            return lost
        columns = zip(table.vmaddr, table.vmsize, table.fileoff, table.filesize, strict=True)
        for index, (vmaddr, vmsize, fileoff, filesize) in enumerate(columns):
            held = min(filesize, vmsize)
            if fileoff + held > size:
                held = max(0, size - fileoff)
            if held != filesize:
                table.filesize[index] = held
            if held < vmsize:
                lost.append((vmaddr + held, vmaddr + vmsize))
            if vmaddr + held > 1 << 64:
                raise FormatError(
                    self.source.name,
                    None,
                    f"segment {index}: vmaddr {vmaddr:#x} + {held:#x} leaves the address space",
                )
        if lost:
            missing = sum(end - start for start, end in lost)
            self.warnings.append(
                f"{len(lost)} of {len(table.vmaddr)} segments end past the end of the file: "
                f"{missing:#x} bytes of memory are absent"
            )
        return lost

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`."""
        table = self._table
        for vmaddr, fileoff, size in zip(table.vmaddr, table.fileoff, table.filesize, strict=True):
            yield Run("virtual", vmaddr, size, fileoff)

    def virtual(self) -> RunMemory:
        """The kernel's address space: where segments overlap the first in the file wins."""
        table = self._table
        if max(table.vmaddr, default=0) + max(table.filesize, default=0) <= _LAST:
            ends = _sums(table.vmaddr, table.filesize)
        else:
            # no array holds the number 2^64: of a segment that ends there the last byte is given up
            ends = array("Q", map(min, map(add, table.vmaddr, table.filesize), repeat(_LAST)))
        return RunMemory(self.source, table.vmaddr, ends, table.fileoff, lost=self.lost)

    def physical(self) -> None:
        """See `Format.physical`: a kernel core holds the kernel's address space alone."""

    # threads and notes

    def _facts(self) -> Facts:
        facts: dict[str, Any] = {"threads": tuple(self._threads())}
        said: dict[str, str] = {}
        for command in self.macho.commands(macho.LC_IDENT):
            text = command.data[8 : 8 + _VERSION_SIZE]
            self._take(facts, said, parse_version_string(text), "LC_IDENT")
        for note in self.notes:
            reader = _NOTE_READERS.get(note.owner)
            if reader is not None:
                where = f'LC_NOTE "{note.owner}"'
                self._take(facts, said, reader(self, note), where)
        return Facts(self.macho.cputype, self.macho.cpusubtype, **facts, said=said)

    @staticmethod
    def _take(
        facts: dict[str, Any], said: dict[str, str], found: dict[str, Any], where: str
    ) -> None:
        for name, value in found.items():
            if name not in facts:
                facts[name] = value
                said[name] = where

    def _threads(self) -> Iterator[Thread]:
        pair = Struct(self.macho.byteorder + "II")
        for command in self.macho.commands(macho.LC_THREAD, macho.LC_UNIXTHREAD):
            states = []
            at = 8
            while at + 8 <= command.cmdsize:
                flavor, count = pair.unpack_from(command.data, at)
                end = at + 8 + count * 4
                if end > command.cmdsize:
                    self.warnings.append(
                        f"LC_THREAD at offset {command.offset:#x}: flavor {flavor:#x} has count "
                        f"{count:#x}, expected at most {(command.cmdsize - at - 8) // 4:#x}"
                    )
                    break
                states.append((flavor, command.data[at + 8 : end]))
                at = end
            yield Thread(tuple(states))

    def note(self, note: Note) -> bytes:
        """The payload of a note; empty, with a warning, when the file does not hold it."""
        size = min(note.size, _NOTE_LIMIT)
        if note.offset + size > self.source.size:
            self.warnings.append(
                f'LC_NOTE "{note.owner}": {note.size:#x} bytes at offset {note.offset:#x} lie past '
                f"the end of the file"
            )
            return b""
        return self.source.read_at(note.offset, size)

    def _record(self, name: str, data: bytes, note: Note) -> Any:
        from kvmtool import macho_records

        return macho_records.parse(name, self.macho.byteorder, data, self.source, note.offset)

    def _main_bin_spec(self, note: Note) -> dict[str, Any]:
        data = self.note(note)
        version = self._version_of(data)
        if version not in (1, 2):
            return {}
        record = self._record(f"main bin spec {version}", data, note)
        if record.type != _KERNEL:
            return {}
        found: dict[str, Any] = {}
        if any(record.uuid):
            found["uuid"] = record.uuid
        if record.address != _UNKNOWN:
            found["kernel_address"] = record.address
        elif version == 2 and record.slide != _UNKNOWN:
            found["slide"] = record.slide
        return found

    def _version_of(self, data: bytes) -> int:
        return _FILETYPE[self.macho.byteorder].unpack_from(data)[0] if len(data) >= 4 else 0

    def _kern_ver_str(self, note: Note) -> dict[str, Any]:
        return parse_version_string(self.note(note)[4:])

    def _addrable_bits(self, note: Note) -> dict[str, Any]:
        data = self.note(note)
        version = self._version_of(data)
        if version == 3:
            bits = self._record("addrable bits 3", data, note).bits
        elif version == 4:
            bits = self._record("addrable bits 4", data, note).high_bits
        else:
            return {}
        return {"va_bits": bits} if 32 <= bits <= 64 else {}

    def _load_binary(self, note: Note) -> dict[str, Any]:
        data = self.note(note)
        if self._version_of(data) != 1:
            return {}
        record = self._record("load binary", data, note)
        if record.name.split(b"\0")[0] != b"xnu":
            return {}
        found = {"uuid": record.uuid}
        if record.address != _UNKNOWN:
            found["kernel_address"] = record.address
        return found


_NOTE_READERS = {
    "main bin spec": MachOCore._main_bin_spec,
    "kern ver str": MachOCore._kern_ver_str,
    "addrable bits": MachOCore._addrable_bits,
    "load binary": MachOCore._load_binary,
}


def _sums(some: array[int], others: array[int]) -> array[int]:
    """The sums of two columns none of which reaches 2^64: additions of two long numbers.

    Without a carry from one element into the next they are the sums of the elements.
    """
    found = array("Q")
    for start in range(0, len(some), _AT_ONCE):
        parts = (column[start : start + _AT_ONCE].tobytes() for column in (some, others))
        first, second = (int.from_bytes(part, sys.byteorder) for part in parts)
        size = 8 * min(_AT_ONCE, len(some) - start)
        found.frombytes((first + second).to_bytes(size, sys.byteorder))
    return found


def parse_version_string(text: bytes) -> dict[str, Any]:
    """The facts in kdp_kernelversion_string: "<banner>; UUID=<uuid>; stext=0x<hex>", NUL padded.

    stext stands there only when the kernel is slid (osfmk/kdp/kdp_udp.c, xnu-2050..11417).
    """
    whole = text.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    found: dict[str, Any] = {}
    banner = whole
    for mark, name in (("; stext=", "kernel_address"), ("; UUID=", "uuid")):
        banner, found_mark, rest = banner.partition(mark)
        value = rest.split(";")[0].strip()
        if found_mark:
            parsed = _hex_number(value) if name == "kernel_address" else _uuid_bytes(value)
            if parsed is not None:
                found[name] = parsed
    if banner:
        found["version"] = banner.strip()
    return found


def _hex_number(text: str) -> int | None:
    try:
        number = int(text, 16)
    except ValueError:
        return None
    return number if 0 <= number <= _LAST else None


def _uuid_bytes(text: str) -> bytes | None:
    try:
        raw = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        return None
    return raw if len(raw) == 16 and any(raw) else None
