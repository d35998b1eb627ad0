"""Compile the layout database: python tools/build_layouts.py [FOLDER]

FOLDER (default ../shared/data/layouts) holds
  xnu_layouts.json.gz              about 50 structures of 35 kernels, 10.4 to 15
  kdk_layouts_10.5-10.13.json.gz   139 structures of 131 kernels, from Apple's debug kits
  kdk_kernels.csv                  the xnu release of each of those kernels
The result is kvmtool/data/layouts.bin, whose form kvmtool/types/layouts.py describes. What the
numbers are worth, docs/layouts.md says.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import struct
import sys
import zlib
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kvmtool.types.layouts import ABSENT, ALIASES, BIT_FIELD, MAGIC, PATH  # noqa: E402

INPUTS = os.path.join(ROOT, "..", "shared", "data", "layouts")
KIT = "built-in, from Apple's debug kit"
COMPUTED = "built-in, computed from public headers"
ARCHES = ("i386", "x86_64", "arm64")

# Releases the inputs do not name: (name in the inputs, arch) to release.
MORE_RELEASES = {
    # Apple's list of sources gives this release for OS X 10.10.4; the kit's kernel has no banner.
    ("Yosemite_10.10.4_14E46", "x86_64"): "2782.30.5",
    # 10.13 itself, build 17A365, lies between this one and 10.13.1, and those two are laid out
    # alike in every structure.
    ("HighSierra_10.13_17A360a_17A362a", "x86_64"): "4570.1.46",
    # The sources of 11.0.1 are published with two more numbers than its kernels' banners show.
    ("11.0.1 arm64 (xnu-7195.50.7.100.1)", "arm64"): "7195.50.7",
    ("11.0.1 x86_64 (xnu-7195.50.7.100.1)", "x86_64"): "7195.50.7",
}

# The kits' timer_call (but 10.11's) is that of a source file compiled with a larger lock: it is
# larger than the room struct thread and struct processor leave for it.
LEFT_OUT = {"timer_call"}

# Of kernels without a kit the inputs do not have struct sysent. That of 10.4 is xnu-792's
# bsd/sys/sysent.h; from 10.11 on it is as the last kit has it, on arm64 too, since macOS has
# CONFIG_REQUIRES_U32_MUNGING there.
SYSENT_10_4 = (
    0x14,
    {
        "sy_narg": (0, 0),
        "sy_cancel": (2, 0),
        "sy_funnel": (3, 0),
        "sy_call": (4, 0),
        "sy_arg_munge32": (8, 0),
        "sy_arg_munge64": (12, 0),
        "sy_return_type": (16, 0),
    },
)
SYSENT_LAST = ("HighSierra_10.13.6_17G65", "x86_64")

# Nor do they have struct zone_security_flags: from osfmk/kern/zalloc_internal.h of the first xnu
# release that each is named by, its first bit-fields and their widths, the size of the whole, and
# where z_sig_eq is. Those of 11215 and 11417 are as Apple's debug kits of 15.3.1 and 15.4 say;
# there the third bit of z_kheap_id, which only 4 would need, is left out: heap 4 has no name.
ZONE_FLAGS: dict[str, tuple[str, int, int | None]] = {
    "8019.41": ("z_allows_foreign:1 z_kheap_id:2 z_noencrypt:1 z_submap_idx:2", 1, None),
    "8020.101": ("z_submap_idx:8 z_pgz_use_guards:1 z_submap_from_end:1 z_kheap_id:3", 2, None),
    "8796.141": ("z_submap_idx:8 z_kheap_id:2 z_kalloc_type:1 z_lifo:1", 4, 2),
    "11417.101": ("z_submap_idx:8 z_kheap_id:2", 8, 4),
}

Fields = dict[str, tuple[int, int]]  # name: (byte offset, bits), bits as _bits makes them
Structs = dict[str, tuple[int, Fields]]  # C tag: (size in bytes, fields)
Kits = dict[tuple[str, str], Structs]  # (kernel's name, arch): structs


class Kernel(NamedTuple):
    """One kernel of the database. `order` is its line in kdk_kernels.csv; `main` one of the 35.

    `kit` is the name of its debug kit there, "" if there is none.
    """

    version: str
    build: str
    arch: str
    releases: list[str]
    origin: str
    structs: Structs
    order: int
    main: bool
    kit: str

    def age(self) -> tuple[int, list[int], int]:
        return ARCHES.index(self.arch), _numbers(self.version), self.order


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _bits(first: int, size: int) -> int:
    """A bit-field in one number; never 0, which is no bit-field."""
    return (size + 1) << 8 | first


def read_kits(folder: str) -> Kits:
    with gzip.open(os.path.join(folder, "kdk_layouts_10.5-10.13.json.gz")) as packed:
        content = json.load(packed)
    kits: Kits = {}
    for name, arches in content.items():
        for arch, layouts in arches.items() if name not in LEFT_OUT else ():
            for layout in layouts:
                fields = {path: (at, _kit_bits(kind)) for path, at, kind in layout["members"]}
                for kernel in layout["kernels"]:
                    structs = kits.setdefault((kernel, arch), {})
                    mended = _mended(name, kernel, fields)
                    structs[ALIASES.get(name, name)] = layout["size"], mended
    return kits


def _mended(tag: str, kernel: str, fields: Fields) -> Fields:
    """In 10.13 two members became bit-fields where they were, which the kits' reader overlooked."""
    if tag == "zone_page_metadata" and "10.13" in kernel and fields["zindex"] == (22, 0):
        # xnu-4570.1.46 osfmk/kern/zalloc.c: ZINDEX_BITS 10, PAGECOUNT_BITS 6
        return fields | {"zindex": (22, _bits(0, 10)), "page_count": (23, _bits(2, 6))}
    return fields


