"""Mach-O over a `Source`: header, load commands, segments, sections, notes, threads, symbol table.

Thin files of either word size and byte order. The parser believes no number before it has checked
it, and reads nothing that is not asked for: a kernel opens with two reads, a core with a million
segments with two reads and a few bulk operations on arrays.

The records met once are declared with construct in `macho_records`; here are the `struct` twins of
the few that stand on the way of every command (a test holds both, and macholib's, against each
other). Source: EXTERNAL_HEADERS/mach-o/loader.h, xnu-11417.121.6.
"""

from __future__ import annotations

from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.nlist import NlistTable
    from kvmtool.source import Source

# mach-o/loader.h: the four magics as the file's first bytes -> (byte order, 64-bit)
MAGICS = {
    b"\xce\xfa\xed\xfe": ("<", False),
    b"\xcf\xfa\xed\xfe": ("<", True),
    b"\xfe\xed\xfa\xce": (">", False),
    b"\xfe\xed\xfa\xcf": (">", True),
}

MH_OBJECT, MH_EXECUTE, MH_CORE, MH_DSYM, MH_KEXT_BUNDLE, MH_FILESET = 1, 2, 4, 0xA, 0xB, 0xC
VM_PROT_READ, VM_PROT_WRITE, VM_PROT_EXECUTE = 1, 2, 4  # mach/vm_prot.h

LC_REQ_DYLD = 0x80000000
LC_SEGMENT, LC_SYMTAB, LC_THREAD, LC_UNIXTHREAD, LC_IDENT = 0x1, 0x2, 0x4, 0x5, 0x8
LC_DYSYMTAB, LC_SEGMENT_64, LC_UUID, LC_SOURCE_VERSION = 0xB, 0x19, 0x1B, 0x2A
LC_NOTE, LC_BUILD_VERSION = 0x31, 0x32

# mach/machine.h
CPU_ARCH_ABI64, CPU_ARCH_ABI64_32 = 0x01000000, 0x02000000
CPU_TYPE_I386, CPU_TYPE_ARM, CPU_TYPE_POWERPC = 7, 12, 18
CPU_TYPE_X86_64 = CPU_TYPE_I386 | CPU_ARCH_ABI64
CPU_TYPE_ARM64 = CPU_TYPE_ARM | CPU_ARCH_ABI64
CPU_TYPE_POWERPC64 = CPU_TYPE_POWERPC | CPU_ARCH_ABI64
CPU_SUBTYPE_MASK = 0x00FFFFFF  # the rest are capability bits (arm64e pointer-auth ABI version)
CPU_SUBTYPE_ARM64E = 2

# `struct` twins of macho_records, by byte order and word size
_COMMAND = {order: Struct(order + "II") for order in "<>"}
_HEADER = {order: Struct(order + "7I") for order in "<>"}
_SEGMENT = {
    (order, wide): Struct(order + ("II16s4Q4I" if wide else "II16s4I4I"))
    for order in "<>"
    for wide in (False, True)
}
_SECTION = {
    (order, wide): Struct(order + ("16s16s2Q8I" if wide else "16s16s2I7I"))
    for order in "<>"
    for wide in (False, True)
}
_SYMTAB = {order: Struct(order + "6I") for order in "<>"}

SECTION_TYPE = 0x000000FF
S_ZEROFILL, S_GB_ZEROFILL, S_THREAD_LOCAL_ZEROFILL = 0x1, 0xC, 0x12
_ZEROFILL = frozenset((S_ZEROFILL, S_GB_ZEROFILL, S_THREAD_LOCAL_ZEROFILL))
BULK = 8  # this many commands of one shape in a row are worth an array


class CommandRun(NamedTuple):
    """`repeats` commands of one cmd and cmdsize in a row, the first at file offset `offset`."""

    cmd: int
    cmdsize: int
    offset: int
    repeats: int


class LoadCommand(NamedTuple):
    """One load command: its file offset and its `cmdsize` bytes, all of them."""

    cmd: int
    cmdsize: int
    offset: int
    data: bytes


class Segment(NamedTuple):
    """LC_SEGMENT or LC_SEGMENT_64. Sizes in bytes; `fileoff` counts from the Mach-O's start."""

    segname: str
    vmaddr: int
    vmsize: int
    fileoff: int
    filesize: int
    maxprot: int
    initprot: int
    nsects: int
    flags: int
    offset: int


class Section(NamedTuple):
    """A section. `segname` is its final segment, which in an MH_OBJECT is not its LC_SEGMENT's."""

    sectname: str
    segname: str
    addr: int
    size: int
    offset: int
    align: int
    reloff: int
    nreloc: int
    flags: int

    @property
    def zerofill(self) -> bool:
        """Whether the section has no bytes in the file."""
        return self.flags & SECTION_TYPE in _ZEROFILL


class Note(NamedTuple):
    """LC_NOTE: `size` bytes at file offset `offset`, owned by `owner`."""

    owner: str
    offset: int
    size: int


