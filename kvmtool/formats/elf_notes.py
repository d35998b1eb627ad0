"""The CPUs in the notes of an ELF core.

Source: target/i386/arch_dump.c and target/arm/arch_dump.c of QEMU 7.2 (NT_PRSTATUS, and the note
"QEMU" with QEMUCPUState); include/VBox/vmm/dbgfcorefmt.h of VirtualBox 4.3 to 7 (DBGFCORECPU).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.formats import Thread

if TYPE_CHECKING:
    from collections.abc import Mapping

_PRSTATUS = 1  # NT_PRSTATUS, of the owner "CORE"
_QEMU_VERSION = 1
_VBOX_CORE, _VBOX_CPU = 0xB00, 0xB01
_VBOX_MAGIC = 0xC01AC0DE
_VBOX_REGISTERS = 0x00010001  # the format version before wrote its CPUMCTX, laid out otherwise
_EM_AARCH64 = 183

# mach/i386/thread_status.h, mach/arm/thread_status.h: what the registers are handed on as
_THREAD_STATE32, _THREAD_STATE64, _ARM_THREAD_STATE64 = 1, 4, 6
_NAMES64 = (
    *("rax", "rbx", "rcx", "rdx", "rdi", "rsi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12"),
    *("r13", "r14", "r15", "rip", "rflags", "cs", "fs", "gs"),
)
_NAMES32 = (
    *("rax", "rbx", "rcx", "rdx", "rdi", "rsi", "rbp", "rsp", "ss", "rflags", "rip", "cs", "ds"),
    *("es", "fs", "gs"),
)
_STATE64, _STATE32 = Struct(f"<{len(_NAMES64)}Q"), Struct(f"<{len(_NAMES32)}I")

# QEMUCPUState: version, size, 18 registers, ten segments of 24 bytes (the last is the interrupt
# table), cr0 to cr4, and from QEMU 3.1 on kernel_gs_base
_QEMU_HEAD = Struct("<II")
_QEMU_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12"),
    *("r13", "r14", "r15", "rip", "rflags"),
)
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
_QEMU = Struct("<8x18Q" + "I20x" * 6 + "88xQ" + "5Q")
_QEMU_CONTROL = ("idtr", "cr0", "cr1", "cr2", "cr3", "cr4")

_VBOX_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14"),
    *("r15", "rip", "rsp", "rbp", "rflags"),
)
_VBOX = Struct("<18Q" + "16xH6x" * 6 + "4Q" + "64x" + "32x" + "48x" + "24x" + "Q")
_VBOX_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")

# elf_prstatus of the kernels' ABI, as QEMU writes it: where pr_reg lies, and in which order
_PRSTATUS64 = (
    Struct("<112x27Q"),
    (
        *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx"),
        *("rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base"),
        *("gs_base", "ds", "es", "fs", "gs"),
    ),
)
_PRSTATUS32 = (
    Struct("<72x17I"),
    (
        *("rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rax", "ds", "es", "fs", "gs", "orig_rax"),
        *("rip", "cs", "rflags", "rsp", "ss"),
    ),
)
_ARM_PRSTATUS = Struct("<112x34Q")  # x0 to x30, sp, pc, pstate
_ARM_STATE = Struct("<33QII")


class CpuNotes:
    """The registers of each CPU, taken from the notes as they come by."""

    def __init__(self, order: str) -> None:
        """`order` is the file's byte order: only little-endian CPUs are understood."""
        self._little = order == "<"
        self.warnings: list[str] = []
        self.writer: str | None = None  # "QEMU" or "VirtualBox", by its own notes
        self._prstatus: list[Thread] = []
        self._states: list[Thread] = []
        self._control: list[Mapping[str, int]] = []
        self._vbox_version: int | None = None

    def take(self, owner: str, kind: int, machine: int, data: bytes) -> None:
        """Take in one note; those of no CPU are left alone."""
        if not self._little:
            return
        if owner == "CORE" and kind == _PRSTATUS:
            self._take_prstatus(machine, data)
        elif owner == "QEMU" and kind == 0:
            self._take_qemu(data)
        elif owner == "VBCORE" and kind == _VBOX_CORE:
            self._take_vbox_core(data)
        elif owner in ("VBCPU", "VBCORE") and kind == _VBOX_CPU:
            self._take_vbox(data)

    def threads(self) -> tuple[Thread, ...]:
        """One per CPU: from the emulator's own notes where there are such."""
        return tuple(self._states or self._prstatus)

    def control(self) -> tuple[Mapping[str, int], ...]:
        """The control registers of each CPU; of an aarch64 none are written."""
        return tuple(self._control)

    def _take_prstatus(self, machine: int, data: bytes) -> None:
        if machine == _EM_AARCH64 and len(data) >= _ARM_PRSTATUS.size:
            *whole, pstate = _ARM_PRSTATUS.unpack_from(data)
            state = _ARM_STATE.pack(*whole, pstate & 0xFFFFFFFF, 0)
            self._prstatus.append(Thread(((_ARM_THREAD_STATE64, state),)))
            return
        layout, names = _PRSTATUS64 if len(data) >= _PRSTATUS64[0].size else _PRSTATUS32
        if machine == _EM_AARCH64 or len(data) < layout.size:
            self.warnings.append(f"an NT_PRSTATUS note of {len(data):#x} bytes is too short")
            return
        self._prstatus.append(_x86(dict(zip(names, layout.unpack_from(data), strict=True))))

    def _take_qemu(self, data: bytes) -> None:
        if len(data) < _QEMU.size or _QEMU_HEAD.unpack_from(data)[0] != _QEMU_VERSION:
            self.warnings.append(f"a QEMU CPU note of {len(data):#x} bytes is not of version 1")
            return
        self.writer = "QEMU"
        names = (*_QEMU_NAMES, *_QEMU_SEGMENTS, *_QEMU_CONTROL)
        self._take_x86(dict(zip(names, _QEMU.unpack_from(data), strict=True)))

    def _take_vbox_core(self, data: bytes) -> None:
        magic, version = _QEMU_HEAD.unpack_from(data) if len(data) >= _QEMU_HEAD.size else (0, 0)
        if magic != _VBOX_MAGIC:
            self.warnings.append(f"VBCORE magic {magic:#x}, expected {_VBOX_MAGIC:#x}")
            return
        self.writer, self._vbox_version = "VirtualBox", version
        if version < _VBOX_REGISTERS:
            self.warnings.append(f"the registers of VBCORE format {version:#x} are not understood")

    def _take_vbox(self, data: bytes) -> None:
        if self._vbox_version is None or self._vbox_version < _VBOX_REGISTERS:
            return
        if len(data) < _VBOX.size:
            self.warnings.append(f"a VirtualBox CPU note of {len(data):#x} bytes is too short")
            return
        names = (*_VBOX_NAMES, *_QEMU_SEGMENTS, *_VBOX_CONTROL)
        self._take_x86(dict(zip(names, _VBOX.unpack_from(data), strict=True)))

    def _take_x86(self, registers: dict[str, int]) -> None:
        self._states.append(_x86(registers))
        kept = ("cr0", "cr2", "cr3", "cr4", "efer", "idtr")
        self._control.append({name: registers[name] for name in kept if name in registers})


def _x86(registers: dict[str, int]) -> Thread:
    """The registers in both of Mach's shapes: whether the kernel is 32-bit is not said here."""
    narrow = [registers.get(name, 0) & 0xFFFFFFFF for name in _NAMES32]
    wide = [registers.get(name, 0) for name in _NAMES64]
    return Thread(
        ((_THREAD_STATE64, _STATE64.pack(*wide)), (_THREAD_STATE32, _STATE32.pack(*narrow)))
    )