def _kit_bits(kind: str) -> int:
    """Of a member's type: "bits2:5" are the bits 2, 3 and 4."""
    if not kind.startswith("bits"):
        return 0
    first, end = kind.removeprefix("bits").split(":")
    return _bits(int(first), int(end) - int(first))


def _field(at: int | list[Any]) -> tuple[int, int]:
    """A field of the 35: its offset, or [byte, "first bit-last bit"], "-" being of zero width."""
    if isinstance(at, int):
        return at, 0
    byte, bits = at
    first, _, last = bits.partition("-")
    return byte, _bits(int(first), int(last) - int(first) + 1) if first else _bits(0, 0)


def main_kernels(folder: str, kits: Kits, listed: list[dict[str, str]]) -> list[Kernel]:
    """The 35; those from debug kits with the kits' further structures and bit numbers."""
    with gzip.open(os.path.join(folder, "xnu_layouts.json.gz")) as packed:
        content = json.load(packed)["kernels"]
    lines = {(row["name"], row["arch"]): number for number, row in enumerate(listed)}
    kernels = []
    for name, found in content.items():
        plain, _, release = name.rstrip(")").partition(" (xnu-")
        version, arch = plain.split()
        structs = {
            tag: (known["size"], {field: _field(at) for field, at in known["fields"].items()})
            for tag, known in found["structs"].items()
        }
        key, line, origin, kit = (name, arch), 0, COMPUTED, ""
        if found["source"] == "kdk":
            key, origin, kit = (found["profile"], arch), KIT, found["profile"]
            line = lines[key]
            release = _release(listed[line])
            structs = _union(structs, kits[key])
        else:
            structs["sysent"] = SYSENT_10_4 if arch == "i386" else kits[SYSENT_LAST]["sysent"]
            if (flags := _zone_flags(release)) is not None:
                structs["zone_security_flags"] = flags
        releases = [release for release in (release, MORE_RELEASES.get(key)) if release]
        version = version.split("/")[0].rstrip("+")  # "11.5/11.6" and "10.15.6+": from there on
        kernels.append(Kernel(version, "", arch, releases, origin, structs, line, True, kit))
    return kernels


