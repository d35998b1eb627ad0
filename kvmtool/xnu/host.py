"""The machine and its kernel: what hostinfo(8), sw_vers(1) and sysctl would say of them.

Source: bsd/kern/kern_sysctl.c, bsd/kern/kern_mib.c, osfmk/mach/machine.h (machine_info),
pexpert/pexpert/pexpert.h (PE_state), pexpert/pexpert/{i386,arm64}/boot.h (boot_args),
xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu import named
from kvmtool.xnu.load import boottime

if TYPE_CHECKING:
    from kvmtool.target import Target

_BOOT_LINE = 1024  # BOOT_LINE_LENGTH, the largest of all releases
# CommandLine in struct boot_args where no types tell: after Revision and Version on i386 (xnu-792),
# with efiMode, debugMode and flags between since xnu-1699; on arm64 after the memory's bounds, the
# video and the device tree (xnu-4570..11417)
_COMMAND_LINE = {"i386": 4, "x86_64": 8, "arm64": 108, "arm64e": 108}
_MACHINE = {
    "max_mem": ("Q", "max_mem"),
    "max_cpus": ("i", "max_cpus"),
    "physical_cpu": ("i", "physical_cpu"),
    "physical_cpu_max": ("i", "physical_cpu_max"),
    "logical_cpu": ("i", "logical_cpu"),
    "logical_cpu_max": ("i", "logical_cpu_max"),
}


@dataclass(frozen=True, slots=True)
class Host:
    """What a kernel knows of itself. A field is None without its symbol, or `Unreadable`.

    `boottime` is (seconds, microseconds) since 1970 UTC; sizes are bytes: `max_mem` is hw.memsize,
    `mem_size` what the kernel uses of it. `hz` is ticks a second, `slide` vm_kernel_slide, which
    kernels before 10.8 have not.
    """

    version: Any
    ostype: Any
    osrelease: Any
    osversion: Any
    osproductversion: Any
    hostname: Any
    domainname: Any
    hostid: Any
    boottime: Any
    bootargs: Any
    rootdevice: Any
    max_mem: Any
    mem_size: Any
    page_size: Any
    max_cpus: Any
    physical_cpu: Any
    physical_cpu_max: Any
    logical_cpu: Any
    logical_cpu_max: Any
    hz: Any
    maxproc: Any
    kernel_uuid: Any
    slide: Any
    stext: Any


def host(target: Target) -> Host:
    """The host as its kernel describes it. Never raises `FaultError`."""
    return Host(
        version=named.text(target, "_version", 1024),
        ostype=named.text(target, "_ostype"),
        osrelease=named.text(target, "_osrelease"),
        osversion=named.text(target, "_osversion"),
        osproductversion=named.text(target, "_osproductversion", 48),
        hostname=named.text(target, "_hostname"),
        domainname=named.text(target, "_domainname"),
        hostid=named.number(target, "_hostid"),
        boottime=boottime(target),
        bootargs=boot_args(target),
        rootdevice=named.text(target, "_rootdevice", 16),
        mem_size=named.word(target, "_mem_size"),
        page_size=page_size(target),
        hz=named.number(target, "_hz"),
        maxproc=named.number(target, "_maxproc"),
        kernel_uuid=named.text(target, "_kernel_uuid_string", 37),
        slide=named.word(target, "_vm_kernel_slide"),
        stext=named.word(target, "_vm_kernel_stext"),
        **_machine_info(target),
    )


def _machine_info(target: Target) -> dict[str, Any]:
    at = named.address_of(target, "_machine_info")
    if at is None:
        return dict.fromkeys(_MACHINE)
    return record(target, "machine_info", _MACHINE).read(at)


def page_size(target: Target) -> Any:
    """Bytes in a page of the kernel's: on arm64, which has two sizes, its variable `page_size`."""
    if not target.arch.name.startswith("arm64"):
        return target.arch.page_size
    found = named.word(target, "_page_size", "_PAGE_SIZE")
    if isinstance(found, int) and found not in (4096, 16384):
        return Unreadable(f"page_size is {found:#x}, expected 0x1000 or 0x4000")
    return target.arch.page_size if found is None else found


def boot_args(target: Target) -> Any:
    """The boot arguments, by PE_state.bootArgs. None for a kernel without the symbol _PE_state.

    What is found must be printable text; if not, `Unreadable` says so.
    """
    state = named.address_of(target, "_PE_state")
    types = target.types
    if state is None or not types.has("PE_state", "bootArgs"):
        return None
    try:
        args = target.pointer(state + types.offset("PE_state", "bootArgs"))
        if not args:
            return None
        return _command_line(target, args)
    except FaultError as fault:
        return Unreadable.of(fault)


def _command_line(target: Target, args: int) -> Any:
    types = target.types
    if types.has("boot_args", "CommandLine"):
        at = types.offset("boot_args", "CommandLine")
    elif target.arch.name in _COMMAND_LINE:
        at = _COMMAND_LINE[target.arch.name]
    else:
        return None
    line = target.text(args + at, _BOOT_LINE)
    if not line.isprintable():
        return Unreadable(f"no text at {args + at:#x}, expected boot_args.CommandLine")
    return line
