"""Thin Mach-O files, written from <mach-o/loader.h> and <mach-o/nlist.h> alone.

A `MachO` is a list of load commands in file order. Payloads (segments, symbol tables, notes) are
given file offsets by `MachO.build`; everything that real and hostile files get wrong (offsets
past the end, overlapping segments, an overstated ncmds, raw commands) can be asked for.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MH_OBJECT, MH_EXECUTE, MH_CORE, MH_DSYM, MH_KEXT_BUNDLE = 1, 2, 4, 10, 11
MH_NOUNDEFS, MH_DYLDLINK, MH_PIE = 0x1, 0x4, 0x200000

LC_SEGMENT, LC_SYMTAB, LC_THREAD, LC_UNIXTHREAD, LC_IDENT, LC_DYSYMTAB = 1, 2, 4, 5, 8, 0xB
LC_SEGMENT_64, LC_UUID, LC_SOURCE_VERSION = 0x19, 0x1B, 0x2A
LC_NOTE, LC_BUILD_VERSION = 0x31, 0x32

S_ZEROFILL = 1
N_STAB, N_PEXT, N_TYPE, N_EXT = 0xE0, 0x10, 0x0E, 0x01
N_UNDF, N_ABS, N_SECT = 0x0, 0x2, 0xE


class Machine(NamedTuple):
    """A CPU as Mach-O sees it: `width` is bytes per pointer, `order` struct's byte order mark."""

    cputype: int
    cpusubtype: int
    width: int
    order: str
    page: int


# <mach/machine.h>
MACHINES = {
    "i386": Machine(7, 3, 4, "<", 0x1000),
    "x86_64": Machine(0x01000007, 3, 8, "<", 0x1000),
    "ppc": Machine(18, 0, 4, ">", 0x1000),
    "ppc64": Machine(0x01000012, 0, 8, ">", 0x1000),
    "arm": Machine(12, 9, 4, "<", 0x1000),
    "arm64": Machine(0x0100000C, 0, 8, "<", 0x4000),
    "arm64e": Machine(0x0100000C, 2, 8, "<", 0x4000),
}

# The register words of the first flavor of each machine, in order (<mach/*/thread_status.h>).
_X86 = [
    "eax",
    "ebx",
    "ecx",
    "edx",
    "edi",
    "esi",
    "ebp",
    "esp",
    "ss",
    "eflags",
    "eip",
    "cs",
    "ds",
    "es",
    "fs",
    "gs",
]
_X64 = ["rax", "rbx", "rcx", "rdx", "rdi", "rsi", "rbp", "rsp"] + [f"r{n}" for n in range(8, 16)]
_X64 += ["rip", "rflags", "cs", "fs", "gs"]
_ARM64 = [f"x{n}" for n in range(29)] + ["fp", "lr", "sp", "pc"]
_PPC = ["srr0", "srr1"] + [f"r{n}" for n in range(32)] + ["cr", "xer", "lr", "ctr", "mq", "vrsave"]
_STATES = {
    "i386": (1, "I", _X86, ()),
    "x86_64": (4, "Q", _X64, ()),
    "arm64": (6, "Q", _ARM64, ("cpsr", "flags")),
    "arm64e": (6, "Q", _ARM64, ("cpsr", "flags")),
    "ppc": (1, "I", _PPC, ()),
}


class Sym(NamedTuple):
    """One nlist entry."""

    name: str
    n_value: int
    n_type: int = N_SECT | N_EXT
    n_sect: int = 1
    n_desc: int = 0


class Section(NamedTuple):
    """One section; its file offset follows from its segment's unless S_ZEROFILL."""

    sectname: str
    segname: str
    addr: int
    size: int
    flags: int = 0
    align: int = 4
    reloff: int = 0
    nreloc: int = 0


class _Command(NamedTuple):
    """`pack(fileoff, slide)` gives the `size` bytes of the command whose payload is there."""

    size: int
    pack: Callable[[int, int], bytes]
    payload: bytes | None = None
    fileoff: int | None = None  # where the command says; None: where the payload is put
    late: bool = False  # payload after those of all segments
    shares: bool = False  # the payload is that of the command before


def up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def name16(name: str) -> bytes:
    """char[16], not terminated when it is full."""
    return name.encode().ljust(16, b"\0")