def _zone_flags(release: str) -> tuple[int, Fields] | None:
    """struct zone_security_flags of an xnu release; before 12.0.1 there was none."""
    known = [first for first in ZONE_FLAGS if _numbers(first) <= _numbers(release)]
    if not known:
        return None
    text, size, sig_eq = ZONE_FLAGS[known[-1]]
    fields, at = {} if sig_eq is None else {"z_sig_eq": (sig_eq, 0)}, 0
    for part in text.split():
        name, _, width = part.partition(":")
        fields[name] = (at // 8, _bits(at % 8, int(width)))
        at += int(width)
    return size, fields


def _release(row: dict[str, str]) -> str:
    return row["xnu"].removeprefix("xnu-").partition("~")[0]


def _union(first: Structs, kit: Structs) -> Structs:
    """The structures of both; a kit's fields win, because it knows the bits of bit-fields."""
    joined = dict(first)
    for tag, (size, fields) in kit.items():
        if tag in first:
            known_size, known = first[tag]
            differing = [f for f in known if f in fields and known[f][0] != fields[f][0]]
            if size != known_size or differing:
                raise ValueError(f"the inputs disagree on struct {tag}: {differing or 'size'}")
            fields = known | fields
        joined[tag] = size, fields
    return joined


def kit_kernels(listed: list[dict[str, str]], kits: Kits, main: list[Kernel]) -> list[Kernel]:
    """The other kernels of the debug kits, with what the kits lack lent by the nearest main one."""
    in_kits = {tag for structs in kits.values() for tag in structs}
    lenders = [kernel for kernel in main if kernel.origin == KIT]
    done = {(kernel.order, kernel.arch) for kernel in lenders}
    kernels = []
    for line, row in enumerate(listed):
        arch, key = row["arch"], (row["name"], row["arch"])
        if (line, arch) in done:
            continue
        lender = _nearest(line, row["version"], [k for k in lenders if k.arch == arch])
        lent = {tag: found for tag, found in lender.structs.items() if tag not in in_kits}
        releases = [release for release in (_release(row), MORE_RELEASES.get(key)) if release]
        as_in = f"{KIT}; {' and '.join(sorted(lent))} as in {lender.version}"
        structs = kits[key] | lent
        version, build = row["version"], row["builds"]
        known = Kernel(version, build, arch, releases, as_in, structs, line, False, row["name"])
        kernels.append(known)
    return kernels


def _nearest(line: int, version: str, lenders: list[Kernel]) -> Kernel:
    """Of the same 10.x: the last not younger, else the first."""
    family = _numbers(version)[:2]
    alike = sorted(
        (kernel for kernel in lenders if _numbers(kernel.version)[:2] == family), key=Kernel.age
    )
    older = [kernel for kernel in alike if kernel.order < line]
    return older[-1] if older else alike[0]


def name_all(kernels: list[Kernel]) -> list[tuple[str, Kernel]]:
    """Names: "10.9.5 x86_64" for a main kernel or an only one, else "10.9.5-13F1077 x86_64"."""
    versions: dict[tuple[str, str], int] = {}
    for kernel in kernels:
        key = kernel.version, kernel.arch
        versions[key] = versions.get(key, 0) + 1
    named = []
    for kernel in kernels:
        alone = kernel.main or versions[kernel.version, kernel.arch] == 1
        build = "" if alone else f"-{kernel.build}"
        named.append((f"{kernel.version}{build} {kernel.arch}", kernel))
    if len({name for name, _ in named}) != len(named):
        raise ValueError("two kernels would have one name")
    return named


def settle_releases(kernels: list[Kernel]) -> None:
    """Leave each release of an arch to one kernel: a main one, else the first."""
    owners: dict[tuple[str, str], Kernel] = {}
    for kernel in sorted(kernels, key=lambda kernel: not kernel.main):
        for release in list(kernel.releases):
            if owners.setdefault((kernel.arch, release), kernel) is not kernel:
                kernel.releases.remove(release)


def pack_struct(layouts: list[tuple[int, Fields]]) -> bytes:
    """One structure's stream: names, NUL, rows."""
    names = merged_names(layouts)
    bit_fields = {name for _, fields in layouts for name, (_, bits) in fields.items() if bits}
    text = "\n".join(BIT_FIELD + name if name in bit_fields else name for name in names)
    rows = bytearray()
    for size, fields in layouts:
        row, before = [size], 0
        for name in names:
            distance = ABSENT
            if name in fields:
                distance = fields[name][0] - before & 0xFFFF
                before = fields[name][0]
                if distance == ABSENT or before > 0xFFFF:
                    raise ValueError(f"member {name} at {before:#x} does not fit the format")
            row.append(distance)
        row += [fields.get(name, (0, 0))[1] for name in names if name in bit_fields]
        rows += struct.pack(f"<{len(row)}H", *row)
    return text.encode() + b"\0" + bytes(rows)


def merged_names(layouts: list[tuple[int, Fields]]) -> list[str]:
    """All names, each as near as may be behind its predecessor by offset in every layout."""
    names: list[str] = []
    for _, fields in layouts:
        at = 0
        for name in sorted(fields, key=lambda name: (fields[name], name)):
            if name in names:
                at = names.index(name) + 1
            else:
                names.insert(at, name)
                at += 1
    return names


class Database(NamedTuple):
    """What is compiled. `numbers` has for each kernel the number of its layout of each tag."""

    kernels: list[tuple[str, Kernel]]  # with their names
    tags: list[str]
    layouts: dict[str, list[tuple[int, Fields]]]
    numbers: list[dict[str, int]]


def gather(folder: str = INPUTS) -> Database:
    """All kernels, and every distinct layout of each structure, numbered from 1 (0: none)."""
    with open(os.path.join(folder, "kdk_kernels.csv"), newline="") as rows:
        listed = list(csv.DictReader(rows))
    kits = read_kits(folder)
    main = main_kernels(folder, kits, listed)
    kernels = sorted([*main, *kit_kernels(listed, kits, main)], key=Kernel.age)
    settle_releases(kernels)
    tags = sorted({tag for kernel in kernels for tag in kernel.structs})
    layouts: dict[str, list[tuple[int, Fields]]] = {tag: [] for tag in tags}
    named = name_all(kernels)
    numbers = [
        {tag: _number(layouts[tag], kernel.structs.get(tag)) for tag in tags} for _, kernel in named
    ]
    return Database(named, tags, layouts, numbers)


def build(database: Database) -> list[bytes]:
    """The unpacked streams of the resource: the index, then one per structure."""
    lines = [
        "\t".join((name, " ".join(kernel.releases), kernel.origin))
        for name, kernel in database.kernels
    ]
    matrix = bytes(row[tag] for row in database.numbers for tag in database.tags)
    index = "\n".join(database.tags) + "\n\n" + "\n".join(lines)
    structs = (pack_struct(database.layouts[tag]) for tag in database.tags)
    return [index.encode() + b"\0" + matrix, *structs]


def _number(known: list[tuple[int, Fields]], layout: tuple[int, Fields] | None) -> int:
    """The number of a layout, from 1, in the list it is added to if new; 0 is none."""
    if layout is None:
        return 0
    if layout not in known:
        known.append(layout)
    return known.index(layout) + 1


def pack(streams: list[bytes], magic: bytes = MAGIC) -> bytes:
    packed = [zlib.compress(stream, 9) for stream in streams]
    lengths = struct.pack(f"<{len(packed) + 1}I", len(packed), *map(len, packed))
    return magic + lengths + b"".join(packed)


def main(folder: str = INPUTS) -> None:
    content = pack(build(gather(folder)))
    os.makedirs(os.path.dirname(PATH), exist_ok=True)
    with open(PATH, "wb") as resource:
        resource.write(content)
    print(f"{os.path.relpath(PATH, ROOT)}: {len(content)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:2])