class MachO:
    """A thin Mach-O file (or its image elsewhere: the source decides where bytes come from)."""

    def __init__(self, source: Source) -> None:
        """Read the header. Raises `FormatError` or `TruncatedError` naming file and offset."""
        self.source = source
        magic = source.read_at(0, min(4, source.size))
        if magic not in MAGICS:
            raise FormatError(
                source.name, 0, f"expected a Mach-O magic, got {magic.hex() or 'nothing'}"
            )
        self.byteorder, self.is64 = MAGICS[magic]
        header = source.read_at(0, self.header_size)
        (
            _,
            self.cputype,
            self.cpusubtype,
            self.filetype,
            self.ncmds,
            self.sizeofcmds,
            self.flags,
        ) = _HEADER[self.byteorder].unpack_from(header)
        self.warnings: list[str] = []

    @property
    def header_size(self) -> int:
        """Bytes of the mach_header: 28, or 32 in a 64-bit file."""
        return 32 if self.is64 else 28

    def __repr__(self) -> str:
        return f"<MachO {self.source.name} filetype={self.filetype:#x} cputype={self.cputype:#x}>"

    # load commands

    def command_bytes(self) -> memoryview | bytes:
        """The load commands as they stand in the file; a view of it where it is mapped.

        Not to be kept. Raises `FormatError` where they cannot be as many or as long as it says.
        """
        if self.ncmds * 8 > self.sizeofcmds:
            raise self._bad(
                16, f"ncmds {self.ncmds:#x} cannot fit in sizeofcmds {self.sizeofcmds:#x}"
            )
        left = self.source.size - self.header_size
        if self.sizeofcmds > left:
            raise TruncatedError(
                self.source.name, self.header_size, self.sizeofcmds, left, "load commands"
            )
        view = getattr(self.source, "view", self.source.read_at)
        found: memoryview | bytes = view(self.header_size, self.sizeofcmds)
        return found

    @cached_property
    def command_runs(self) -> list[CommandRun]:
        """All load commands, equal shapes in a row as one. Every cmdsize has been checked."""
        data, end = self.command_bytes(), self.sizeofcmds
        unpack = _COMMAND[self.byteorder].unpack_from
        runs: list[CommandRun] = []
        at, seen = 0, 0
        while seen < self.ncmds:
            if at + 8 > end:
                self._commands_end_early(seen, at)
                break
            cmd, cmdsize = unpack(data, at)
            if cmd == 0 and cmdsize == 0:
                self._commands_end_early(seen, at)
                break
            if cmdsize < 8 or at + cmdsize > end:
                raise self._bad(
                    self.header_size + at,
                    f"load command {seen} (cmd {cmd:#x}): cmdsize {cmdsize:#x}, "
                    f"expected 0x8 to {end - at:#x}",
                )
            count = 1
            if cmd in (LC_SEGMENT, LC_SEGMENT_64):
                count = _same_shape(data, at, cmdsize, self.ncmds - seen)
            runs.append(CommandRun(cmd, cmdsize, self.header_size + at, count))
            at += count * cmdsize
            seen += count
        return runs

    def _commands_end_early(self, seen: int, at: int) -> None:
        # kern_dump() of xnu-792..1699 counts commands it had no room to write (kdp_vm.c), and tools
        # that add a command may write it into a section that is zeroed later: where the rest is
        # zeros, what stands before it holds.
        message = f"ncmds says {self.ncmds:#x}, the load commands end after {seen:#x}"
        rest = self.command_bytes()[at : at + 8]
        if any(rest) or (self.filetype != MH_CORE and len(rest) < 8):
            raise self._bad(self.header_size + at, message)
        self.warnings.append(message)

    def commands(self, *wanted: int) -> Iterator[LoadCommand]:
        """The load commands, or only those whose cmd is one of `wanted`, in file order."""
        data, base = self.command_bytes(), self.header_size
        for run in self.command_runs:
            if wanted and run.cmd not in wanted:
                continue
            for offset in range(run.offset, run.offset + run.repeats * run.cmdsize, run.cmdsize):
                body = bytes(data[offset - base : offset - base + run.cmdsize])
                yield LoadCommand(run.cmd, run.cmdsize, offset, body)

    # segments and sections

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in file order."""
        return tuple(self._segment(command) for command in self.commands(LC_SEGMENT, LC_SEGMENT_64))

    def _segment(self, command: LoadCommand) -> Segment:
        wide = command.cmd == LC_SEGMENT_64
        layout = _SEGMENT[self.byteorder, wide]
        if command.cmdsize < layout.size:
            raise self._bad(
                command.offset, f"segment: cmdsize {command.cmdsize:#x}, expected {layout.size:#x}"
            )
        fields = layout.unpack_from(command.data)
        return Segment._make((_name(fields[2]), *fields[3:], command.offset))

    def segment(self, segname: str) -> Segment | None:
        """The first segment of that name."""
        return next((s for s in self.segments if s.segname == segname), None)

    def segment_at(self, address: int) -> Segment | None:
        """The segment whose link addresses hold `address`."""
        inside = (s for s in self.segments if s.vmaddr <= address < s.vmaddr + s.vmsize)
        return next(inside, None)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections of all segments; an nlist's n_sect counts them from 1."""
        found: list[Section] = []
        for command in self.commands(LC_SEGMENT, LC_SEGMENT_64):
            wide = command.cmd == LC_SEGMENT_64
            nsects = self._segment(command).nsects
            start, layout = _SEGMENT[self.byteorder, wide].size, _SECTION[self.byteorder, wide]
            if start + nsects * layout.size > command.cmdsize:
                raise self._bad(
                    command.offset,
                    f"segment: nsects {nsects:#x} cannot fit in cmdsize {command.cmdsize:#x}",
                )
            for index in range(nsects):
                fields = layout.unpack_from(command.data, start + index * layout.size)
                found.append(Section._make((_name(fields[0]), _name(fields[1]), *fields[2:9])))
        return tuple(found)

    # single commands

    def _first(self, *wanted: int) -> LoadCommand | None:
        return next(self.commands(*wanted), None)

    @cached_property
    def uuid(self) -> bytes | None:
        """The 16 bytes of LC_UUID."""
        command = self._first(LC_UUID)
        if command is None:
            return None
        if command.cmdsize != 24:
            raise self._bad(command.offset, f"LC_UUID: cmdsize {command.cmdsize:#x}, expected 0x18")
        return command.data[8:24]

    @cached_property
    def symtab(self) -> NlistTable | None:
        """The symbol table of LC_SYMTAB, checked against the file's size; None without one."""
        command = self._first(LC_SYMTAB)
        if command is None:
            return None
        from kvmtool.nlist import NlistTable

        layout = _SYMTAB[self.byteorder]
        if command.cmdsize != layout.size:
            raise self._bad(
                command.offset, f"LC_SYMTAB: cmdsize {command.cmdsize:#x}, expected 0x18"
            )
        _, _, symoff, nsyms, stroff, strsize = layout.unpack(command.data)
        return NlistTable(self.source, symoff, nsyms, stroff, strsize, self.byteorder, self.is64)

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """The LC_NOTEs, in file order."""
        found = []
        for command in self.commands(LC_NOTE):
            fields = self.record("note_command", command)
            owner = fields.data_owner.split(b"\0")[0].decode("utf-8", "backslashreplace")
            found.append(Note(owner, fields.offset, fields.size))
        return tuple(found)

    def record(self, name: str, command: LoadCommand) -> Any:
        """`command` parsed by the construct record `name` of `macho_records`.

        Raises `FormatError` with the command's offset when it does not fit.
        """
        from kvmtool import macho_records

        return macho_records.parse(name, self.byteorder, command.data, self.source, command.offset)

    def _bad(self, offset: int, message: str) -> FormatError:
        return FormatError(self.source.name, offset, message)


