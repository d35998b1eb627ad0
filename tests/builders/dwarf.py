"""DWARF by compilers, and by hand where no compiler writes what a test needs.

Compilers run on ELF too: `from_elf` puts its debugging sections into a Mach-O, which is how big
endian machines, 64-bit DWARF, type units and gcc come to be tested.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.builders import macho

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLANGS = ("clang", *(f"clang-{version}" for version in range(21, 13, -1)))
# ELF machine -> (Mach-O's name, relocation type -> bytes it changes)
ELF_MACHINES = {
    "EM_X86_64": ("x86_64", {1: 8, 10: 4, 11: 4}),
    "EM_386": ("i386", {1: 4}),
    "EM_PPC": ("ppc", {1: 4}),
    "EM_PPC64": ("ppc64", {38: 8, 1: 4}),
    "EM_AARCH64": ("arm64", {257: 8, 258: 4}),
}


def tool(*names: str) -> str:
    """The first of these programs that is installed; skips the test without one."""
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"{names[0]} is not installed")


def compiled(folder: str, source: str, *flags: str, compiler: str | None = None) -> str:
    """Path of the object file of `source`, a C text (C++ with "-xc++" among `flags`)."""
    path = os.path.join(folder, "source.c")
    with open(path, "w") as file:
        file.write(source)
    out = os.path.join(folder, "source.o")
    command = [compiler or tool(*CLANGS), "-w", "-c", *flags, path, "-o", out]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def record_layouts(folder: str, source: str, *flags: str) -> str:
    """What clang prints of the layout of every record in `source`."""
    path = os.path.join(folder, "layouts.c")
    with open(path, "w") as file:
        file.write(source)
    dump = ("-fsyntax-only", "-Xclang", "-fdump-record-layouts-complete")
    done = subprocess.run(
        [tool(*CLANGS), "-w", *flags, *dump, path], check=True, capture_output=True, text=True
    )
    return done.stdout


def dsym(folder: str, objects: Sequence[str], triple: str = "x86_64-apple-darwin") -> str:
    """Path of the Mach-O that dsymutil links of `objects`, all symbols of each kept."""
    lines = ["---", f"triple: '{triple}'", "binary-path: ''", "objects:"]
    nm, base = tool("llvm-nm"), 0x100000
    symbols: dict[str, list[tuple[str, int]]] = {}
    for path in objects:
        if path not in symbols:
            text = subprocess.run([nm, path], check=True, capture_output=True, text=True).stdout
            rows = [line.split() for line in text.splitlines()]
            symbols[path] = [(row[2], int(row[0], 16)) for row in rows if len(row) == 3]
        lines += [f"  - filename: '{path}'", "    timestamp: 0", "    symbols:"]
        lines += [
            f"      - {{ sym: {name}, objAddr: {at:#x}, binAddr: {base + at:#x}, size: 0x8 }}"
            for name, at in symbols[path]
        ]
        base += 0x100000
    with open(os.path.join(folder, "map.yaml"), "w") as file:
        file.write("\n".join([*lines, "...", ""]))
    out = os.path.join(folder, "map.dSYM")
    command = [tool("dsymutil"), "-y", os.path.join(folder, "map.yaml"), "-o", out]
    subprocess.run(command, check=True, capture_output=True)
    return os.path.join(out, "Contents", "Resources", "DWARF", "map.yaml")


def from_elf(path: str) -> bytes:
    """A Mach-O (MH_DSYM) with the debugging sections of the ELF file at `path`, relocated."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(path, "rb") as file:
        elf = elffile.ELFFile(file)
        arch, kinds = ELF_MACHINES[elf["e_machine"]]
        found: dict[str, bytes] = {}
        for index, section in enumerate(elf.iter_sections()):
            if section.name.startswith(".debug_"):
                data = bytearray(section.data())
                _relocate(elf, index, data, kinds)
                name = f"__{section.name[1:]}"[:16]
                found[name] = found.get(name, b"") + bytes(data)
    return wrapped(found, arch)


def _relocate(elf, target: int, data: bytearray, kinds: Mapping[int, int]) -> None:
    order = "little" if elf.little_endian else "big"
    for section in elf.iter_sections():
        if section["sh_type"] not in ("SHT_RELA", "SHT_REL") or section["sh_info"] != target:
            continue
        symbols = elf.get_section(section["sh_link"])
        for entry in section.iter_relocations():
            size = kinds[entry["r_info_type"]]
            at = entry["r_offset"]
            value = symbols.get_symbol(entry["r_info_sym"])["st_value"]
            value += (
                entry["r_addend"]
                if section["sh_type"] == "SHT_RELA"
                else int.from_bytes(data[at : at + size], order)
            )
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, order)


def wrapped(sections: Mapping[str, bytes], arch: str, filetype: int = macho.MH_DSYM) -> bytes:
    """A Mach-O with these sections in __DWARF."""
    image = macho.MachO(arch, filetype)
    data, table = b"", []
    for name, content in sections.items():
        table.append(macho.Section(name, "__DWARF", 0x1000 + len(data), len(content)))
        data += content
    image.segment("__DWARF", 0x1000, data, sections=table)
    return image.build()


# by hand


def uleb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def sleb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        done = (value == 0 and not byte & 0x40) or (value == -1 and byte & 0x40)
        out.append(byte | (0 if done else 0x80))
        if done:
            return bytes(out)


class Entry(NamedTuple):
    """A debugging entry: `values` are (attribute, form, the bytes or the label of an entry)."""

    tag: int
    values: tuple[tuple[int, int, bytes | str], ...] = ()
    inside: tuple[Entry, ...] | None = None
    label: str | None = None


class Assembler:
    """One DWARF unit, assembled from `Entry`s; a reference is a label, in DW_FORM_ref4."""

    def __init__(self, version: int = 4, order: str = "<", address_size: int = 8) -> None:
        self.version, self.order, self.address_size = version, order, address_size

    def sections(self, root: Entry) -> dict[str, bytes]:
        """`__debug_info` and `__debug_abbrev`."""
        head = struct.pack(self.order + "H", self.version)
        rest = (
            struct.pack(self.order + "BBI", 1, self.address_size, 0)
            if self.version >= 5
            else struct.pack(self.order + "IB", 0, self.address_size)
        )
        first = 4 + len(head) + len(rest)
        body, abbrevs = bytearray(), []
        labels: dict[str, int] = {}
        holes: list[tuple[int, str]] = []
        self._write(root, first, body, abbrevs, labels, holes)
        for at, label in holes:
            body[at : at + 4] = struct.pack(self.order + "I", labels[label])
        length = struct.pack(self.order + "I", len(head) + len(rest) + len(body))
        return {
            "__debug_info": length + head + rest + bytes(body),
            "__debug_abbrev": b"".join(abbrevs) + b"\0",
        }

    def _write(self, entry: Entry, first: int, body, abbrevs, labels, holes) -> None:
        if entry.label is not None:
            labels[entry.label] = first + len(body)
        code = len(abbrevs) + 1
        abbrev = uleb(code) + uleb(entry.tag) + bytes([entry.inside is not None])
        body += uleb(code)
        for attribute, form, value in entry.values:
            abbrev += uleb(attribute) + uleb(form)
            if form == 0x21:  # DW_FORM_implicit_const: the value is in the abbreviation
                abbrev += value
            elif isinstance(value, str):
                holes.append((len(body), value))
                body += bytes(4)
            else:
                body += value
        abbrevs.append(abbrev + b"\0\0")
        for child in entry.inside or ():
            self._write(child, first, body, abbrevs, labels, holes)
        if entry.inside is not None:
            body += b"\0"
