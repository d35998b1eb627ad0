"""The kernel's variables and tables besides the process lists.

Device switches (bsd/dev/*/conf.c, 10.4's rows), the low-globals page (osfmk/*/lowglobals.h), the
load average, the message buffer, and the loaded kexts.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from tests.builders import macho
from tests.builders.heap import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.builders.heap import Memory, Region, Types
    from tests.builders.image import KernelImage
    from tests.builders.specs import KextSpec

MSG_MAGIC = 0x063061  # <sys/msgbuf.h>
FSCALE = 2048  # <sys/resource.h> 1 << FSHIFT
_SLOTS = [
    "d_open",
    "d_close",
    "d_read",
    "d_write",
    "d_ioctl",
    "d_stop",
    "d_reset",
    "d_select",
    "d_mmap",
]

# major: d_open d_close d_read d_write d_ioctl d_stop d_reset d_select, d_type (1 tape 2 disk 3 tty)
CDEVSW = {
    0: ("cnopen cnclose cnread cnwrite cnioctl nulldev nulldev cnselect", 3),
    2: ("cttyopen nulldev cttyread cttywrite cttyioctl nulldev nulldev cttyselect", 3),
    3: ("nulldev nulldev mmread mmwrite mmioctl nulldev nulldev seltrue", 1),
    4: ("ptsopen ptsclose ptsread ptswrite ptyioctl ptsstop nulldev ttselect", 3),
    5: ("ptcopen ptcclose ptcread ptcwrite ptyioctl nulldev nulldev ptcselect", 3),
    6: ("logopen logclose logread enodev logioctl enodev nulldev logselect", 0),
    12: ("kmopen kmclose kmread kmwrite kmioctl nulldev nulldev ttselect", 0),
}
NCHRDEV, NBLKDEV = 42, 24

# Low globals: eyecatcher, {symbol: offset of the pointer to it}, offset of stext.
_LOW_GLOBALS = {
    "i386": (b"Catfish ", {"_version": 0x1C, "_kmod": 0x480, "_osversion": 0x494}, None),
    "x86_64": (b"Catfish ", {"_version": 0x30, "_kmod": 0x8F8, "_osversion": 0x920}, 0x10),
    "arm64": (b"Kraken  ", {"_version": 0x18, "_osversion": 0x20, "_kmod": 0x28}, 0x10),
}
LOW_GLOBALS_ALIAS = {
    "i386": 0x2000,
    "x86_64": 0xFFFFFF8000002000,
    "arm64": 0xFFFFFE0000004000,
}


class Statics:
    """Plants them; each method returns its part of the truth."""

    def __init__(
        self, types: Types, memory: Memory, image: KernelImage, zones: dict[str, Region]
    ) -> None:
        self._types = types
        self._memory = memory
        self._image = image
        self._zones = zones

    def version(self, banner: str, osversion: str, hostname: str) -> dict[str, Any]:
        """`version`, its numbers, `osversion`, `hostname`."""
        image, memory = self._image, self._memory
        image.const("_version", banner.encode() + b"\0")
        found = re.search(r"Version (\d+)\.(\d+)\.(\d+)", banner)
        if not found:
            raise ValueError(f"no Darwin version in {banner!r}")
        for part, number in zip(("major", "minor", "revision"), found.groups(), strict=True):
            image.init(image.table(f"_version_{part}", 4, align=4), struct.pack("<I", int(number)))
        memory.write(image.variable("_osversion", 256), osversion.encode())
        memory.write(image.variable("_hostname", 256), hostname.encode())
        return {"banner": banner, "osversion": osversion, "hostname": hostname}

    def load(self, averages: Sequence[int]) -> dict[str, Any]:
        """struct loadavg averunnable: fixpt_t ldavg[3]; long fscale."""
        width = self._memory.width
        at = self._image.variable("_averunnable", macho.up(12, width) + width)
        self._memory.write(at, struct.pack("<3I", *averages))
        self._memory.put_pointer(at + macho.up(12, width), FSCALE)
        return {"loadavg": list(averages), "fscale": FSCALE}

    def cdevsw(
        self, pinned: int | None, patches: Mapping[int, Mapping[str, int]]
    ) -> dict[str, Any]:
        """_cdevsw and _nchrdev; `patches` {major: {d_read: address}} is what kexts changed."""
        image, types, memory = self._image, self._types, self._memory
        size = types.layout.size("cdevsw")
        table = image.table("_cdevsw", NCHRDEV * size, align=32, pinned=pinned)
        entries = []
        for major in range(NCHRDEV):
            names, d_type = CDEVSW.get(major, ("enodev " * 8, 0))
            at = table + major * size
            entry = {
                slot: image.function(f"_{name}")
                for slot, name in zip(_SLOTS, [*names.split(), "enodev"], strict=True)
            }
            entry["d_strategy"] = image.function("_enodev_strat")
            spare = ("d_getc", "d_putc", "d_reserved_1", "d_reserved_2")
            entry |= dict.fromkeys(spare, image.function("_enodev"))
            entry = {slot: to for slot, to in entry.items() if types.has("cdevsw", slot)}
            for slot, function in entry.items():
                place = at + types.offset("cdevsw", slot)
                image.init_pointer(place, function, code=True)
            image.init(at + types.offset("cdevsw", "d_type"), struct.pack("<I", d_type))
            for slot, function in patches.get(major, {}).items():
                place = at + types.offset("cdevsw", slot)
                memory.put_pointer(place, types.sign(function, place))
                entry[slot] = function
            entries.append(entry | {"d_type": d_type})
        image.init(image.table("_nchrdev", 4, align=4), struct.pack("<I", NCHRDEV))
        return {"cdevsw": entries}

    def bdevsw(self, pinned: int | None) -> dict[str, Any]:
        """_bdevsw and _nblkdev, no block device being there."""
        image, types = self._image, self._types
        size = types.layout.size("bdevsw")
        table = image.table("_bdevsw", NBLKDEV * size, align=32, pinned=pinned)
        for at in range(table, table + NBLKDEV * size, size):
            for slot in ("d_open", "d_close", "d_strategy", "d_ioctl", "d_dump", "d_psize"):
                name = "_enodev_strat" if slot == "d_strategy" else "_enodev"
                place = at + types.offset("bdevsw", slot)
                image.init_pointer(place, image.function(name), code=True)
        image.init(image.table("_nblkdev", 4, align=4), struct.pack("<I", NBLKDEV))
        return {"nblkdev": NBLKDEV, "nchrdev": NCHRDEV}

    def message_buffer(self, text: str) -> dict[str, Any]:
        """msgbuf: inline until 10.4, a pointer to the characters from 10.5 on; not wrapped."""
        types, memory, zone = self._types, self._memory, self._zones["kalloc"]
        content = text.encode()
        record = Record(types, zone, "msgbuf")
        # 10.6's x86_64 alone has 64-bit numbers here
        wide = types.offset("msgbuf", "msg_bufr") - types.offset("msgbuf", "msg_bufx") == 8
        number = record.u64 if wide else record.u32
        number("msg_magic", MSG_MAGIC)
        number("msg_bufx", len(content))
        place = record.place("msg_bufc")
        if types.has("msgbuf", "msg_size"):
            number("msg_size", 0x4000)
            place = zone.alloc(0x4000)
            record.ptr("msg_bufc", place)
        memory.write(place, content)
        memory.put_pointer(self._image.variable("_msgbufp", memory.width), record.address)
        return {"msgbuf": {"address": record.address, "text": text}}

    def kexts(self, kexts: Sequence[KextSpec]) -> dict[str, Any]:
        """_kmod's chain (last loaded first) and, from 10.7 on, _gLoadedKextSummaries."""
        memory, width = self._memory, self._memory.width
        infos: dict[str, Record] = {}
        for number, kext in enumerate(kexts, 1):
            infos[kext.name] = self._kext(number, kext, infos)
        for kext in kexts:
            users = sum(kext.name in other.references for other in kexts)
            infos[kext.name].u32("reference_count", users)
        chain = [infos[kext.name].address for kext in reversed(kexts)]
        place = self._image.variable("_kmod", width)
        for address in chain:
            memory.put_pointer(place, address)
            place = address + self._types.offset("kmod_info", "next")
        if self._types.has("_loaded_kext_summary_header"):
            self._summaries(kexts)
        found = [
            {"name": k.name, "version": k.version, "address": k.address, "size": k.size}
            | {"uuid": k.uuid, "kmod_info": infos[k.name].address}
            for k in kexts
        ]
        return {"kexts": found}

    def _kext(self, number: int, kext: KextSpec, loaded: Mapping[str, Record]) -> Record:
        types = self._types
        region = self._memory.region(kext.name, kext.address)
        region.alloc(kext.size)
        region.write(kext.address, _kext_header(self._image.arch, kext))
        region.write(kext.address + kext.hdr_size, kext.image)
        place = kext.address + kext.size - macho.up(types.layout.size("kmod_info"), 16)
        info = Record(types, region, "kmod_info", place)
        info.u32("info_version", 1)
        info.u32("id", number)
        info.text("name", kext.name, 64)
        info.text("version", kext.version, 64)
        for member in ("address", "size", "hdr_size"):
            info.word(member, getattr(kext, member))
        info.ptr("start", kext.address + kext.hdr_size)
        info.ptr("stop", kext.address + kext.hdr_size + 16)
        previous = 0
        for name in kext.references:  # struct kmod_reference { next, info }
            reference = self._zones["kalloc"].alloc(2 * types.width)
            self._memory.put_pointer(reference, previous)
            self._memory.put_pointer(reference + types.width, loaded[name].address)
            previous = reference
        info.ptr("reference_list", previous)
        return info

    def _summaries(self, kexts: Sequence[KextSpec]) -> None:
        """OSKextLoadedKextSummaryHeader and its entries, one after the other."""
        types, zone = self._types, self._zones["kalloc"]
        entry_size = types.layout.size("_loaded_kext_summary")
        first = types.offset("_loaded_kext_summary_header", "summaries")
        at = zone.alloc(first + len(kexts) * entry_size)
        header = Record(types, zone, "_loaded_kext_summary_header", at)
        header.u32("version", 2)
        header.u32("entry_size", entry_size)
        header.u32("numSummaries", len(kexts))
        for number, kext in enumerate(kexts):
            place = at + first + number * entry_size
            entry = Record(types, zone, "_loaded_kext_summary", place)
            entry.text("name", kext.name, 64)
            if kext.uuid:
                self._memory.write(entry.place("uuid"), kext.uuid)
            entry.u64("address", kext.address)
            entry.u64("size", kext.size)
            entry.u64("version", kext_version(kext.version))
            entry.u32("loadTag", number + 1)
            entry.u64("text_exec_address", kext.address, maybe=True)
            entry.u64("text_exec_size", kext.size, maybe=True)
        place = self._image.variable("_gLoadedKextSummaries", types.width)
        self._memory.put_pointer(place, at)

    def low_globals(self, stext: int | None) -> int:
        """The page `lowGlo`, to be called when all else has its address; gives its address."""
        image = self._image
        eyecatcher, pointers, stext_at = _LOW_GLOBALS[image.arch]
        page = image.table("_lowGlo", self._memory.page, align=self._memory.page)
        image.init(page, eyecatcher)
        for symbol, offset in pointers.items():
            image.init_pointer(page + offset, image.symbols[symbol] + image.slide)
        if stext is not None and stext_at is not None:
            image.init_pointer(page + stext_at, stext)
        if image.arch == "arm64":  # layout 3.0, magic, page shift
            image.init(page + 0x78, struct.pack("<2Q", 3, 0xC0DEC0DE))
            image.init(page + 0xC8, struct.pack("<Q", 14))
        return page


def kext_version(version: str) -> int:
    """The number OSKextParseVersionString (libkern/OSKextLib.cpp) makes of a release's version."""
    major, minor, revision = (*map(int, version.split(".")), 0, 0)[:3]
    return major * 10**8 + minor * 10**6 + revision * 10**4 + 9 * 10**3


def _kext_header(arch: str, kext: KextSpec) -> bytes:
    """The Mach-O header at the start of a loaded kext; 32-bit ones are objects."""
    filetype = macho.MH_OBJECT if arch == "i386" else macho.MH_KEXT_BUNDLE
    image = macho.MachO(arch, filetype)
    image.segment("__TEXT", kext.address, vmsize=kext.size, filesize=0)
    if kext.uuid is not None:
        image.uuid(kext.uuid)
    return image.head()