def thread_state(arch: str, **registers: int) -> bytes:
    """{flavor, count, registers}: the body of an LC_THREAD with one state; others are zero."""
    flavor, word, names, tail = _STATES[arch]
    unknown = registers.keys() - set(names) - set(tail)
    if unknown:
        raise ValueError(f"{arch} has no register {', '.join(sorted(unknown))}")
    order = MACHINES[arch].order
    state = struct.pack(f"{order}{len(names)}{word}", *(registers.get(n, 0) for n in names))
    state += struct.pack(f"{order}{len(tail)}I", *(registers.get(n, 0) for n in tail))
    return struct.pack(f"{order}2I", flavor, len(state) // 4) + state


def symbol_table(machine: Machine, symbols: Sequence[Sym]) -> tuple[bytes, bytes]:
    """(nlist entries, string table) of `symbols` in the order given; fast for many."""
    names = [symbol.name.encode() for symbol in symbols]
    strx = itertools.accumulate((len(name) + 1 for name in names), initial=1)
    pack = struct.Struct(machine.order + ("IBBHQ" if machine.width == 8 else "IBBHI")).pack
    entries = b"".join(
        pack(n_strx, n_type, n_sect, n_desc, n_value)
        for n_strx, (_, n_value, n_type, n_sect, n_desc) in zip(strx, symbols, strict=False)
    )
    strings = b"\0" + b"\0".join([*names, b""])
    return entries, strings.ljust(up(len(strings), machine.width), b"\0")


def _rank(symbol: Sym) -> int:
    """The order LC_DYSYMTAB wants: locals and stabs, defined externals, undefined."""
    if symbol.n_type & N_STAB or not symbol.n_type & N_EXT:
        return 0
    return 1 if symbol.n_type & N_TYPE else 2


class MachO:
    """A Mach-O file under construction; commands stand in the order of the calls."""

    def __init__(self, arch: str, filetype: int, flags: int = 0) -> None:
        self.arch = arch
        self.machine = MACHINES[arch]
        self.filetype = filetype
        self.flags = flags
        self._order = self.machine.order
        self._commands: list[_Command] = []

    def command(self, cmd: int, body: bytes = b"", *, cmdsize: int | None = None) -> None:
        """Any command: `body` follows cmd and cmdsize; a false `cmdsize` may be claimed."""
        body = body.ljust(up(len(body), self.machine.width), b"\0")
        size = 8 + len(body) if cmdsize is None else cmdsize
        packed = struct.pack(self._order + "2I", cmd, size) + body
        self._commands.append(_Command(len(packed), lambda _off, _slide: packed))

    def segment(
        self,
        segname: str,
        vmaddr: int,
        data: bytes = b"",
        *,
        vmsize: int | None = None,
        fileoff: int | None = None,
        filesize: int | None = None,
        prot: int = 7,
        flags: int = 0,
        sections: Sequence[Section] = (),
    ) -> None:
        """A segment whose content is `data`; what is not given follows from it.

        With `fileoff` the command points there and `data` is not written (a hole, bytes of
        another segment, past the end); fileoff=0 with data is the segment that begins with the
        Mach-O header, which overwrites the head of `data`.
        """
        filesize = len(data) if filesize is None else filesize
        vmsize = up(len(data), self.machine.page) if vmsize is None else vmsize
        wide = self.machine.width == 8
        head = struct.Struct(self._order + ("2I16s4Q4I" if wide else "2I16s8I"))
        cmd = LC_SEGMENT_64 if wide else LC_SEGMENT
        size = head.size + len(sections) * (80 if wide else 68)

        def pack(off: int, slide: int) -> bytes:
            counts = (prot, prot, len(sections), flags)
            address = vmaddr + slide
            name = name16(segname)
            packed = head.pack(cmd, size, name, address, vmsize, off, filesize, *counts)
            return packed + b"".join(self._section(s, off - vmaddr, slide) for s in sections)

        payload = None if fileoff else data
        self._commands.append(_Command(size, pack, payload, fileoff))

    def _section(self, section: Section, delta: int, slide: int) -> bytes:
        """One section of a segment that lies in the file at its address plus `delta`."""
        offset = 0 if section.flags & 0xFF == S_ZEROFILL else section.addr + delta
        wide = self.machine.width == 8
        return struct.pack(
            self._order + ("16s16s2Q8I" if wide else "16s16s9I"),
            name16(section.sectname),
            name16(section.segname),
            section.addr + slide,
            section.size,
            *(offset, section.align, section.reloff, section.nreloc, section.flags, 0, 0),
            *((0,) if wide else ()),
        )

    def symtab(
        self,
        symbols: Sequence[Sym],
        *,
        linkedit: int | None = None,
        dysymtab: bool = True,
        strsize: int | None = None,
    ) -> bytes:
        """LC_SYMTAB and LC_DYSYMTAB; with `linkedit` a __LINKEDIT segment at that address too.

        Gives the tables' bytes. `strsize` is claimed instead of the truth.
        """
        symbols = sorted(symbols, key=_rank) if dysymtab else symbols
        entries, strings = symbol_table(self.machine, symbols)
        claimed = len(strings) if strsize is None else strsize

        def pack(off: int, _slide: int) -> bytes:
            strings_at = off + len(entries)
            return struct.pack(
                self._order + "6I", LC_SYMTAB, 24, off, len(symbols), strings_at, claimed
            )

        if linkedit is not None:
            self.segment("__LINKEDIT", linkedit, entries + strings, prot=1)
            self._commands.append(_Command(24, pack, shares=True))
        else:
            self._commands.append(_Command(24, pack, entries + strings))
        if dysymtab:
            ranks = [_rank(symbol) for symbol in symbols]
            local, defined = ranks.count(0), ranks.count(1)
            counts = (0, local, local, defined, local + defined, ranks.count(2))
            self.command(LC_DYSYMTAB, struct.pack(self._order + "18I", *counts, *(0,) * 12))
        return entries + strings

    def uuid(self, uuid: bytes) -> None:
        """LC_UUID of 16 raw bytes."""
        self.command(LC_UUID, uuid)

    def thread(self, state: bytes, *, unix: bool = False) -> None:
        """LC_THREAD (or LC_UNIXTHREAD); `state` from `thread_state`, several may be joined."""
        self.command(LC_UNIXTHREAD if unix else LC_THREAD, state)

    def ident(self, text: str) -> None:
        """LC_IDENT as xnu 3789 to 7195 write it: char[256]."""
        self.command(LC_IDENT, text.encode().ljust(256, b"\0"))

    def note(self, owner: str, payload: bytes, *, offset: int | None = None) -> None:
        """LC_NOTE; its bytes lie after those of all segments, or are only claimed at `offset`."""
        head = struct.pack(self._order + "2I", LC_NOTE, 40) + name16(owner)

        def pack(off: int, _slide: int) -> bytes:
            return head + struct.pack(self._order + "2Q", off, len(payload))

        data = payload if offset is None else None
        self._commands.append(_Command(40, pack, data, offset, late=True))

    def build_version(self, platform: int, minos: int, sdk: int) -> None:
        """LC_BUILD_VERSION without tools; versions are xxxx.yy.zz in nibbles."""
        self.command(LC_BUILD_VERSION, struct.pack(self._order + "4I", platform, minos, sdk, 0))

    def source_version(self, *parts: int) -> None:
        """LC_SOURCE_VERSION a.b.c.d.e, packed as 24.10.10.10.10 bits."""
        a, b, c, d, e = (*parts, 0, 0, 0, 0, 0)[:5]
        version = a << 40 | b << 30 | c << 20 | d << 10 | e
        self.command(LC_SOURCE_VERSION, struct.pack(self._order + "Q", version))

    def head_size(self) -> int:
        """Bytes of the header and all commands."""
        return self._header_size() + sum(command.size for command in self._commands)

    def head(self, slide: int = 0) -> bytes:
        """Header and commands as they lie in memory of an image loaded `slide` bytes higher."""
        return self._head(self._place()[0], slide)

    def build(
        self, *, ncmds: int | None = None, sizeofcmds: int | None = None, align: int | None = None
    ) -> bytes:
        """The file. `ncmds`, `sizeofcmds` are claimed instead of the truth; `align` in bytes."""
        offsets, chunks, size = self._place(align)
        out = bytearray(size)
        for offset, payload in chunks:
            out[offset : offset + len(payload)] = payload
        head = self._head(offsets, 0, ncmds, sizeofcmds)
        out[: len(head)] = head
        return bytes(out)

    def _header_size(self) -> int:
        return 32 if self.machine.width == 8 else 28

    def _place(self, align: int | None = None) -> tuple[list[int], list[tuple[int, bytes]], int]:
        """(file offset per command, (offset, payload) pairs, file size)."""
        unit = align or (4 if self.filetype == MH_OBJECT else self.machine.page)
        offsets = [0] * len(self._commands)
        chunks: list[tuple[int, bytes]] = []
        end = up(self.head_size(), unit)
        for late in (False, True):
            for index, command in enumerate(self._commands):
                if command.late != late:
                    continue
                at = end if command.fileoff is None else command.fileoff
                offsets[index] = offsets[index - 1] if command.shares else at
                if command.payload is None:
                    continue
                chunks.append((at, command.payload))
                end = max(end, at + len(command.payload))
                end = end if late else up(end, unit)
        return offsets, chunks, max([up(self.head_size(), unit), *(o + len(p) for o, p in chunks)])

    def _head(
        self,
        offsets: Sequence[int],
        slide: int,
        ncmds: int | None = None,
        sizeofcmds: int | None = None,
    ) -> bytes:
        commands = [c.pack(off, slide) for c, off in zip(self._commands, offsets, strict=True)]
        body = b"".join(commands)
        wide = self.machine.width == 8
        header = struct.pack(
            self._order + ("8I" if wide else "7I"),
            0xFEEDFACF if wide else 0xFEEDFACE,
            self.machine.cputype,
            self.machine.cpusubtype,
            self.filetype,
            len(commands) if ncmds is None else ncmds,
            len(body) if sizeofcmds is None else sizeofcmds,
            self.flags,
            *((0,) if wide else ()),
        )
        return header + body
