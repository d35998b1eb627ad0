"""A whole XNU crash: the kernel's file and an MH_CORE of its memory, for any layout.

    built = build(layouts.table("10.9.5 x86_64"), "x86_64", [ProcSpec(1, "launchd", ppid=0)],
                  banner=..., slide=0xa00000, uuid=bytes(16))
    built.kernel, built.core, built.symbols["_allproc"], built.truth["processes"]

What a release has is asked of its layout, member by member; there is no version number in here.
Values and places are made up, structures are the release's own.
"""

from __future__ import annotations

import contextlib
import struct
import uuid as uuids
from typing import TYPE_CHECKING, Any

from tests.builders import macho
from tests.builders.ground import Ground
from tests.builders.heap import Memory, Signer, Types
from tests.builders.image import KernelImage, Places, default_places
from tests.builders.macho import Sym
from tests.builders.procs import Processes
from tests.builders.specs import KERNEL_TASK, CoreShape, KextSpec, ProcSpec
from tests.builders.statics import LOW_GLOBALS_ALIAS, Statics

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from tests.builders.ground import Part
    from tests.builders.heap import Layout, Region

__all__ = [
    "KERNEL_TASK",
    "Built",
    "CoreShape",
    "KextSpec",
    "Places",
    "ProcSpec",
    "build",
    "filler_symbols",
    "has_kaslr",
]

_TEXT = {"x86_64": 0xFFFFFF8000200000, "arm64": 0xFFFFFE0007004000}
_HEAP = {"i386": 0x25000000, "x86_64": 0xFFFFFF8015000000, "arm64": 0xFFFFFE2400000000}
_ZONES = ("proc", "task", "thread", "proc_ro", "ucred", "kalloc")
_ZONE_STEP = {"i386": 0x2000000, "x86_64": 0x8000000, "arm64": 0x8000000}
_VA_BITS = {"x86_64": 48, "arm64": 47}  # 64 - T1SZ of macOS on arm64

# What arm64e kernels sign (XNU_PTRAUTH_SIGNED_PTR), all since xnu-8019 (macOS 12); code pointers,
# such as those of cdevsw, were signed before.
_SIGNED = frozenset(
    {
        ("proc", "p_pptr"),
        ("proc", "p_pgrp"),
        ("proc", "task"),
        ("task", "bsd_info"),
        ("thread", "task"),
        ("task", "map"),
        ("_vm_map", "pmap"),
        ("processor", "active_thread"),
        ("filedesc", "fd_ofiles"),
        ("fileproc", "fp_glob"),
        ("fileglob", "fg_ops"),
        ("fileglob", "fg_data"),
        ("", "initproc"),
    }
)


