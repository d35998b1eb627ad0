"""What a gdb stub says of its target: processor, registers, RAM. Pure functions over its texts.

Sources: gdb manual, "Target Descriptions"; QEMU 7.2 gdb-xml/ and softmmu/memory.c (info mtree);
osfmk/mach/{i386,arm}/thread_status.h for the register sets.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.formats import UNSAID, Thread
from kvmtool.memory import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DOCUMENT_LIMIT = 1 << 20  # bytes of one XML document
_DOCUMENTS = 32
_REGISTERS = 4096
_REGISTER_BITS = 4096
_EFER_LMA = 1 << 10  # osfmk/i386/proc_reg.h: MSR_IA32_EFER_LMA

_TAG = re.compile(r"<(reg|xi:include|architecture)\b([^<>]*)>([^<]*)")
_ATTRIBUTE = re.compile(r"""(?<![\w:])([\w:]++)\s*+=\s*+["']([^"']*+)["']""")
_FLAT_LINE = re.compile(r"\s*([0-9a-f]{1,16})-([0-9a-f]{1,16}) \(prio -?\d+, (ram|rom|romd)\):")

_CPUTYPES = {
    "i386:x86-64": macho.CPU_TYPE_X86_64,
    "i386": macho.CPU_TYPE_I386,
    "aarch64": macho.CPU_TYPE_ARM64,
    "arm": macho.CPU_TYPE_ARM,
    "powerpc:common": macho.CPU_TYPE_POWERPC,
    "powerpc:common64": macho.CPU_TYPE_POWERPC64,
}


class Register(NamedTuple):
    """A register: its number in `p`, its size and where it stands in `g`, both in bytes."""

    number: int
    size: int
    offset: int


class Description(NamedTuple):
    """The `architecture` by gdb's name ("" if not said) and the registers by theirs."""

    architecture: str
    registers: dict[str, Register]


def describe(fetch: Callable[[str], str]) -> Description:
    """The description that begins with target.xml; `fetch` gets one document, "" if there is none.

    Comments are taken out first: QEMU's hold registers that are not there, and to count them
    shifts all that follow.
    """
    architecture = ""
    registers: dict[str, Register] = {}
    number = offset = 0
    for tag, attributes, content in _tags("target.xml", fetch, [_DOCUMENTS]):
        if tag == "architecture":
            architecture = content.strip()
        elif len(registers) < _REGISTERS:
            bits = _integer(attributes.get("bitsize"), 0)
            if not 0 < bits <= _REGISTER_BITS:
                continue
            number = _integer(attributes.get("regnum"), number)
            size = (bits + 7) // 8
            registers[attributes.get("name", "")] = Register(number, size, offset)
            number, offset = number + 1, offset + size
    return Description(architecture, registers)


def _tags(
    name: str, fetch: Callable[[str], str], left: list[int]
) -> Iterator[tuple[str, dict[str, str], str]]:
    """Every tag we know, includes in their place; `left` counts documents down."""
    if left[0] == 0:
        return
    left[0] -= 1
    for tag, inside, content in _TAG.findall(_uncommented(fetch(name))):
        attributes = dict(_ATTRIBUTE.findall(inside))
        if tag == "xi:include":
            yield from _tags(attributes.get("href", ""), fetch, left)
        else:
            yield tag, attributes, content


def _uncommented(document: str) -> str:
    first, *others = document.split("<!--")
    return first + "".join(other.partition("-->")[2] for other in others)


def _integer(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else default


def cputype_of(
    architecture: str, registers: Mapping[str, int], host_info: str
) -> tuple[int, int, str]:
    """(cputype, cpusubtype, who says so); `UNSAID` and "" if nothing tells.

    `host_info` is the answer to qHostInfo, which lldb's stubs give. A processor of 64 bits that is
    not in long mode is the 32-bit machine; in long mode it may still run a 32-bit kernel (10.4 to
    10.6 on Intel), which only the kernel's file tells.
    """
    pairs = dict(pair.split(":", 1) for pair in host_info.split(";") if ":" in pair)
    said = _integer(pairs.get("cputype"), 0)
    if said:
        return said, _integer(pairs.get("cpusubtype"), 0), "qHostInfo"
    cputype = _CPUTYPES.get(architecture)
    if cputype is None:
        return UNSAID, 0, ""
    if cputype == macho.CPU_TYPE_X86_64 and not registers.get("efer", _EFER_LMA) & _EFER_LMA:
        return macho.CPU_TYPE_I386, 0, "the efer register: not in long mode"
    return cputype, 0, "target.xml"


# The registers of a Mach thread state as gdb names them: cputype → (flavor, struct, names)
_I386 = "eax ebx ecx edx edi esi ebp esp ss eflags eip cs ds es fs gs"
_X86_64 = "rax rbx rcx rdx rdi rsi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags cs fs gs"
_ARM64 = " ".join(f"x{n}" for n in range(31)) + " sp pc cpsr"
_STATES = {
    macho.CPU_TYPE_I386: (1, Struct("<16I"), _I386.split()),
    macho.CPU_TYPE_X86_64: (4, Struct("<21Q"), _X86_64.split()),
    macho.CPU_TYPE_ARM64: (6, Struct("<33QI4x"), _ARM64.split()),
}
# What else is read of every CPU: the way into its address space.
_CONTROL = (
    *("cr0", "cr3", "cr4", "efer", "fs_base", "gs_base", "k_gs_base"),
    *("TTBR0_EL1", "TTBR1_EL1", "TCR_EL1", "SCTLR_EL1", "VBAR", "VBAR_EL1"),
)


def wanted_registers(description: Description) -> list[str]:
    """The names worth reading: those of the thread states, and the control registers."""
    names = dict.fromkeys((*_CONTROL, *_I386.split(), *_X86_64.split(), *_ARM64.split()))
    return [name for name in names if name in description.registers]


def control_of(registers: Mapping[str, int]) -> dict[str, int]:
    """The control registers among `registers`."""
    return {name: registers[name] for name in _CONTROL if name in registers}


def thread_of(cputype: int, registers: Mapping[str, int]) -> Thread | None:
    """The registers as LC_THREAD has them; None if one is missing."""
    if cputype not in _STATES:
        return None
    flavor, layout, names = _STATES[cputype]
    mask = (1 << 64) - 1
    if cputype == macho.CPU_TYPE_I386 and "eax" not in registers:
        # a 64-bit stub shows a processor in 32-bit mode under the long names
        names, mask = list(map(_long_name, names)), 0xFFFFFFFF
    values = [registers[name] & mask for name in names if name in registers]
    if len(values) < len(names):
        return None
    return Thread(((flavor, layout.pack(*values)),))


def _long_name(name: str) -> str:
    return "r" + name[1:] if name[0] == "e" and name not in ("eflags", "es") else name


def ram(tree: str) -> tuple[Region, ...] | None:
    """RAM and ROM in QEMU's `info mtree -f`, in address order; None if it shows no such view."""
    for view in re.split(r"^FlatView #\d+", tree, flags=re.MULTILINE)[1:]:
        if ' AS "memory",' not in view:
            continue
        regions: list[Region] = []
        for line in view.splitlines():
            found = _FLAT_LINE.match(line)
            if found is None:
                continue
            start, last = int(found[1], 16), int(found[2], 16)
            before = regions[-1] if regions else Region(0, 0)
            if last < start or start < before.start + before.size:
                return None
            if regions and start == before.start + before.size:
                regions[-1] = Region(before.start, last + 1 - before.start)
            else:
                regions.append(Region(start, last + 1 - start))
        return tuple(regions)
    return None
