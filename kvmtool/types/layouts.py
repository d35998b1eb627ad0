"""The built-in layouts: structure offsets of real kernels, from 10.4 to 15, without a debug kit.

tools/build_layouts.py compiles them into data/layouts.bin; docs/layouts.md says where the numbers
come from. A kernel is found by its xnu release and architecture, never by the OS version: `pmap`
changes between kernels that all call themselves 10.11.6.

The file is a `resource` of streams. The first is the index: the structures' tags, a line each; an
empty line; for each kernel a line "name, releases, origin" with tabs between; NUL; then for each
kernel one byte per structure: 0 if the kernel has none of that name, else the number of its layout
from 1. Then a stream per structure: the members' names, a line each, bit-fields with a colon in
front; NUL; and a row of u16 per layout: the size, for each name the distance from the member before
it (0x8001: not in this layout), and for each bit-field (bit_size + 1) << 8 | bit_offset. Layouts of
one structure differ little, so rows repeat each other nearly and zlib does the rest; one row is
read without its neighbours.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_left
from struct import Struct as Record
from typing import NamedTuple

from kvmtool.errors import NotFoundError
from kvmtool.types.flatten import Member, Struct
from kvmtool.types.layout_types import LayoutTypes
from kvmtool.types.model import TypeTable
from kvmtool.types.near import near_misses
from kvmtool.types.resource import DATA, Resource

MAGIC = b"KVMLAYT1"
ABSENT = 0x8001
BIT_FIELD = ":"
PATH = os.path.join(DATA, "layouts.bin")

# Typedef names by which a structure is known at least as well as by its tag.
ALIASES = {
    "OSKextLoadedKextSummary": "_loaded_kext_summary",  # libkern/OSKextLibPrivate.h
    "OSKextLoadedKextSummaryHeader": "_loaded_kext_summary_header",
    "vm_map": "_vm_map",  # osfmk/vm/vm_map.h
}
# Kernels of these run on, and are laid out as, the plain architecture.
_SAME_ARCH = {"arm64e": "arm64", "x86_64h": "x86_64"}
# Parts of a kernel configuration's name (RELEASE_ARM64_T8101); arm64 and arm are different parts.
_CONFIG_ARCH = {"I386": "i386", "ARM64": "arm64", "ARM": "arm", "PPC": "ppc"}


class Banner(NamedTuple):
    """What a kernel's `version` string says of it."""

    xnu: str  # "2422.115.4": without the build count that may follow a "~"
    config: str  # "RELEASE_X86_64"
    arch: str  # "x86_64", "i386", "arm64", "arm", "ppc"
    darwin: str  # "13.4.0"


class Choice(NamedTuple):
    """A layout for a kernel: `how` is one sentence for the user, `exact` the very release's own."""

    table: TypeTable
    how: str
    exact: bool


class _Kernel(NamedTuple):
    name: str
    arch: str
    releases: tuple[str, ...]
    origin: str


class _Database:
    """data/layouts.bin, with its index decoded and every structure still packed."""

    def __init__(self, path: str) -> None:
        self._resource = Resource(path, MAGIC)
        text, _, self._matrix = self._resource.stream(0).partition(b"\0")
        tags, _, kernels = text.decode().partition("\n\n")
        self.tags = tags.split("\n")
        self.kernels = [_kernel(line) for line in kernels.split("\n")]
        self._number = {tag: number for number, tag in enumerate(self.tags)}

    def table(self, kernel: int) -> TypeTable:
        columns = len(self.tags)
        row = self._matrix[kernel * columns : (kernel + 1) * columns]
        tags = [tag for tag, layout in zip(self.tags, row, strict=True) if layout]

        def load(tag: str) -> Struct:
            number = self._number[tag]
            return _decode(tag, self._resource.stream(1 + number), row[number] - 1)

        def texts(tag: str) -> dict[str, str]:
            from kvmtool.types.layout_texts import texts_of

            number = self._number[tag]
            names = _names(self._resource.stream(1 + number))
            return texts_of(
                tag, number, row[number] - 1, [n.removeprefix(BIT_FIELD) for n in names]
            )

        found = self.kernels[kernel]
        wide = 4 if found.arch == "i386" else 8
        source = LayoutTypes(found.name, found.origin, tags, load, ALIASES, wide, texts)
        return TypeTable(source, source.flat)


def _kernel(line: str) -> _Kernel:
    name, releases, origin = line.split("\t")
    return _Kernel(name, name.rpartition(" ")[2], tuple(releases.split()), origin)


def _names(block: bytes) -> list[str]:
    """The members' names in a structure's stream, bit-fields with their mark."""
    return block[: block.index(b"\0")].decode().split("\n")