class Built:
    """A built crash: `kernel` and `core` are files, `symbols` are unslid, `truth` is what is."""

    def __init__(
        self,
        arch: str,
        memory: Memory,
        image: KernelImage,
        kernel: bytes,
        truth: dict[str, Any],
        shape: CoreShape,
        low_globals: tuple[int, int] | None,
        types: Types,
    ) -> None:
        self.arch = arch
        self.memory = memory
        self.kernel = kernel
        self.symbols = image.symbols
        self.slide = image.slide
        self.truth = truth
        self.shape = shape
        self._low_globals = low_globals
        self._types = types
        self.core = self.dump()

    def address(self, symbol: str) -> int:
        """Where `symbol` lies in memory."""
        return self.symbols[symbol] + self.slide

    def process(self, pid: int) -> dict[str, Any]:
        """The truth about one process."""
        found: dict[str, Any] = next(p for p in self.truth["processes"] if p["pid"] == pid)
        return found

    def runs(self, pages: int = 16) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of all memory, whole pages, ascending; for dumps of other formats."""
        found = list(self.memory.runs(pages))
        if self._low_globals is not None:
            alias, page = self._low_globals
            found.append((alias, self.memory.read(page, self.memory.page)))
        return iter(sorted(found))

    def kernel_version_string(self) -> str:
        """kdp_kernelversion_string: what LC_IDENT and "kern ver str" hold."""
        text: str = self.truth["banner"]
        if self.truth["uuid"] is not None:
            text += f"; UUID={str(uuids.UUID(bytes=self.truth['uuid'])).upper()}"
        if self.slide:
            text += f"; stext={self.address('__mh_execute_header'):#x}"
        return text

    def dump(self, shape: CoreShape | None = None, *, without: Collection[int] = ()) -> bytes:
        """The memory as MH_CORE; pages that hold an address of `without` are left out."""
        return _Core(self, shape or self.shape, without).write()

    @contextlib.contextmanager
    def patched(self, address: int, data: bytes) -> Iterator[None]:
        """Memory with other bytes at `address` for as long as the context lasts."""
        before = self.memory.read(address, len(data))
        self.memory.write(address, data)
        try:
            yield
        finally:
            self.memory.write(address, before)

    def cyclic(self, pid: int, back_to: int) -> bytes:
        """The core with allproc closed into a ring: after `pid` comes `back_to` again."""
        place = self.process(pid)["address"] + self._types.offset("proc", "p_list")
        with self.patched(place, self.memory.pointer(self.process(back_to)["address"])):
            return self.dump()


class _Core:
    """One MH_CORE in the making."""

    def __init__(self, built: Built, shape: CoreShape, without: Collection[int]) -> None:
        self._built = built
        self._shape = shape
        page = built.memory.page
        self._absent = {address // page * page for address in without}
        if not shape.header:
            self._absent.add(built.address("__mh_execute_header"))

    def write(self) -> bytes:
        shape, built = self._shape, self._built
        core = macho.MachO(built.arch, macho.MH_CORE)
        if shape.thread_first:
            self._threads(core)
        runs = list(self._runs())
        if shape.unsorted:
            runs = runs[1::2] + runs[::2]
        if shape.overlap:
            runs = self._overlapped(runs)
        for address, content in runs:
            core.segment("", address, content)
        if shape.past_end:
            beyond = runs[-1][0] + len(runs[-1][1]) + 16 * built.memory.page
            size = built.memory.page
            core.segment("", beyond, vmsize=size, filesize=size, fileoff=0x7FFF0000)
        self._facts(core)
        if not shape.thread_first:
            self._threads(core)
        if not shape.extra_ncmds:
            return core.build()
        # as the writers of 10.4 to 10.7: four more sections are counted in sizeofcmds
        ncmds = struct.unpack_from("<I", core.head(), 16)[0] + shape.extra_ncmds
        return core.build(ncmds=ncmds, sizeofcmds=core.head_size() + 4 * 68)

    def _runs(self) -> Iterator[tuple[int, bytes]]:
        """The memory in runs, cut where a page is to be left out."""
        page = self._built.memory.page
        for address, content in self._built.runs(self._shape.pages):
            start = 0
            for at in range(0, len(content), page):
                if address + at in self._absent:
                    if at > start:
                        yield address + start, content[start:at]
                    start = at + page
            if start < len(content):
                yield address + start, content[start:] if start else content

    def _overlapped(self, runs: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Kernel segments come first; the same range follows among the others, with other bytes."""
        low = self._built.address("__mh_execute_header")
        high = self._built.address("_kernproc") + 1
        kernel = [run for run in runs if low <= run[0] < high]
        stale = [(address, b"\xa5" * len(content)) for address, content in kernel]
        rest = [run for run in runs if not low <= run[0] < high]
        return kernel + sorted(stale + rest)

    def _threads(self, core: macho.MachO) -> None:
        built = self._built
        pc = built.address("_Debugger")
        names = {"i386": ("eip", "esp"), "x86_64": ("rip", "rsp"), "arm64": ("pc", "sp")}
        counter, stack = names[built.arch]
        known = built.truth.get("registers")
        registers = {counter: pc, stack: built.truth["kernel_task"]}
        for cpu in range(self._shape.cpus):
            state = registers if cpu == 0 else {}
            if known is not None:
                frame = {"i386": "ebp", "x86_64": "rbp", "arm64": "fp"}[built.arch]
                one = known[cpu]
                state = {counter: one["pc"], stack: one["sp"], frame: one["fp"]}
            core.thread(macho.thread_state(built.arch, **state))

    def _facts(self, core: macho.MachO) -> None:
        built, shape = self._built, self._shape
        text = built.kernel_version_string()
        if shape.ident:
            core.ident(text)
        stext = built.address("__mh_execute_header")
        uuid = built.truth["uuid"] or bytes(16)
        notes = {
            "main bin spec": struct.pack("<2IQ16s2I", 1, 1, stext, uuid, 0, 0),
            "main bin spec v2": struct.pack("<2I2Q16s2I", 2, 1, stext, built.slide, uuid, 0, 0),
            "kern ver str": struct.pack("<I256s", 1, text.encode()),
            "addrable bits": struct.pack("<2IQ", 3, _VA_BITS.get(built.arch, 32), 0),
        }
        for name in shape.notes:
            core.note(name.removesuffix(" v2"), notes[name])


