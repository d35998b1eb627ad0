"""What the linker cannot do: a preload image becomes a kernel that multiboot starts, or a kext.

`finish` sets the file type, adds LC_UUID and LC_UNIXTHREAD in the room before the code, and fills
in the multiboot header; `strip` then takes the debugger's symbols (stabs) out and adds
__mh_execute_header, as XNU's linker does. Between the two dsymutil reads the stabs.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

MH_EXECUTE, MH_KEXT_BUNDLE = 2, 11
MH_NOUNDEFS, MH_PIE = 0x1, 0x200000
LC_SEGMENT, LC_SEGMENT_64, LC_SYMTAB, LC_UNIXTHREAD, LC_DYSYMTAB, LC_UUID = 1, 25, 2, 5, 11, 27
N_STAB, N_ABS, N_SECT, N_EXT = 0xE0, 0x2, 0xE, 0x1
RAW_BASE = 0x4400000  # src/machine.h
MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, MULTIBOOT_REACH = 0x1BADB002, 0x10003, 8192
_ENTRY = 32 + 24 + 6  # src/start_*.s: the multiboot header, three descriptors, their pointer
_ROOM = 256  # src/start_*.s: before the multiboot header
_THREAD = {  # flavor, words of state, which of them is the program counter
    "i386": (1, "I", 16, 10),
    "x86_64": (4, "Q", 21, 16),
}


class Symbol(NamedTuple):
    """One struct nlist, with its name."""

    name: bytes
    n_type: int
    n_sect: int
    n_desc: int
    n_value: int


class Image:
    """A thin little-endian Mach-O file of ours, to be changed in place."""

    def __init__(self, data: bytes) -> None:
        """Takes the file's bytes."""
        self.data = bytearray(data)
        self.wide = data[:4] == b"\xcf\xfa\xed\xfe"
        self.arch = "x86_64" if self.wide else "i386"
        self.header = 32 if self.wide else 28
        self._word = "Q" if self.wide else "I"

    def commands(self) -> list[tuple[int, int, int]]:
        """(offset, cmd, cmdsize) of every load command."""
        found, at = [], self.header
        for _ in range(self._u32(16)):
            cmd, cmdsize = struct.unpack_from("<2I", self.data, at)
            found.append((at, cmd, cmdsize))
            at += cmdsize
        return found

    def _u32(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self.data, at)[0]
        return value

    def put(self, at: int, layout: str, *values: int) -> None:
        """Overwrite numbers."""
        struct.pack_into("<" + layout, self.data, at, *values)

    def find(self, wanted: int) -> int:
        """The offset of the first command of a kind."""
        return next(at for at, cmd, _ in self.commands() if cmd == wanted)

    def segment(self, name: bytes) -> tuple[int, tuple[int, ...]]:
        """(offset of its command, (vmaddr, vmsize, fileoff, filesize)) of a segment."""
        for at, cmd, _ in self.commands():
            if cmd not in (LC_SEGMENT, LC_SEGMENT_64):
                continue
            if bytes(self.data[at + 8 : at + 24]).rstrip(b"\0") == name:
                return at, struct.unpack_from(f"<4{self._word}", self.data, at + 24)
        raise KeyError(name)

    def make_room(self, size: int) -> None:
        """Takes the first `size` bytes, all zero, of the first section from it."""
        command, _ = self.segment(b"__TEXT")
        at = command + (72 if self.wide else 56) + 32  # addr, size, offset of the first section
        addr, length, offset = struct.unpack_from(f"<2{self._word}I", self.data, at)
        if any(self.data[offset : offset + size]):
            raise ValueError(f"the first {size} bytes of the first section are not free")
        self.put(at, f"2{self._word}I", addr + size, length - size, offset + size)

    def add(self, command: bytes) -> None:
        """One more load command, in the room before the first section."""
        at = self.header + self._u32(20)
        if any(self.data[at : at + len(command)]):
            raise ValueError("no room for another load command")
        self.data[at : at + len(command)] = command
        self.put(16, "2I", self._u32(16) + 1, self._u32(20) + len(command))

    def symbols(self) -> list[Symbol]:
        """All entries of the symbol table."""
        _, _, symoff, nsyms, stroff, _ = struct.unpack_from("<6I", self.data, self.find(LC_SYMTAB))
        layout = struct.Struct("<IBBH" + self._word)
        found = []
        for n in range(nsyms):
            strx, *rest = layout.unpack_from(self.data, symoff + n * layout.size)
            name = bytes(self.data[stroff + strx : self.data.index(0, stroff + strx)])
            found.append(Symbol(name, *rest))
        return found

    def replace_symbols(self, symbols: list[Symbol]) -> None:
        """A new symbol table at the old one's place; __LINKEDIT and the file end after it."""
        at = self.find(LC_SYMTAB)
        symoff = self._u32(at + 8)
        layout = struct.Struct("<IBBH" + self._word)
        table, strings = b"", b"\0"
        for name, *rest in symbols:
            table += layout.pack(len(strings), *rest)
            strings += name + b"\0"
        stroff = symoff + len(table)
        self.data[symoff:] = table + strings
        self.put(at + 8, "4I", symoff, len(symbols), stroff, len(strings))
        command, (vmaddr, _, fileoff, _) = self.segment(b"__LINKEDIT")
        size = len(self.data) - fileoff
        self.put(command + 24, "4" + self._word, vmaddr, -(-size // 4096) * 4096, fileoff, size)


def finish(data: bytes, *, kernel: bool) -> bytes:
    """The linked image as kernel or kext, stabs and all."""
    image = Image(data)
    flags = MH_NOUNDEFS | (MH_PIE if image.wide or not kernel else 0)
    image.put(12, "I", MH_EXECUTE if kernel else MH_KEXT_BUNDLE)
    image.put(24, "I", flags)
    _, (_, _, linkedit, _) = image.segment(b"__LINKEDIT")
    digest = bytearray(hashlib.sha256(data[image.header : linkedit]).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x50, digest[8] & 0x3F | 0x80
    if kernel:
        image.make_room(_ROOM)
    image.add(struct.pack("<2I", LC_UUID, 24) + digest)
    if kernel:
        at = _multiboot(image)
        flavor, word, count, pc = _THREAD[image.arch]
        state = [0] * count
        _, (vmaddr, *_) = image.segment(b"__TEXT")
        state[pc] = vmaddr + at + _ENTRY
        registers = struct.pack(f"<{count}{word}", *state)
        size = 16 + len(registers)
        image.add(struct.pack("<4I", LC_UNIXTHREAD, size, flavor, len(registers) // 4) + registers)
    return bytes(image.data)


def _multiboot(image: Image) -> int:
    """Fill in the address fields; the file is to be loaded whole. Gives the header's offset."""
    magic = struct.pack("<2I", MULTIBOOT_MAGIC, MULTIBOOT_FLAGS)
    at = image.data.index(magic, 0, MULTIBOOT_REACH)
    checksum = -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS) & 0xFFFFFFFF
    place = RAW_BASE + at
    # header_addr, load_addr, load_end_addr and bss_end_addr (0: all of the file), entry_addr
    image.put(at + 8, "6I", checksum, place, RAW_BASE, 0, 0, place + _ENTRY)
    return at


def strip(data: bytes, *, kernel: bool) -> bytes:
    """The image without stabs; a kernel's with __mh_execute_header (10.7 and before: absolute)."""
    image = Image(data)
    kept = [symbol for symbol in image.symbols() if not symbol.n_type & N_STAB]
    if kernel:
        _, (vmaddr, *_) = image.segment(b"__TEXT")
        n_type, n_sect = (N_SECT | N_EXT, 1) if image.wide else (N_ABS | N_EXT, 0)
        kept.append(Symbol(b"__mh_execute_header", n_type, n_sect, 0, vmaddr))
    local = [symbol for symbol in kept if not symbol.n_type & N_EXT]
    external = sorted(symbol for symbol in kept if symbol.n_type & N_EXT)
    image.replace_symbols(local + external)
    for at, cmd, _ in image.commands():
        if cmd == LC_DYSYMTAB:
            image.put(at + 8, "6I", 0, len(local), len(local), len(external), len(kept), 0)
            image.put(at + 56, "2I", 0, 0)  # indirect symbols, which nothing needs any more
    return bytes(image.data)
