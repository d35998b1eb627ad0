"""Zones, against what an independent reader saw in a machine's memory, and against planted ones."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.errors import FormatError, NotFoundError
from kvmtool.types import layouts
from kvmtool.types.ctype import Compound, Field
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report
from kvmtool.xnu.zone import LIMIT, zones
from kvmtool.xnu.zone_caches import ZoneNames
from tests.builders.sparse import Sparse
from tests.builders.typed import UINT, HandTypes, memory_of
from tests.inputs import oracle, real

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
RAN = {"live": "live.elfcore", "crash": "crash.kdp-core", "kaslr": "kaslr.raw"}


def run(*args):
    return CliRunner().invoke(cli, ["zones", *args])


@pytest.mark.parametrize("machine", RAN)
def test_zones_are_those_an_independent_reader_saw(machine):
    core = real(f"machine/{RAN[machine]}")
    found = run("-N", real(X86), "-M", core, "--format", "json")
    assert found.exit_code == 0, found.output
    rows, said = json.loads(found.stdout), oracle(machine)["zones"]
    assert len(rows) == len(said) > 150
    for row, zone in zip(rows, said, strict=True):
        assert row["address"] == zone["addr"]
        assert row["name"] == zone["name"]
        assert row["in_use"] == zone["count"]
        for name in ("elem_size", "cur_size", "max_size", "alloc_size"):
            assert row[name] == zone[name], name
        assert row["elements"] == zone["cur_size"] // zone["elem_size"]
        assert row["cached"] is None
    used = sum(zone["count"] * zone["elem_size"] for zone in said)
    size = sum(zone["cur_size"] for zone in said)
    assert found.stderr == f"kvmtool: {len(said)} zones: {size} bytes, {used} of them in use\n"


def test_sorted_and_picked():
    where = ("-N", real(X86), "-M", real("machine/crash.kdp-core"), "--format", "json")
    said = oracle("crash")["zones"]
    rows = json.loads(run(*where, "--sort", "cur_size").stdout)
    assert [r["cur_size"] for r in rows] == sorted((z["cur_size"] for z in said), reverse=True)
    rows = json.loads(run(*where, "--sort", "name", "--name", "kalloc").stdout)
    assert [r["name"] for r in rows] == sorted(z["name"] for z in said if "kalloc" in z["name"])
    assert run(*where, "--sort", "size").exit_code == 2


def old_zone(made, name, **fields):
    """A zone of before macOS 11."""
    zone = made.record("zone")
    fill_old(made, zone, name, **fields)
    return zone


def fill_old(made, zone, name, elem=64, count=3, cur=4096, limit=8192, alloc=4096):
    zone.ptr("zone_name", made.alloc(name.encode() + b"\0"))
    zone.u32("count", count)
    zone.word("elem_size", elem)
    zone.word("cur_size", cur)
    zone.word("max_size", limit)
    zone.word("alloc_size", alloc)
    zone.u64("sum_count", 1000, maybe=True)
    for flag in ("expandable", "collectable"):
        made.bits(zone, "zone", flag, 1)


def of_era(test):
    return [name for name in layouts.names() if "-" not in name and test(layouts.table(name))]


@pytest.mark.parametrize("name", of_era(lambda types: types.has("zone", "next_zone")))
def test_a_chain_of_zones(name):
    made = Sparse(name)
    first, second = old_zone(made, "zones", elem=48), old_zone(made, "kalloc.16", elem=16, count=9)
    first.ptr("next_zone", second.address)
    made.pointer("_first_zone", first.address)
    report = Report()
    one, two = zones(made.target(), report)
    assert report.stops == []
    assert (one.index, two.index) == (0, 1)
    assert (one.name, one.elem_size, one.in_use, one.elements) == ("zones", 48, 3, 85)
    assert (two.name, two.elem_size, two.in_use, two.elements) == ("kalloc.16", 16, 9, 256)
    assert (two.cur_size, two.max_size, two.max_elements) == (4096, 8192, 512)
    assert (two.alloc_size, two.alloc_elements) == (4096, 256)
    assert two.flags == ["collectable", "expandable"]
    assert two.sum_size == (16000 if made.layout.has("zone", "sum_count") else None)
    second.ptr("next_zone", first.address)
    report = Report()
    assert len(list(zones(made.target(), report))) == 2
    assert "runs in a circle" in report.stops[0]


def array(made, count):
    """zone_array with room for `count` zones."""
    size = made.layout.size("zone")
    at = made.alloc(bytes(count * size))
    made.symbols["_zone_array"] = at
    return [record_at(made, at + index * size) for index in range(count)]


def record_at(made, address):
    from tests.builders.heap import Record

    return Record(made.types, made.region, "zone", address)


@pytest.mark.parametrize(
    "name",
    of_era(lambda t: not t.has("zone", "next_zone") and not t.has("zone", "z_self")),
)
def test_an_array_of_old_zones(name):
    made = Sparse(name)
    places = array(made, 3)
    for number, place in enumerate(places):
        fill_old(made, place, f"zone{number}", count=number)
    made.number("_num_zones", 3)
    found = list(zones(made.target()))
    assert [(z.name, z.in_use, z.cur_size) for z in found] == [
        ("zone0", 0, 4096),
        ("zone1", 1, 4096),
        ("zone2", 2, 4096),
    ]
    made.number("_num_zones", LIMIT + 1)
    with pytest.raises(FormatError, match=r"num_zones: 16385 at 0x\w+, expected at most 16384"):
        list(zones(made.target()))


def fill_new(made, zone, name, elem=64, wired=3, limit=0xFFFFFFFF, avail=190, free=40, **bits):
    zone.ptr("z_self", zone.address)
    zone.ptr("z_name", made.alloc(name.encode() + b"\0"))
    zone.u16("z_elem_size", elem)
    for member, value in (
        (("z_wired_cur", "page_count"), wired),
        (("z_wired_max", "page_count_max"), limit),
        (("z_elems_avail", "countavail"), avail),
        (("z_elems_free", "countfree"), free),
    ):
        for one in member:
            zone.u32(one, value, maybe=True)
    zone.u16("z_chunk_pages", 2, maybe=True)
    zone.u16("alloc_pages", 2, maybe=True)
    for member, value in bits.items():
        made.bits(zone, "zone", member, value)


NEW = of_era(lambda types: types.has("zone", "z_self"))


@pytest.mark.parametrize("name", NEW)
def test_new_zones(name):
    made = Sparse(name)
    page, cpus = made.arch.page_size, 4
    places = array(made, 4)
    percpu = "z_percpu" if made.layout.has("zone", "z_percpu") else "percpu"
    fill_new(made, places[1], "vm_maps", collectable=1)
    fill_new(made, places[3], "counters", elem=8, limit=5, **{percpu: 1})
    made.number("_num_zones", 4, 2)
    made.number("_zpercpu_early_count", cpus)
    stats = made.alloc(bytes(cpus * page))
    for cpu in range(cpus):
        made.region.write(stats + cpu * page, struct.pack("<2Q", 1000 + cpu, 1))
    places[1].word("z_stats", stats)
    report = Report()
    one, two = zones(made.target(), report)
    assert report.stops == []
    assert (one.index, one.address, one.name) == (1, places[1].address, "vm_maps")
    assert (one.cur_size, one.max_size, one.max_elements) == (3 * page, None, None)
    assert (one.elements, one.in_use) == (190, 150)
    assert not one.cached
    assert (one.alloc_size, one.alloc_elements) == (2 * page, 2 * page // 64)
    assert one.sum_size == 4006
    assert one.flags == ["collectable"]
    assert (two.name, two.flags) == ("counters", ["percpu"])
    assert (two.cur_size, two.max_size) == (3 * page * cpus, 5 * page * cpus)
    assert (two.elem_size, two.max_elements) == (8, 5 * page // 8)
    assert (two.alloc_size, two.alloc_elements) == (2 * page, page // 8)


CACHED = [name for name in NEW if layouts.table(name).has("zone", "z_pcpu_cache")]


@pytest.mark.parametrize("mangled", [0, 0xC0C0000000000000])
@pytest.mark.parametrize("name", CACHED)
def test_what_the_cpus_cache_is_not_in_use(name, mangled):
    made = Sparse(name)
    page = made.arch.page_size
    (zone,) = array(made, 1)
    fill_new(made, zone, "kalloc.16")
    made.number("_num_zones", 1, 2)
    made.number("_zpercpu_early_count", 2)
    caches = made.alloc(bytes(2 * page))
    # alloc, free, full magazines: osfmk/kern/zalloc.c of xnu-8019 and of 11417
    depots = made.layout.has("zone", "z_recirc.zd_full")
    for cpu, (alloc, free, full) in enumerate(((3, 5, 1), (8, 0, 2))):
        front = struct.pack("<3H", alloc, free, full)
        if depots:
            front = struct.pack("<4x2H16xI", alloc, free, full)
        made.region.write(caches + cpu * page, front)
    zone.word("z_pcpu_cache", caches & ~mangled)
    zone.u32("z_recirc.zd_full", 2, maybe=True)
    (found,) = zones(made.target())
    cached = 3 + 5 + 8 + 8 + 16 + (16 if depots else 0)
    assert found.cached == cached
    assert found.in_use == 150 - cached
    made.number("__zc_mag_size", 4, 2)
    (found,) = zones(made.target())
    assert "expected at most 4" in found.cached.reason
    assert isinstance(found.in_use, Unreadable)


def test_a_cache_that_is_absent():
    made = Sparse("15.5 arm64")
    (zone,) = array(made, 1)
    fill_new(made, zone, "kalloc.16")
    made.number("_num_zones", 1, 2)
    made.number("_zpercpu_early_count", 2)
    zone.word("z_pcpu_cache", 0xFFFFFE9900000000)
    (found,) = zones(made.target())
    assert found.cached == found.in_use == Unreadable("unmapped at 0xfffffe9900000004")
    assert found.elements == 190


@pytest.mark.parametrize("name", ["11.0.1 x86_64", "11.5 arm64"])
def test_names_of_heaps(name):
    made = Sparse(name)
    first, second = array(made, 2)
    fill_new(made, first, "kalloc.16", kalloc_heap=2)
    fill_new(made, second, "vm_maps", kalloc_heap=0)
    texts = [made.alloc(text) for text in (b"\0", b"default.\0", b"data.\0", b"kext.\0")]
    made.variable("_kalloc_heap_names", struct.pack("<4Q", *texts))
    made.number("_num_zones", 2, 2)
    made.number("_zpercpu_early_count", 1)
    assert [zone.name for zone in zones(made.target())] == ["data.kalloc.16", "vm_maps"]


def flags_of(name, heap):
    """A struct zone_security_flags: osfmk/kern/zalloc_internal.h, its bits by hand."""
    if name.startswith("12.0"):  # foreign:1 heap:2 noencrypt:1 submap:2 sequester:1 type:1
        return bytes([1 | heap << 1 | 1 << 3 | 2 << 4 | 1 << 6])
    if name.startswith(("12", "13.0")):  # submap:8 guards:1 end:1 heap:3 noencrypt:1 ...
        return struct.pack("<H", 2 | 3 << 8 | heap << 10 | 7 << 13)
    bits = 2 | heap << 8 | 0x3F << 10  # submap:8 heap:2 type:1 lifo:1 guards:1 end:1 ...
    if name.startswith("15.5"):
        return struct.pack("<IH2x", 2 | heap << 8 | 0x3E << 10, 0xABC)
    return struct.pack("<2H", bits, 0xABC)


SECURED = [name for name in NEW if not name.startswith("11")]


@pytest.mark.parametrize("name", SECURED)
def test_names_of_heaps_from_12_on(name):
    made = Sparse(name)
    places = array(made, 4)
    for place, (text, _) in zip(places, HEAPED, strict=True):
        fill_new(made, place, text)
    texts = [made.alloc(text) for text in (b"\0", b"early.\0", b"data.\0", b"\0")]
    made.variable("_kalloc_heap_names", struct.pack("<4Q", *texts))
    made.variable("_zone_security_array", b"".join(flags_of(name, heap) for _, heap in HEAPED))
    made.number("_num_zones", 4, 2)
    made.number("_zpercpu_early_count", 1)
    assert [zone.name for zone in zones(made.target())] == [
        "vm_maps",
        "data.kalloc.16",
        "early.kalloc.16",
        "kalloc.type.var0",
    ]


HEAPED = (("vm_maps", 0), ("kalloc.16", 2), ("kalloc.16", 1), ("kalloc.type.var0", 3))


def test_names_of_heaps_by_the_kernels_own_types():
    """From 12 on the heap's number lies in zone_security_array."""
    flags = Compound(
        "struct",
        "zone_security_flags",
        4,
        [Field("z_submap_idx", UINT, 0, 0, 8), Field("z_kheap_id", UINT, 1, 0, 3)],
    )
    from kvmtool.target import Target
    from kvmtool.types.model import TypeTable

    made = Sparse("15.5 arm64")
    base = 0xFFFFFE2400000000
    text = b"kalloc.16\0data.\0"
    data = text.ljust(32, b"\0") + struct.pack("<3Q", 0, 0, base + 10) + bytes([0, 0, 0, 0, 1, 2])
    symbols = made.target().symbols
    places = {"_kalloc_heap_names": base + 32, "_zone_security_array": base + 56}
    made.symbols.update(places)
    types = TypeTable(HandTypes(made.arch, {"zone_security_flags": flags}))
    target = Target(made.arch, memory_of({base: data.ljust(128, b"\0")}), symbols, types, 47)
    names = ZoneNames(target)
    assert names.name(1, {"name": base, "heap": None}) == "data.kalloc.16"
    assert names.name(0, {"name": base, "heap": None}) == "kalloc.16"


def test_a_kernel_without_zones():
    with pytest.raises(NotFoundError, match="_zone_array"):
        list(zones(Sparse("15.5 arm64").target()))
    made = Sparse("15.5 arm64")
    array(made, 1)
    with pytest.raises(NotFoundError, match="_num_zones"):
        list(zones(made.target()))


def test_zones_whose_pages_are_absent():
    made = Sparse("10.13.6 x86_64")
    places = array(made, 40)  # over three pages
    for number, place in enumerate(places):
        fill_old(made, place, f"zone{number}")
    made.number("_num_zones", 40)
    gone = (places[0].address & ~0xFFF) + 0x1000
    found = list(zones(made.target(without=(gone,))))
    assert len(found) == 40
    lost = [zone for zone in found if isinstance(zone.in_use, Unreadable)]
    assert 10 < len(lost) < 16
    assert {zone.in_use.reason for zone in lost} <= {
        f"unmapped at {at:#x}" for at in range(gone, gone + 0x1000, 8)
    }
    assert all(zone.name == f"zone{zone.index}" for zone in found if isinstance(zone.name, str))
