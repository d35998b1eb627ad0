"""A whole machine of any era: one crash with something of everything in it, and what that is.

`whole("14.6 arm64").truth["usage"][71]` is what process 71 uses.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from kvmtool.types import layouts
from tests.builders import xnu
from tests.builders.counters import Counters
from tests.builders.descriptors import Descriptors
from tests.builders.filesystem import FileSystem
from tests.builders.machine_facts import Facts
from tests.builders.maps import Maps
from tests.builders.network import Network
from tests.builders.ram import Ram
from tests.builders.sockets import Sockets
from tests.builders.specs import SSTOP, TH_RUN, TH_SUSP, TH_UNINT, TH_WAIT, KextSpec, ProcSpec
from tests.builders.stacks import Stacks
from tests.builders.tables import Tables
from tests.builders.usage import Usage

if TYPE_CHECKING:
    from tests.builders.ground import Ground

# The kernels of ../shared/data/layouts/xnu_layouts.json.gz, by the names of the database.
ERAS = (
    *("10.4.11 i386", "10.5.0 i386", "10.5.8 i386", "10.6.8 i386", "10.7.5 i386"),
    *("10.6.8 x86_64", "10.7.5 x86_64", "10.8.5 x86_64", "10.9.5 x86_64", "10.10.5 x86_64"),
    *("10.11.6 x86_64", "10.12.6 x86_64", "10.13.6 x86_64", "10.14.6 x86_64", "10.15.6 x86_64"),
    *(
        f"{release} {arch}"
        for release in (
            *("11.0.1", "11.5", "12.0.1", "12.5", "13.0"),
            *("13.5", "14.0", "14.6", "15.0", "15.5"),
        )
        for arch in ("x86_64", "arm64")
    ),
)
UUID = bytes(range(16))
KEXTS = {"i386": 0x3A000000, "x86_64": 0xFFFFFF7F81000000, "arm64": 0xFFFFFE0010000000}
MESSAGES = "".join(f"line {number} of the kernel's own log: κέρβερος\n" for number in range(60))
PROCESSES = (
    ProcSpec(1, "launchd", ppid=0, threads=(TH_WAIT, TH_WAIT)),
    ProcSpec(56, "WindowServer", uid=88, gid=88, groups=(88, 61), threads=(TH_WAIT, TH_RUN)),
    ProcSpec(70, "login", ruid=501, rgid=20, svgid=21, tty=(16, 3), login="amit"),
    ProcSpec(71, "bash", 70, sid=70, uid=501, gid=20, tty=(16, 3), login="amit", nice=-5),
    ProcSpec(72, "stopped", 71, sid=70, uid=501, gid=20, tty=(16, 3), stat=SSTOP),
    ProcSpec(
        *(328, "a very long command name", 71),
        name="a very long command name, longer than p_name",
        uid=501,
        gid=20,
        groups=tuple(range(20, 36)),
        start=(1_400_000_000, 654_321),
    ),
    ProcSpec(400, "κέρβερος", uid=0xFFFFFFFE, gid=0xFFFFFFFE, threads=(TH_UNINT | TH_WAIT,)),
    ProcSpec(99_998, "sleeper", 1, threads=(TH_WAIT, TH_SUSP), suspend_count=1),
    ProcSpec(99_999, "defunct", 71, sid=70, uid=501, gid=20, tty=(16, 3), xstat=0x200, zombie=True),
)


def banner_of(name: str) -> str:
    """The banner of the kernel whose layout that is."""
    kernel = next(kernel for kernel in layouts._database().kernels if kernel.name == name)
    config = f"RELEASE_{name.rpartition(' ')[2].upper()}"
    return f"Darwin Kernel Version 13.4.0: today; root:xnu-{kernel.releases[-1]}~1/{config}"


def kexts(arch: str) -> list[KextSpec]:
    """Three, of which each uses those before it."""
    names = ("com.example.first", "com.example.driver.second", "org.example.third")
    return [
        KextSpec(
            name,
            KEXTS[arch] + number * 0x8000,
            0x8000,
            ("2.8", "1.0.4", "17.3.12")[number],
            bytes([0xA0 + number]) * 16,
            references=names[:number],
        )
        for number, name in enumerate(names)
    ]


def everything(ground: Ground) -> dict[str, Any]:
    """Every part there is."""
    files, tables = FileSystem(ground), Tables(ground)
    truth = files.plant() | tables.sysent() | tables.traps() | tables.sysctls()
    truth |= Stacks(ground).plant()
    truth |= Counters(ground, [cpu["address"] for cpu in truth["processors"]]).plant()
    if ground.types.has("ifnet"):
        truth |= Network(ground).plant()
    maps = Maps(ground)
    if ground.types.has("_vm_map"):
        truth |= maps.plant()
    sockets = Sockets(ground, last_pid=71)
    truth |= sockets.plant()
    truth |= Descriptors(ground, files, sockets).plant()
    return truth | Usage(ground, files).plant() | Facts(ground).plant() | Ram(ground, maps).plant()


@functools.lru_cache(maxsize=4)  # some ten megabytes each
def whole(name: str) -> xnu.Built:
    """The machine of that layout, made once."""
    layout, arch = layouts.table(name), name.rpartition(" ")[2]
    slide = 0xA00000 if xnu.has_kaslr(layout) else 0
    driver = kexts(arch)[1]
    built = xnu.build(
        layout,
        arch,
        PROCESSES,
        banner=banner_of(name),
        slide=slide,
        uuid=UUID,
        kexts=kexts(arch),
        cdevsw={3: {"d_read": driver.address + driver.hdr_size + 0x20}},
        msgbuf=MESSAGES,
        parts=[everything],
        core=xnu.CoreShape(cpus=2 if arch == "arm64" else 1),
    )
    built.truth["ram"].finish(built)
    return built
