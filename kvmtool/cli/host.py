"""host: the machine and its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import (
    Listing,
    header_missing,
    listing_options,
    opened,
    time_fields,
)
from kvmtool.cli.render import Column

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.host import Host

LISTING = Listing(
    "host",
    "fields",
    (
        Column("version", "version"),
        Column("ostype", "ostype"),
        Column("osrelease", "osrelease"),
        Column("osversion", "osversion"),
        Column("osproductversion", "osproductversion"),
        Column("arch", "arch"),
        Column("hostname", "hostname"),
        Column("domainname", "domainname"),
        Column("hostid", "hostid", "number"),
        Column("boottime", "boottime"),
        Column("boottime_raw", "boottime_raw", "list"),
        Column("bootargs", "bootargs"),
        Column("rootdevice", "rootdevice"),
        Column("max_mem", "max_mem (bytes)", "number"),
        Column("mem_size", "mem_size (bytes)", "number"),
        Column("page_size", "page_size (bytes)", "number"),
        Column("max_cpus", "max_cpus", "number"),
        Column("physical_cpu", "physical_cpu", "number"),
        Column("physical_cpu_max", "physical_cpu_max", "number"),
        Column("logical_cpu", "logical_cpu", "number"),
        Column("logical_cpu_max", "logical_cpu_max", "number"),
        Column("hz", "hz", "number"),
        Column("maxproc", "maxproc", "number"),
        Column("uuid", "uuid"),
        Column("kernel_uuid", "kernel_uuid"),
        Column("slide", "slide", "address"),
        Column("vm_kernel_slide", "vm_kernel_slide", "address"),
        Column("vm_kernel_stext", "vm_kernel_stext", "address"),
    ),
    (
        *("version", "osversion", "osproductversion", "arch", "hostname", "domainname"),
        *("boottime", "bootargs", "rootdevice", "max_mem", "mem_size", "page_size"),
        *("physical_cpu", "logical_cpu", "max_cpus", "hz", "maxproc", "uuid", "slide"),
    ),
)


def row_of(kvm: Kvm, found: Host) -> dict[str, Any]:
    """The host under the names that -o and JSON have; `uuid` and `slide` as the dump was opened."""
    from kvmtool.macho import uuid_text

    names = {column.name for column in LISTING.columns}
    row = {name: getattr(found, name) for name in found.__slots__ if name in names}
    uuid: Any = kvm.boot.uuid if kvm.boot is not None else None
    if uuid is not None:
        uuid = uuid_text(uuid)
    elif kvm.boot is not None:
        uuid = header_missing(kvm, kvm.boot.kernel_address)
    return {
        **row,
        **time_fields("boottime", found.boottime),
        "arch": kvm.arch.name,
        "uuid": uuid,
        "slide": kvm.kerndisp,
        "vm_kernel_slide": found.slide,
        "vm_kernel_stext": found.stext,
    }


@click.command(cls=Sectioned)
@listing_options
def host(where: Where, columns: tuple[str, ...], format: str) -> None:
    """Print what the kernel knows of its machine: version, names, boot time, memory, processors.

    A field that this kernel has not is shown as "-" (null in JSON).

    \b
    Example:
      kvmtool host -N mach_kernel -M core
    """
    from kvmtool.xnu.host import host as look
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    LISTING.show_one(row_of(kvm, look(kvm.nearest_target())), columns, format, Report())
