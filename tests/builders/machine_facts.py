"""What a kernel knows of its machine: names, boot arguments, processors, memory, load.

After osfmk/mach/machine.h (machine_info), pexpert/pexpert/pexpert.h (PE_state), boot.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.builders.ground import Ground

BOOT_ARGS = "-v keepsyms=1 debug=0x144"
MACHINE = {
    "major_version": 13,
    "minor_version": 4,
    "max_cpus": 8,
    "max_mem": 0x2_4000_0000,
    "physical_cpu": 4,
    "physical_cpu_max": 4,
    "logical_cpu": 8,
    "logical_cpu_max": 8,
}
AVENRUN, MACH_FACTOR = (1_500, 1_250, 750), (6_500, 7_000, 7_999)


class Facts:
    """Plants them; the truth under the names of the `host` and `load` commands."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._image = ground.image

    def plant(self) -> dict[str, Any]:
        image, memory = self._image, self._ground.memory
        names = {"ostype": "Darwin", "osrelease": "13.4.0"}
        for name, text in names.items():
            image.const(f"_{name}", text.encode() + b"\0")
        truth: dict[str, Any] = dict(names)
        written = {"domainname": "local", "rootdevice": "disk0s2", "osproductversion": "10.9.5"}
        for name, text in written.items():
            memory.write(image.variable(f"_{name}", 256), text.encode())
        truth |= written
        truth["hostid"] = 0x1234
        self._ground.int_variable("_hostid", 0x1234)
        truth |= {"hz": 100, "mem_size": 0x2_0000_0000 if memory.width == 8 else 0x8000_0000}
        self._ground.pointer_variable("_mem_size", truth["mem_size"])
        memory.put_u32(image.symbols["_hz"] + image.slide, 100)
        if image.arch == "arm64":
            self._ground.pointer_variable("_page_size", memory.page)
        truth |= self._machine_info() | {"bootargs": self._boot_args()}
        for name, numbers in (("avenrun", AVENRUN), ("mach_factor", MACH_FACTOR)):
            memory.write(image.variable(f"_{name}", 12), struct.pack("<3I", *numbers))
            truth[name] = [number / 1000 for number in numbers]
        return {"host": truth}

    def _machine_info(self) -> dict[str, Any]:
        types = self._ground.types
        at = self._image.variable("_machine_info", types.layout.size("machine_info"))
        for member, value in MACHINE.items():
            if types.has("machine_info", member):
                code = "<Q" if member == "max_mem" else "<I"
                place = at + types.offset("machine_info", member)
                self._ground.memory.write(place, struct.pack(code, value))
        return {
            name: value if types.has("machine_info", name) else None
            for name, value in MACHINE.items()
            if not name.endswith("version")
        }

    def _boot_args(self) -> str | None:
        """PE_state leads to boot_args."""
        types, ground = self._ground.types, self._ground
        if not types.has("PE_state", "bootArgs"):
            return None
        line = BOOT_ARGS.encode()
        # CommandLine: after Revision and Version; later flags too; on arm64 after memory and video
        inside = {"i386": 4, "x86_64": 8, "arm64": 108}[self._image.arch]
        if types.has("boot_args", "CommandLine"):
            inside = types.offset("boot_args", "CommandLine")
        args = ground.bytes(bytes(inside) + line.ljust(1024, b"\0"))
        at = self._image.variable("_PE_state", types.layout.size("PE_state"))
        ground.memory.put_pointer(at + types.offset("PE_state", "bootArgs"), args)
        return BOOT_ARGS