def build(
    layout: Layout,
    arch: str,
    procs: Sequence[ProcSpec],
    *,
    banner: str,
    slide: int = 0,
    uuid: bytes | None = None,
    kexts: Sequence[KextSpec] = (),
    cdevsw: Mapping[int, Mapping[str, int]] | None = None,
    loadavg: Sequence[int] = (2048, 1024, 512),
    osversion: str = "8I127",
    hostname: str = "built.local",
    msgbuf: str = "standard timeslicing quantum is 10000 us\n",
    maxproc: int = 1064,
    places: Places | None = None,
    pinned: Mapping[str, int] | None = None,
    low_globals_alias: bool | None = None,
    keep_linkedit: bool = False,
    functions: Sequence[str] = (),
    more_symbols: Sequence[Sym] = (),
    core: CoreShape | None = None,
    parts: Sequence[Part] = (),
) -> Built:
    """Kernel and core of a machine that runs `procs` (given oldest first; pid 0 is added).

    `arch` is i386, x86_64 or arm64 and must be the layout's; `cdevsw` patches rows of the running
    table ({major: {"d_read": address}}); `pinned` fixes (unslid) addresses of "_cdevsw" and
    "_bdevsw", `places` those of the segments; `functions` and `more_symbols` only add symbols;
    `keep_linkedit` leaves the symbol table in memory, so that the core alone is enough. `slide`
    is a multiple of the page size. Each of `parts` plants what else there is and adds to the truth.
    Addresses in the truth are those in memory.
    """
    pinned = pinned or {}
    types, memory, image, zones = _ground(layout, arch, slide, places)
    statics = Statics(types, memory, image, zones)
    truth: dict[str, Any] = {"arch": arch, "layout": layout.name, "slide": slide, "uuid": uuid}
    truth |= statics.cdevsw(pinned.get("_cdevsw"), cdevsw or {})
    truth |= statics.bdevsw(pinned.get("_bdevsw"))
    for name in ("_panic", "_Debugger", *functions):
        image.function(name)
    truth |= statics.version(banner, osversion, hostname)
    truth |= statics.load(loadavg)
    truth |= statics.message_buffer(msgbuf)
    truth |= statics.kexts(kexts)
    processes = Processes(types, memory, image, zones, procs, maxproc)
    truth |= processes.plant()
    for part in parts:
        truth |= part(Ground(types, memory, image, zones, processes))
    stext = _kaslr(image, layout) if slide or has_kaslr(layout) else None
    page = statics.low_globals(stext)
    kernel = image.finish(
        uuid,
        more_symbols,
        absolute_header=not has_kaslr(layout),
        keep_linkedit=keep_linkedit,
    )
    aliased = arch != "x86_64" if low_globals_alias is None else low_globals_alias
    alias = (LOW_GLOBALS_ALIAS[arch], page) if aliased else None
    return Built(arch, memory, image, kernel, truth, core or CoreShape(), alias, types)


def _ground(
    layout: Layout, arch: str, slide: int, places: Places | None
) -> tuple[Types, Memory, KernelImage, dict[str, Region]]:
    """Empty memory with an empty kernel and empty zones in it."""
    machine = macho.MACHINES[arch]
    if slide % machine.page:
        raise ValueError(f"slide {slide:#x} is not a multiple of the page size")
    places = places or default_places(arch, _text_base(arch, layout))
    memory = Memory(machine.width, machine.page)
    sign = Signer(_VA_BITS["arm64"] if arch == "arm64" else None)
    types = Types(layout, machine.width, sign, _signed(layout))
    image = KernelImage(arch, memory, places, slide, sign)
    zones = {
        name: memory.region(name, _HEAP[arch] + slide + number * _ZONE_STEP[arch])
        for number, name in enumerate(_ZONES)
    }
    return types, memory, image, zones


def has_kaslr(layout: Layout) -> bool:
    """xnu-2050 (10.8) slid the kernel; no structure says so, but uu_thread is as old."""
    return layout.has("uthread", "uu_thread") or layout.has("thread", "t_tro")


def _text_base(arch: str, layout: Layout) -> int:
    """The link address of __TEXT; 32-bit kernels moved with xnu-1486 (10.6), as thread_id came."""
    if arch != "i386":
        return _TEXT[arch]
    return 0x200000 if layout.has("thread", "thread_id") else 0x111000


def _signed(layout: Layout) -> frozenset[tuple[str, str]]:
    wrapped = ("p_pgrp.__hazard_ptr", "p_pgrp.__smr_ptr")
    return _SIGNED if any(layout.has("proc", member) for member in wrapped) else frozenset()


def _kaslr(image: KernelImage, layout: Layout) -> int:
    """_vm_kernel_slide, _vm_kernel_stext; gives the latter."""
    width = image.memory.width
    stext = image.places.text + image.slide
    image.memory.put_pointer(image.variable("_vm_kernel_slide", width), image.slide)
    image.memory.put_pointer(image.variable("_vm_kernel_stext", width), stext)
    return stext


def filler_symbols(count: int, start: int, step: int = 16) -> list[Sym]:
    """Symbols for kernels whose only point is to have many."""
    return [Sym(f"_filler_function_{n:06}", start + n * step) for n in range(count)]
