"""ELF cores of physical memory: QEMU's dump-guest-memory and libvirt's, VirtualBox's, OSXPmem's.

Only p_paddr tells where a PT_LOAD lies: QEMU's paging=true puts a (sign-extended) virtual address
into p_vaddr and lets many PT_LOADs share bytes of the file; VirtualBox and OSXPmem leave it 0.
Where no segment has a physical address (all ones, as in /proc/kcore) the memory is the kernel's.

e_machine is the processor's mode or the emulator's build, not the kernel's machine: a 32-bit kernel
of 10.5 on a 64-bit Mac runs on long-mode tables, and its core says EM_X86_64.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FormatError, TruncatedError
from kvmtool.formats import UNSAID, Facts, Note
from kvmtool.formats.elf_notes import CpuNotes
from kvmtool.formats.run_table import RunTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

# elf.h
_IDENT = 16
_CLASS, _DATA = 4, 5
_ORDERS = {1: "<", 2: ">"}  # ELFDATA2LSB, ELFDATA2MSB
_CORE, _LOAD, _NOTE = 4, 1, 4  # ET_CORE, PT_LOAD, PT_NOTE
_EM_386, _EM_X86_64, _EM_AARCH64 = 3, 62, 183
# of a core of kernel memory: there the writer knew what kernel it was
_MACHINES = {_EM_386: macho.CPU_TYPE_I386, _EM_X86_64: macho.CPU_TYPE_X86_64}
_PN_XNUM = 0xFFFF  # e_phnum when there are more: the number is in section 0's sh_info
_NOTES_LIMIT = 64 << 20  # bytes; of 4096 CPUs with all their vector registers
_SEGMENTS_LIMIT = 1 << 22


class _Layout(NamedTuple):
    """The records of one ELF class: formats without the byte order, and where fields are."""

    header: str  # from e_type on
    segment: str
    order: tuple[int, ...]  # of p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz in a segment
    sh_info: tuple[int, int]  # of sh_info in a section header, and the header's size
    unknown: int  # p_paddr of a segment that has no physical address


_LAYOUTS = {
    1: _Layout("HHIIIIIHHHHHH", "8I", (0, 1, 2, 3, 4, 5), (28, 40), (1 << 32) - 1),
    2: _Layout("HHIQQQIHHHHHH", "IIQQQQQQ", (0, 2, 3, 4, 5, 6), (44, 64), (1 << 64) - 1),
}


class ElfCore(RunTable):
    """An ELF core whose segments are physical memory."""

    name = "elf-core"
    piece = "PT_LOAD"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return (
            head[:4] == b"\x7fELF"
            and len(head) > _IDENT + 2
            and head[_CLASS] in _LAYOUTS
            and head[_DATA] in _ORDERS
            and _CORE in (head[_IDENT], head[_IDENT + 1])
        )

    def __init__(self, source: Source) -> None:
        """Read headers, segments and notes. Raises `FormatError`."""
        super().__init__(source)
        self._note_at: list[tuple[int, int]] = []
        ident = source.read_at(0, min(_IDENT, source.size))
        if ident[:4] != b"\x7fELF" or len(ident) < _IDENT:
            raise FormatError(source.name, 0, f"expected an ELF magic, got {ident[:4].hex()}")
        if ident[_CLASS] not in _LAYOUTS or ident[_DATA] not in _ORDERS:
            raise FormatError(
                source.name, 4, f"ELF class {ident[_CLASS]:#x}, data {ident[_DATA]:#x}"
            )
        self._layout, self._order = _LAYOUTS[ident[_CLASS]], _ORDERS[ident[_DATA]]
        self._read_header()
        self._cpus = CpuNotes(self._order)
        self.notes = tuple(self._read_notes())
        self.warnings += self._cpus.warnings
        self.facts = self._facts()

    def _read_header(self) -> None:
        source, layout = self.source, self._layout
        header = Struct(self._order + layout.header)
        if source.size < _IDENT + header.size:
            raise TruncatedError(
                source.name, _IDENT, header.size, source.size - _IDENT, "ELF header"
            )
        e_type, self.machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, _, _ = (
            header.unpack(source.read_at(_IDENT, header.size))
        )
        if e_type != _CORE:
            raise FormatError(source.name, _IDENT, f"e_type {e_type:#x}, expected {_CORE:#x}")
        segment = Struct(self._order + layout.segment)
        if phentsize != segment.size:
            raise FormatError(
                source.name, None, f"e_phentsize {phentsize:#x}, expected {segment.size:#x}"
            )
        if phnum == _PN_XNUM:
            phnum = self._extended_count(shoff, shentsize)
        size = phnum * segment.size
        if phnum > _SEGMENTS_LIMIT or phoff + size > source.size:
            raise FormatError(
                source.name,
                phoff,
                f"{phnum:#x} program headers take {size:#x} bytes, the file has {source.size:#x}",
            )
        table = source.read_at(phoff, size)
        kind, offset, vaddr, paddr, filesz, memsz = layout.order
        self._note_at += [
            (fields[offset], fields[filesz])
            for fields in segment.iter_unpack(table)
            if fields[kind] == _NOTE
        ]
        loads = [fields for fields in segment.iter_unpack(table) if fields[kind] == _LOAD]
        self.is_virtual = bool(loads) and all(f[paddr] == layout.unknown for f in loads)
        where = vaddr if self.is_virtual else paddr
        for fields in loads:  # what is not in the file is not known to be zero (VirtualBox's MMIO)
            self.add(fields[where], fields[memsz], fields[offset], stored=fields[filesz])

    def _extended_count(self, shoff: int, shentsize: int) -> int:
        at, size = self._layout.sh_info
        if shentsize != size or shoff == 0 or shoff + size > self.source.size:
            raise FormatError(
                self.source.name,
                shoff,
                "e_phnum is 0xffff, but there is no section 0 to hold the number of segments",
            )
        section = self.source.read_at(shoff, size)
        count: int = Struct(self._order + "I").unpack_from(section, at)[0]
        return count

    def _read_notes(self) -> Iterator[Note]:
        header = Struct(self._order + "III")
        for offset, size in self._note_at:
            size = min(size, _NOTES_LIMIT, max(0, self.source.size - offset))
            data = self.source.read_at(offset, size) if size else b""
            at = 0
            while at + header.size <= size:
                namesz, descsz, kind = header.unpack_from(data, at)
                name_at = at + header.size
                desc_at = name_at + (namesz + 3 & ~3)
                at = desc_at + (descsz + 3 & ~3)
                if desc_at + descsz > size:
                    self.warnings.append(
                        f"the note at offset {offset + name_at - header.size:#x} ends past its "
                        "segment"
                    )
                    break
                owner = data[name_at : name_at + namesz].rstrip(b"\0").decode("latin-1")
                self._cpus.take(owner, kind, self.machine, data[desc_at : desc_at + descsz])
                yield Note(owner, offset + desc_at, descsz)

    def _facts(self) -> Facts:
        cputype, said = UNSAID, {}
        if self.machine == _EM_AARCH64:
            cputype, said["cputype"] = macho.CPU_TYPE_ARM64, "e_machine EM_AARCH64"
        elif self.is_virtual and self.machine in _MACHINES:
            cputype, said["cputype"] = _MACHINES[self.machine], "e_machine"
        elif self.machine == _EM_386 and self._cpus.writer == "QEMU":
            # QEMU writes it for a CPU outside long mode, where no 64-bit kernel runs
            cputype, said["cputype"] = macho.CPU_TYPE_I386, "e_machine EM_386"
        return Facts(
            cputype, 0, threads=self._cpus.threads(), said=said, control=self._cpus.control()
        )