def _decode(tag: str, block: bytes, layout: int) -> Struct:
    """Layout number `layout` (from 0) of the structure whose stream is `block`."""
    names, rows = _names(block), block[block.index(b"\0") + 1 :]
    bit_fields = sum(name.startswith(BIT_FIELD) for name in names)
    record = Record(f"<{1 + len(names) + bit_fields}H")
    size, *cells = record.unpack_from(rows, layout * record.size)
    codes = iter(cells[len(names) :])
    members = []
    offset = 0
    for name, distance in zip(names, cells, strict=False):
        code = next(codes) if name.startswith(BIT_FIELD) else 0
        if distance == ABSENT:
            continue
        offset = offset + distance & 0xFFFF
        if code:
            members.append(Member(name[1:], offset, code & 0xFF, (code >> 8) - 1))
        else:
            members.append(Member(name.removeprefix(BIT_FIELD), offset, None, None))
    members.sort(key=lambda member: (member.offset, member.bit_offset or 0))
    return Struct(tag, size, {member.name: member for member in members})


@functools.cache
def _database() -> _Database:
    return _Database(PATH)


@functools.cache
def _table(kernel: int) -> TypeTable:
    return _database().table(kernel)


def names() -> list[str]:
    """The database's names of its layouts, oldest first within i386, x86_64, arm64."""
    return [kernel.name for kernel in _database().kernels]


def table(name: str) -> TypeTable:
    """The layouts of that name ("10.4.11 i386"). Raises: NotFoundError("layout"), near misses."""
    known = names()
    if name not in known:
        version, _, arch = name.rpartition(" ")
        builds = [other for other in known if other.startswith(version + "-") and arch in other]
        raise NotFoundError("layout", name, (builds + near_misses(name, known))[:3])
    return _table(known.index(name))


def choose(xnu: str | None, arch: str) -> Choice:
    """The layouts to try first for a kernel of release `xnu` ("2422.115.4") on `arch`.

    Its own release's if known; else the nearest release below; else, nothing being below, the
    nearest above. Whether they fit must be checked against the kernel's memory.

    Raises: NotFoundError("layout") if there is none for `arch`, or `xnu` is not a release.
    """
    return candidates(xnu, arch)[0]


def candidates(xnu: str | None, arch: str) -> list[Choice]:
    """What `choose` chooses, then the nearest release above if that was not exact. As `choose`."""
    arch = _SAME_ARCH.get(arch, arch)
    known = _releases(arch)
    wanted = _release(xnu or "")
    if not wanted:
        given = "an unknown xnu release" if xnu is None else f"xnu release {xnu!r}"
        raise NotFoundError("layout", f"for {given} on {arch}", (), "name one of the built-in ones")
    at = bisect_left(known, (wanted,))
    if at < len(known) and known[at][0] == wanted:
        return [_choice(known[at][1:], "exactly this kernel's release", exact=True)]
    found = []
    if at > 0:
        why = f"the nearest release below this kernel's {xnu}"
        found.append(_choice(known[at - 1][1:], why, exact=False))
    if at < len(known):
        why = f"the nearest release above this kernel's {xnu}"
        why += "" if found else ", none being below"
        found.append(_choice(known[at][1:], why, exact=False))
    return found


def _releases(arch: str) -> list[tuple[tuple[int, ...], str, int]]:
    """The releases known for `arch`, oldest first: to compare, as written, the kernel's number."""
    kernels = _database().kernels
    known = sorted(
        (_release(release), release, number)
        for number, kernel in enumerate(kernels)
        if kernel.arch == arch
        for release in kernel.releases
    )
    if not known:
        have = ", ".join(dict.fromkeys(kernel.arch for kernel in kernels))
        raise NotFoundError("layout", f"for {arch}", (), f"built-in ones are for {have}")
    return known


def _choice(found: tuple[str, int], why: str, exact: bool) -> Choice:
    release, number = found
    types = _table(number)
    return Choice(types, f"layout of {types.name} (xnu {release}; {types.origin}): {why}", exact)


def _release(text: str) -> tuple[int, ...]:
    """The leading numbers of an xnu release: "xnu-1228.15.4~1" is (1228, 15, 4)."""
    numbers = []
    for part in text.removeprefix("xnu-").partition("~")[0].split("."):
        if not (part.isascii() and part.isdecimal() and len(part) < 10):
            break
        numbers.append(int(part))
    return tuple(numbers)


def parse_banner(banner: str) -> Banner | None:
    """What `version` (osfmk/conf/version.c, filled in by the build) says; None if it is no banner.

    It reads "Darwin Kernel Version 13.4.0: DATE; BUILDER:xnu-2422.115.4~1/RELEASE_X86_64", with
    folders of the builder's before and after the xnu part in kernels that were not built by Apple.
    """
    _, _, text = banner.partition("Darwin Kernel Version ")
    darwin, _, text = text.partition(":")
    _, _, built = text.partition(";")
    path = "".join(built.split("\0")[0].split()[:1]).split("/")
    config = path[-1]
    arch = _config_arch(config)
    for part in path:
        component = part.rpartition(":")[2]
        release = _release(component.partition("-")[2]) if component.startswith("xnu") else ()
        if release and arch:
            return Banner(".".join(map(str, release)), config, arch, darwin)
    return None


def _config_arch(config: str) -> str:
    """The architecture in a configuration's name: x86_64 of RELEASE_X86_64; "" if there is none."""
    if "_X86_64" in config:
        return "x86_64"
    return next((_CONFIG_ARCH[part] for part in config.split("_") if part in _CONFIG_ARCH), "")
