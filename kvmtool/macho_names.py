"""Mach-O numbers as people know them: names from macholib's tables, versions as dotted text.

Imported only when a name is to be shown. Source of the version packing: mach-o/loader.h,
source_version_command (A.B.C.D.E as 24.10.10.10.10 bits) and build_version_command (16.8.8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from macholib import mach_o

from kvmtool.macho import LC_BUILD_VERSION, LC_SOURCE_VERSION, MH_KEXT_BUNDLE, arch_name

if TYPE_CHECKING:
    from kvmtool.macho import MachO


def cpu_name(cputype: int, cpusubtype: int) -> str:
    """The architecture, followed by macholib's name of the CPU type where that says more."""
    name, known = arch_name(cputype, cpusubtype), mach_o.CPU_TYPE_NAMES.get(cputype)
    return name if known is None or known.lower() == name else f"{name} ({known})"


def filetype_name(filetype: int) -> str:
    """execute, core, object, ...; the number in hex where macholib knows no name."""
    if filetype == MH_KEXT_BUNDLE:  # macholib's table ends before it
        return "kext bundle"
    names = {**mach_o.MH_FILETYPE_NAMES, **mach_o.MH_FILETYPE_SHORTNAMES}
    name: str = names.get(filetype, f"{filetype:#x}")
    return name


def flag_names(flags: int) -> list[str]:
    """The names of the bits in a mach_header's flags; bits without one together, in hex."""
    names = []
    for bit, name in sorted(mach_o.MH_FLAGS_NAMES.items()):
        if flags & bit:
            names.append(name)
            flags &= ~bit
    return [*names, f"{flags:#x}"] if flags else names


def source_version(image: MachO) -> str | None:
    """LC_SOURCE_VERSION as A.B.C.D.E, zeros at the end left out."""
    record = _first(image, LC_SOURCE_VERSION, "source_version_command")
    if record is None:
        return None
    parts = [record.version >> 40, *(record.version >> shift & 0x3FF for shift in (30, 20, 10, 0))]
    while len(parts) > 2 and not parts[-1]:
        parts.pop()
    return ".".join(map(str, parts))


def build_version(image: MachO) -> str | None:
    """LC_BUILD_VERSION: the platform, the oldest system it runs on, the SDK."""
    record = _first(image, LC_BUILD_VERSION, "build_version_command")
    if record is None:
        return None
    platform = mach_o.PLATFORM_NAMES.get(record.platform, f"platform {record.platform}")
    return f"{platform} {_dotted(record.minos)}, SDK {_dotted(record.sdk)}"


def _dotted(packed: int) -> str:
    return f"{packed >> 16}.{packed >> 8 & 0xFF}.{packed & 0xFF}"


def _first(image: MachO, cmd: int, record: str) -> Any:
    command = next(image.commands(cmd), None)
    return None if command is None else image.record(record, command)