def _same_shape(data: memoryview | bytes, at: int, cmdsize: int, most: int) -> int:
    """How many commands from `at` on have the cmd and cmdsize of the first (1 to `most`)."""
    most = min(most, (len(data) - at) // cmdsize)
    word = bytes(data[at : at + 8])
    if most < BULK or cmdsize % 8:
        count = 1
        while count < most and data[at + count * cmdsize : at + count * cmdsize + 8] == word:
            count += 1
        return count
    heads = memoryview(data)[at : at + most * cmdsize].cast("Q")[:: cmdsize // 8].tobytes()
    if heads == word * most:
        return most
    return next(n for n in range(most) if heads[8 * n : 8 * n + 8] != word)


def _name(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def is_macho(head: bytes) -> bool:
    """Whether `head` (a file's first bytes) begins like a thin Mach-O file."""
    return head[:4] in MAGICS


def arch_name(cputype: int, cpusubtype: int) -> str:
    """The name Apple's tools give the machine: i386, x86_64, ppc, ppc64, arm, arm64, arm64e."""
    subtype = cpusubtype & CPU_SUBTYPE_MASK
    if cputype == CPU_TYPE_ARM64 and subtype == CPU_SUBTYPE_ARM64E:
        return "arm64e"
    return {
        CPU_TYPE_I386: "i386",
        CPU_TYPE_X86_64: "x86_64",
        CPU_TYPE_POWERPC: "ppc",
        CPU_TYPE_POWERPC64: "ppc64",
        CPU_TYPE_ARM: "arm",
        CPU_TYPE_ARM64: "arm64",
        CPU_TYPE_ARM | CPU_ARCH_ABI64_32: "arm64_32",
    }.get(cputype, f"cputype-{cputype:#x}")


def uuid_text(uuid: bytes | None) -> str:
    """A UUID as Apple's tools print it."""
    if uuid is None:
        return "no UUID"
    digits = uuid.hex().upper()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
