"""Containers of physical memory, by their specifications: LiME, ELF cores, Mac Memory Reader."""

from __future__ import annotations

import struct
from typing import NamedTuple

PT_LOAD, PT_NOTE = 1, 4
QEMU_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12"),
    *("r13", "r14", "r15", "rip", "rflags"),
)
VBOX_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14"),
    *("r15", "rip", "rsp", "rbp", "rflags"),
)
LINUX64_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds"),
    *("es", "fs", "gs"),
)
LINUX32_NAMES = (
    *("ebx", "ecx", "edx", "esi", "edi", "ebp", "eax", "ds", "es", "fs", "gs", "orig_eax"),
    *("eip", "cs", "eflags", "esp", "ss"),
)
EM_386, EM_PPC64, EM_X86_64, EM_AARCH64 = 3, 21, 62, 183


def lime(*ranges: tuple[int, bytes]) -> bytes:
    """A LiME image of (first address, content)."""
    return b"".join(lime_header(at, at + len(data) - 1) + data for at, data in ranges)


def lime_header(first: int, last: int, *, magic: int = 0x4C694D45, version: int = 1) -> bytes:
    """A range header; `last` is inclusive."""
    return struct.pack("<IIQQQ", magic, version, first, last, 0)


class Segment(NamedTuple):
    """A program header and its content; sizes may say other than there is."""

    data: bytes
    p_paddr: int = 0
    p_vaddr: int = 0
    p_type: int = PT_LOAD
    p_memsz: int | None = None
    p_filesz: int | None = None


def elf(
    *segments: Segment,
    machine: int = EM_X86_64,
    bits: int = 64,
    order: str = "<",
    extended: bool = False,
    e_type: int = 4,
) -> bytes:
    """An ELF core; with `extended` e_phnum is 0xffff and section 0 has the number."""
    wide = bits == 64
    header_size, phent, shent = (64, 56, 64) if wide else (52, 32, 40)
    shoff = header_size if extended else 0
    phoff = header_size + (shent if extended else 0)
    offset = phoff + phent * len(segments)
    word = "Q" if wide else "I"
    ident = b"\x7fELF" + bytes((2 if wide else 1, 1 if order == "<" else 2, 1)) + bytes(9)
    out = ident + struct.pack(
        f"{order}HHI{word}{word}{word}IHHHHHH",
        *(e_type, machine, 1, 0, phoff, shoff, 0, header_size, phent),
        *(0xFFFF if extended else len(segments), shent, int(extended), 0),
    )
    if extended:
        layout = f"{order}IIQQQQIIQQ" if wide else f"{order}10I"
        out += struct.pack(layout, 0, 0, 0, 0, 0, 0, 0, len(segments), 0, 0)
    for s in segments:
        memsz = len(s.data) if s.p_memsz is None else s.p_memsz
        filesz = len(s.data) if s.p_filesz is None else s.p_filesz
        if wide:
            fields = (s.p_type, 4, offset, s.p_vaddr, s.p_paddr, filesz, memsz, 0)
            out += struct.pack(f"{order}IIQQQQQQ", *fields)
        else:
            fields = (s.p_type, offset, s.p_vaddr, s.p_paddr, filesz, memsz, 4, 0)
            out += struct.pack(f"{order}8I", *fields)
        offset += len(s.data)
    return out + b"".join(s.data for s in segments)


def note(owner: bytes, kind: int, data: bytes, order: str = "<") -> bytes:
    """A note; `owner` with or without its NUL, as writers differ."""
    head = struct.pack(f"{order}III", len(owner), len(data), kind)
    return head + owner + bytes(-len(owner) % 4) + data + bytes(-len(data) % 4)


def qemu_note(registers: dict[str, int]) -> bytes:
    """QEMU's QEMUCPUState, 440 bytes."""
    out = struct.pack("<II", 1, 440)
    out += struct.pack("<18Q", *(registers.get(name, 0) for name in QEMU_NAMES))
    for name in ["cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"]:
        out += struct.pack("<IIIIQ", registers.get(name, 0), 0xFFFFFFFF, 0xA09B00, 0, 0)
    control = (registers.get(f"cr{n}", 0) for n in range(5))
    return note(b"QEMU\0", 0, out + struct.pack("<5QQ", *control, 0))


def vbox_notes(registers: dict[str, int], version: int = 0x00010006) -> bytes:
    """VirtualBox's descriptor and one DBGFCORECPU, its XSAVE area cut short."""
    core = struct.pack("<6I", 0xC01AC0DE, version, 24, 0x07000000, 1, 1)
    cpu = struct.pack("<18Q", *(registers.get(name, 0) for name in VBOX_NAMES))
    for name in ["cs", "ds", "es", "fs", "gs", "ss"]:
        cpu += struct.pack("<QIIHHI", 0, 0, 0, registers.get(name, 0), 0, 0)
    cpu += struct.pack("<4Q", *(registers.get(name, 0) for name in ["cr0", "cr2", "cr3", "cr4"]))
    cpu += bytes(8 * 8 + 2 * 16 + 2 * 24 + 3 * 8)  # dr, gdtr and idtr, ldtr and tr, sysenter
    cpu += struct.pack("<Q", registers.get("efer", 0)) + bytes(512)
    # n_namesz leaves out the NUL, and names are padded to 8 bytes (DBGFCoreWrite.cpp)
    out = struct.pack("<III", 6, len(core), 0xB00) + b"VBCORE\0\0" + core
    return out + struct.pack("<III", 5, len(cpu), 0xB01) + b"VBCPU\0\0\0" + cpu


def prstatus64(registers: dict[str, int]) -> bytes:
    """NT_PRSTATUS of x86_64, 336 bytes."""
    pr_reg = struct.pack("<27Q", *(registers.get(name, 0) for name in LINUX64_NAMES))
    return note(b"CORE\0", 1, bytes(112) + pr_reg + bytes(8))


def prstatus32(registers: dict[str, int]) -> bytes:
    """NT_PRSTATUS of i386, 144 bytes."""
    pr_reg = struct.pack("<17I", *(registers.get(name, 0) for name in LINUX32_NAMES))
    return note(b"CORE\0", 1, bytes(72) + pr_reg + bytes(4))


def prstatus_arm64(x: list[int], sp: int, pc: int, pstate: int) -> bytes:
    """NT_PRSTATUS of aarch64, 392 bytes."""
    return note(b"CORE\0", 1, bytes(112) + struct.pack("<34Q", *x, sp, pc, pstate) + bytes(8))


def mac_memory_reader(
    *segments: tuple[str, int, bytes], bits: int = 64, filetype: int = 4
) -> bytes:
    """(EFI type, physical address, content) as Mac Memory Reader writes them."""
    wide = bits == 64
    magic, cputype, head, size = (
        (0xFEEDFACF, 0x1000007, 32, 72) if wide else (0xFEEDFACE, 7, 28, 56)
    )
    sizeofcmds = size * len(segments)
    out = struct.pack("<7I", magic, cputype, 3, filetype, len(segments), sizeofcmds, 0)
    out += bytes(head - 28)
    offset = 4096
    for name, address, data in segments:
        where = (address, len(data), offset, len(data))
        layout = "<II16s4Q4I" if wide else "<II16s4I4I"
        out += struct.pack(layout, 0x19 if wide else 1, size, name.encode(), *where, 7, 7, 0, 0)
        offset += len(data)
    return out.ljust(4096, b"\0") + b"".join(data for _, _, data in segments)
