"""Address maps, against what a running kernel answered, what was planted, and every era's shape."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.errors import FormatError, UnsupportedError
from kvmtool.types import layouts
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report
from kvmtool.xnu.space import find_process
from kvmtool.xnu.vm_map import LIMIT, MapReader
from kvmtool.xnu.vm_object import Objects, unpack
from kvmtool.xnu.vm_tags import tag_name
from kvmtool.xnu.vmmap import INHERITANCE, Maps
from tests.builders.sparse import Sparse
from tests.inputs import DUMPS, oracle, plain_core, real, truth

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
RAN = {"live": "live.elfcore", "crash": "crash.kdp-core", "kaslr": "kaslr.raw"}
# struct proc_regioninfo of bsd/sys/proc_info.h
_INFO = struct.Struct("<4IQ14I2Q")
_SAID = (
    *("prot", "max", "inherit", "flags", "offset", "behavior", "user_wired", "tag"),
    *("resident", "now_private", "swapped", "dirtied", "refs", "shadows", "share"),
    *("private", "shared", "object", "depth", "start", "size"),
)
SHARE = {1: "copy on write", 2: "private", 3: "empty", 4: "shared", 6: "private aliased"}


def run(which, *args):
    return CliRunner().invoke(cli, ["vmmap", which, *args])


def rows(which, *args, status=0):
    found = run(which, *args, "--format", "json")
    assert found.exit_code == status, found.output
    return json.loads(found.stdout)


def regions(machine):
    """What proc_info(2) said of each process's regions on the running machine."""
    said = {}
    for name, text in oracle(machine)["userland"]["other"]:
        if name == "region" and "ERR" not in text:
            pid, packed = text.split()
            values = _INFO.unpack(bytes.fromhex(packed))
            said.setdefault(int(pid), []).append(dict(zip(_SAID, values, strict=True)))
    return {pid: regions for pid, regions in said.items() if pid}


@pytest.mark.parametrize("machine", RAN)
def test_entries_are_what_the_running_kernel_answered(machine):
    said = regions(machine)
    assert len(said) == 5
    compared = 0
    with kvmtool.open(real(X86), real(f"machine/{RAN[machine]}")) as kvm:
        target = kvm.verified_target()
        report = Report()
        maps = Maps(target, report)
        hidden = target.unsigned(target.symbols.address("_vm_kernel_addrperm"), "Q")
        for pid, theirs in said.items():
            proc = find_process(kvm.procs(), pid)
            ours = list(maps.entries(maps.reader.of_process(proc)))
            assert len(ours) == len(theirs)
            for entry, region in zip(ours, theirs, strict=True):
                assert (entry.start, entry.end - entry.start) == (region["start"], region["size"])
                assert (entry.protection, entry.max_protection) == (region["prot"], region["max"])
                assert entry.inheritance == INHERITANCE[region["inherit"]]
                assert (entry.offset, entry.tag) == (region["offset"], region["tag"])
                assert entry.user_wired_count == region["user_wired"]
                # proc_info sets the flag for submaps alone
                assert (entry.submap is not None) == bool(region["flags"] & 1)
                assert (entry.ref_count, entry.shadow_depth) == (region["refs"], region["shadows"])
                assert entry.share_mode == SHARE[region["share"]]
                if entry.object:  # INFO_MAKE_OBJECT_ID: of the last one it is a copy of
                    last = maps.objects.chain(entry.object)[0][-1].address
                    if machine != "crash":  # addresses differ from run to run
                        assert last + hidden & 0xFFFFFFFF == region["object"]
                    assert region["object"]
                else:
                    assert region["object"] == 0
                compared += 1
        assert report.stops == report.notes == []
    assert compared > 50


@pytest.mark.parametrize("machine", RAN)
def test_maps_are_those_an_independent_reader_saw(machine):
    said = oracle(machine)
    where = ("-N", real(X86), "-M", real(f"machine/{RAN[machine]}"))
    pids = {
        task["map"]: proc["p_pid"]
        for task in said["tasks"]
        for proc in said["procs"]
        if proc["addr"] == task["bsd_info"]
    }
    for address, entries in said["vm_maps"].items():
        expected = [tuple(entry[:2]) for entry in entries]
        found = rows(str(pids[address]), *where, "-o", "start,end,size")
        assert [(row["start"], row["end"]) for row in found] == expected
        assert rows(address, *where, "-o", "start,end,size") == found
    kernel = rows("kernel", *where)
    assert kernel == rows("0", *where)
    assert len(kernel) == len(said["vm_maps"][said["symbols"]["_kernel_map"]["value"]])


def test_files_behind_the_entries():
    where = ("-N", real(X86), "-M", real("machine/live.elfcore"))
    assert rows("1", *where)[0]["path"] == "/sbin/launchd"
    netd = {row["start"]: row for row in rows("3", *where)}
    assert netd["0x100000000"]["path"] == "/usr/sbin/netd"
    mapped = netd["0x100073000"]
    assert (mapped["path"], mapped["pager"], mapped["prot"]) == ("/tmp/data.txt", "vnode", "r--")
    vnodes = {v["addr"]: v["name"] for v in oracle("live")["vnodes"]}
    assert vnodes[mapped["vnode"]] == "data.txt"
    assert [row["tag_name"] for row in netd.values()].count("stack") == 3
    table = run("3", *where).stdout.splitlines()
    assert table[1].split()[:4] == ["0x100000000", "0x100005000", "20480", "rwx"]


def test_what_is_in_submaps():
    where = ("-N", real(X86), "-M", real("machine/live.elfcore"), "--submaps")
    found = rows("1", *where)
    inner = [row for row in found if row["depth"] == 1]
    assert [(row["start"], row["end"], row["prot"]) for row in inner] == [
        ("0x7fffffe00000", "0x7fffffe01000", "r--"),
        ("0x7ffffff51000", "0x7ffffff52000", "r-x"),
    ]
    for row in inner:  # the commpage: each below the entry that leads to it
        above = found[found.index(row) - 1]
        assert above["submap"]
        assert (above["start"], above["end"]) == (row["start"], row["end"])
    kernel = rows("kernel", *where)
    outer = [row for row in kernel if not row["depth"]]
    assert outer == rows("kernel", *where[:-1])
    for row in kernel:
        if row["depth"] == 1:
            assert any(
                int(o["start"], 16) <= int(row["start"], 16) < int(o["end"], 16)
                for o in outer
                if o["submap"]
            )
    assert len(kernel) > len(outer) + 10


@pytest.mark.parametrize("dump", DUMPS)
def test_entries_are_those_planted(dump):
    where = (real(f"dumps/{dump}/mach_kernel"), plain_core(dump))
    compared = 0
    with kvmtool.open(*where) as kvm:
        report = Report()
        maps = Maps(kvm.verified_target(), report)
        known = {proc.pid: proc for proc in kvm.procs()}
        for process in truth(dump)["processes"]:
            if process.get("vm_map") is None or not process.get("regions"):
                continue
            found = maps.reader.of_process(known[process["pid"]])
            assert found.address == process["vm_map"]
            ours = [[e.start, e.end, e.protection, e.path] for e in maps.entries(found)]
            assert ours == process["regions"]
            compared += len(ours)
        assert report.stops == report.notes == []
    assert compared > 200


def test_a_zombie_has_no_map():
    dump = "x86_64-10.8.5"
    where = ("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    zombie = next(p for p in truth(dump)["processes"] if p["zombie"])
    found = run(str(zombie["pid"]), *where)
    assert found.exit_code == 1
    assert found.stderr == (
        f"kvmtool: process {zombie['pid']} has no address space: it is a zombie\n"
    )


def test_what_names_no_map():
    where = ("-N", real(X86), "-M", real("machine/crash.kdp-core"))
    assert run("sh", *where).exit_code == 2
    assert run("9999", *where).stderr.startswith("kvmtool: process 9999 not found")
    found = run("0xffffff8000200000", *where)
    assert found.exit_code == 1
    assert found.stderr == (
        "kvmtool: map of 0xffffff8000200000: no ring of entries at 0xffffff8000200000, "
        "expected a vm_map\n"
    )


# every era's shape


class Planted:
    """A map with entries in a sparse kernel."""

    def __init__(self, name):
        self.made = Sparse(name)
        types = self.made.layout
        size = types.size("_vm_map") if types.has("_vm_map") else 0x80
        self.address = self.made.alloc(bytes(size))
        # 10.4's layout has no map: there struct vm_map begins with a lock of three words
        self.header = self.address + (types.offset("_vm_map", "hdr") if size != 0x80 else 12)
        self.width = self.made.width
        self.packed = types.has("vm_map_entry", "vme_object_value")
        self.ring = [self.header]

    def finish(self, low=0x1000, high=0x7FFF00000000):
        """Chains the entries and the header, and says how many there are."""
        made, count = self.made, len(self.ring)
        for place, at in enumerate(self.ring):
            around = self.ring[place - 1], self.ring[(place + 1) % count]
            made.region.write(at, b"".join(map(made.memory.pointer, around)))
        self.bounds(self.header, low, high)
        where = made.layout.offset("vm_map_header", "nentries")
        made.region.write(self.header + where, struct.pack("<i", count - 1))
        made.pointer("_kernel_map", self.address)
        return made.target()

    def bounds(self, at, start, end):
        self.made.region.write(at + 2 * self.width, struct.pack("<2Q", start, end))

    def entry(self, start, end, *, thing=0, submap=False, offset=0, tag=0, **members):
        made = self.made
        entry = made.record("vm_map_entry")
        self.ring.append(entry.address)
        self.bounds(entry.address, start, end)
        members = {"protection": 5, "max_protection": 7, "inheritance": 1, **members}
        for member, value in members.items():
            self._member(entry, member, value)
        if self.packed:
            self._leads_packed(entry, thing, submap)
            made.bits(entry, "vm_map_entry", "vme_offset", offset >> 12)
        else:
            union = next(
                member
                for member in ("vme_object", "object")
                if made.layout.has("vm_map_entry", member)
                or made.layout.has("vm_map_entry", f"{member}.vm_object")
            )
            at = made.layout.struct("vm_map_entry").members
            place = at.get(union) or at[f"{union}.vm_object"]
            made.region.write(entry.address + place.offset, made.memory.pointer(thing))
            made.bits(entry, "vm_map_entry", "is_sub_map", int(submap))
            entry.u64("offset", offset, maybe=True)
            entry.u64("vme_offset", offset | tag, maybe=True)
        for member in ("alias", "vme_alias"):
            made.bits(entry, "vm_map_entry", member, tag)
        return entry

    def _member(self, entry, member, value):
        if self.made.layout.struct("vm_map_entry").members[member].bit_size is None:
            entry.u16(member, value)
        else:
            self.made.bits(entry, "vm_map_entry", member, value)

    def _leads_packed(self, entry, thing, submap):
        """VME_OBJECT_SET, VME_SUBMAP_SET of osfmk/vm/vm_map.h, xnu-8020 on."""
        made = self.made
        if submap:
            made.region.write(entry.address + 0x38, struct.pack("<Q", thing >> 2 << 2 | 2))
            return
        base = {"x86_64": 0xFFFFFF7F80000000, "arm64": 0xFFFFFE0000000000}[made.arch.name]
        packed = (thing - base) >> 6 if thing else 0
        made.region.write(entry.address + 0x3C, struct.pack("<I", packed))

    def object(self, refs=1, shadow=0, pager=0, internal=1, resident=3):
        made = self.made
        at = made.region.alloc(made.layout.size("vm_object"), align=64)
        from tests.builders.heap import Record

        thing = Record(made.types, made.region, "vm_object", at)
        thing.u32("ref_count", refs)
        thing.u32("resident_page_count", resident)
        thing.ptr("shadow", shadow)
        thing.ptr("pager", pager)
        made.bits(thing, "vm_object", "internal", internal)
        return thing


ERAS = [name for name in layouts.names() if "-" not in name]


@pytest.mark.parametrize("name", ERAS)
def test_maps_of_every_era(name):
    plan = Planted(name)
    thing, below = plan.object(), Planted.__new__(Planted)
    below.made, below.width, below.packed = plan.made, plan.width, plan.packed
    types = plan.made.layout
    size = types.size("_vm_map") if types.has("_vm_map") else 0x80
    below.address = plan.made.region.alloc(size)
    below.header = below.address + plan.header - plan.address
    below.ring = [below.header]
    below.entry(0x4000, 0x9000, thing=plan.object(refs=4).address, tag=7)
    below.finish(0x1000, 0xA000)
    first = plan.entry(0x1000, 0x3000, thing=thing.address, offset=0x5000, tag=30, wired_count=2)
    plan.entry(0x3000, 0x4000, protection=0, max_protection=3, inheritance=2)
    plan.entry(0x10000, 0x14000, thing=below.address, submap=True, offset=0x3000, tag=32)
    target = plan.finish()
    report = Report()
    maps = Maps(target, report)
    where = maps.reader.at(plan.address, "a test")
    assert (where.start, where.end, where.nentries) == (0x1000, 0x7FFF00000000, 3)
    one, two, three, inside = maps.entries(where, submaps=True)
    assert report.stops == report.notes == []
    assert (one.address, one.start, one.end) == (first.address, 0x1000, 0x3000)
    assert (one.protection, one.max_protection, one.inheritance) == (5, 7, "copy")
    assert (one.object, one.offset, one.tag) == (thing.address, 0x5000, 30)
    assert (one.tag_name, one.wired_count, one.user_wired_count) == ("stack", 2, 0)
    assert (one.share_mode, one.ref_count, one.resident) == ("private", 1, 3)
    assert (one.submap, one.depth, one.pager, one.path) == (None, 0, None, None)
    assert (two.object, two.share_mode, two.protection) == (None, "empty", 0)
    assert (two.max_protection, two.inheritance, two.tag) == (3, "none", 0)
    assert (three.submap, three.object, three.share_mode) == (below.address, None, "empty")
    assert (three.offset, three.tag_name) == (0x3000, "shared_pmap")
    # [0x4000, 0x9000) of the submap shows through [0x3000, 0x7000) of it, at 0x10000
    assert (inside.start, inside.end, inside.depth) == (0x11000, 0x14000, 1)
    assert (inside.share_mode, inside.tag_name, inside.ref_count) == ("shared", "malloc_tiny", 4)
    assert maps.reader.of_kernel().kernel
    assert tag_name(30, kernel=True) == "retired"


def sharing(name="10.13.6 x86_64"):
    plan = Planted(name)
    bottom = plan.object(refs=3, internal=0, resident=9)
    copy = plan.object(refs=1, shadow=bottom.address)
    aliased = plan.object(refs=2)
    shared = plan.object(refs=5)
    file = plan.object(refs=2, internal=0)
    plan.entry(0x1000, 0x2000, thing=copy.address)
    plan.entry(0x2000, 0x3000, thing=aliased.address)
    plan.entry(0x3000, 0x4000, thing=aliased.address)
    plan.entry(0x4000, 0x5000, thing=shared.address)
    plan.entry(0x5000, 0x6000, thing=shared.address, offset=0x1000)
    plan.entry(0x6000, 0x7000, thing=file.address)
    plan.entry(0x7000, 0x8000, thing=plan.object(refs=2).address)
    plan.entry(0x8000, 0x9000, thing=plan.object().address, needs_copy=1)
    plan.entry(0x9000, 0xA000, thing=plan.object().address, superpage_size=1)
    return plan


def test_how_memory_is_shared():
    plan = sharing()
    maps = Maps(plan.finish())
    found = list(maps.entries(maps.reader.of_kernel()))
    assert [entry.share_mode for entry in found] == [
        *("copy on write", "private aliased", "private aliased", "shared aliased"),
        *("shared aliased", "private", "shared", "copy on write", "large page"),
    ]
    assert (found[0].ref_count, found[0].shadow_depth, found[0].resident) == (3, 1, 3)
    assert "needs_copy" in found[7].flags


def test_shadows_in_a_circle():
    plan = Planted("10.13.6 x86_64")
    one, two = plan.object(), plan.object()
    one.ptr("shadow", two.address)
    two.ptr("shadow", one.address)
    plan.entry(0x1000, 0x2000, thing=one.address)
    maps = Maps(plan.finish())
    (entry,) = maps.entries(maps.reader.of_kernel())
    assert entry.share_mode == Unreadable(f"the shadows of object {one.address:#x} run in a circle")
    assert entry.object == one.address
    assert isinstance(entry.path, Unreadable)


def test_a_map_that_is_its_own_submap():
    plan = Planted("10.13.6 x86_64")
    plan.entry(0x1000, 0x2000, thing=plan.address, submap=True)
    report = Report()
    maps = Maps(plan.finish(), report)
    (entry,) = maps.entries(maps.reader.of_kernel(), submaps=True)
    assert entry.submap == plan.address
    assert report.stops == [
        f"map of the kernel: stopped after 1 elements: map {plan.address:#x} is inside itself"
    ]


def six(name="10.13.6 x86_64", spread=0):
    plan = Planted(name)
    for number in range(1, 7):
        plan.entry(number << 16, (number << 16) + 0x1000)
        plan.made.region.alloc(spread)
    return plan


def test_a_torn_map_is_read_from_both_ends():
    plan = six(spread=0x1000)
    plan.finish()
    gone = plan.ring[3]
    target = plan.made.target(without=(gone,))
    report = Report()
    reader = MapReader(target, report)
    found = list(reader.walk(reader.of_kernel()))
    readable = [entry.address for entry in found if isinstance(entry.start, int)]
    assert readable == [at for at in plan.ring[1:] if at != gone]
    assert len(report.stops) == 1
    assert "the link is unmapped" in report.stops[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda plan: plan.bounds(plan.ring[4], 0x100, 0x200), "is 0x100 to 0x200, next to"),
        (lambda plan: plan.bounds(plan.ring[4], 9 << 16, 8 << 16), "is 0x90000 to 0x80000"),
        (
            lambda plan: plan.made.region.write(
                plan.ring[3] + plan.width, plan.made.memory.pointer(plan.ring[2])
            ),
            "runs in a circle",
        ),
        (
            lambda plan: plan.made.region.write(plan.ring[3] + plan.width, bytes(plan.width)),
            "the link is null",
        ),
    ],
)
def test_a_map_that_lies(spoil, said):
    plan = six()
    plan.finish()
    spoil(plan)
    report = Report()
    reader = MapReader(plan.made.target(), report)
    found = list(reader.walk(reader.of_kernel()))
    assert len(report.stops) == 1
    assert said in report.stops[0]
    assert {entry.address for entry in found} >= {plan.ring[at] for at in (1, 2, 3, 5, 6)}
    starts = [entry.start for entry in found]
    assert starts == sorted(starts)


def test_the_number_of_entries_is_held_against_the_walk():
    plan = six()
    plan.finish()
    where = plan.made.layout.offset("vm_map_header", "nentries")
    plan.made.region.write(plan.header + where, struct.pack("<i", LIMIT))
    report = Report()
    reader = MapReader(plan.made.target(), report)
    assert len(list(reader.walk(reader.of_kernel()))) == 6
    assert report.notes == [f"map of the kernel: 6 entries, expected {LIMIT}"]


@pytest.mark.parametrize("name", ["10.4.11 i386", "10.13.6 x86_64", "15.5 arm64"])
def test_what_is_no_map(name):
    plan = Planted(name)
    junk = plan.made.alloc(bytes(0x400))
    plan.entry(0x1000, 0x2000)
    target = plan.finish()
    with pytest.raises(FormatError, match="no ring of entries"):
        MapReader(target).at(junk, "junk")


def test_a_task_that_is_absent():
    made = Sparse("10.13.6 x86_64")
    reader = MapReader(made.target())

    class Proc:
        pid, task = 7, Unreadable("absent at 0x10")

    with pytest.raises(UnsupportedError, match="the task of process 7 cannot be read: absent"):
        reader.of_process(Proc())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "address"),
    [("13.5 x86_64", 0xFFFFFF8015003340), ("15.5 arm64", 0xFFFFFE2400003340)],
)
def test_packed_pointers_by_the_kernels_own_numbers(name, address):
    made = Sparse(name)
    base = 0xFFFFFE0000000000 if "arm64" in name else 0xFFFFFF7F80000000
    packed = (address - base) >> 6
    assert unpack(made.target(), packed) == address
    assert unpack(made.target(), 0) == 0
    made.variable("_vm_page_packing_params", struct.pack("<Q3B", base - 0x1000, 31, 6, 1))
    assert unpack(made.target(), packed) == address - 0x1000
    # not relative to the base: the number is shifted, and its sign extended
    made.variable("_vm_page_packing_params", struct.pack("<Q3B", 0, 32, 6, 0))
    high = 0xFFFFFFE015003340
    assert unpack(made.target(), high >> 6 & 0xFFFFFFFF) == high
    made.symbols["_vm_page_packing_params"] = 0xFFFFFE9900000000
    assert unpack(made.target(), packed) == Unreadable("unmapped at 0xfffffe9900000000")


def test_the_kernels_own_object_is_a_bit():
    plan = Planted("15.5 arm64")
    plan.entry(0x1000, 0x2000, vme_kernel_object=1)
    thing = plan.object(refs=1000)
    plan.made.symbols["_kernel_object_default"] = thing.address
    maps = Maps(plan.finish())
    (entry,) = maps.entries(maps.reader.of_kernel())
    assert entry.object == thing.address
    assert entry.share_mode == "shared"


def vnode_with(plan, pager):
    """A vnode whose ubc_info leads to `pager` and back."""
    made = plan.made
    vnode = made.record("vnode")
    info = made.alloc(struct.pack("<4Q", pager, 1, 2, vnode.address))
    vnode.ptr("v_un", info)
    kind = made.layout.struct("vnode").members["v_type"]
    made.region.write(vnode.address + kind.offset, b"\1")
    vnode.ptr("v_name", made.alloc(b"ls\0"))
    return vnode


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "12.0.1 arm64", "15.5 arm64", "15.5 x86_64"])
def test_the_file_behind_a_pager(name):
    plan = Planted(name)
    pager = plan.made.alloc(bytes(0x60))
    vnode = vnode_with(plan, pager)
    # memory_object or ipc_object_header, then where this release has the rest
    plan.made.region.write(pager + 0x20, struct.pack("<Q", vnode.address))
    ops = plan.made.variable("_vnode_pager_ops", bytes(8))
    plan.made.region.write(pager + 8, struct.pack("<Q", ops))
    bottom = plan.object(refs=2, pager=pager, internal=0)
    top = plan.object(shadow=bottom.address)
    plan.entry(0x1000, 0x2000, thing=top.address)
    maps = Maps(plan.finish())
    (entry,) = maps.entries(maps.reader.of_kernel())
    assert (entry.pager, entry.vnode, entry.path) == ("vnode", vnode.address, "…/ls")
    objects = Objects(plan.made.target())
    other = plan.made.alloc(struct.pack("<12Q", 0, ops, *[0] * 10))
    assert Objects(plan.made.target()).pager(other) == ("vnode", None)
    swap = plan.made.variable("_compressor_pager_ops", bytes(8))
    other = plan.made.alloc(struct.pack("<12Q", 0, swap, *[0] * 10))
    assert Objects(plan.made.target()).pager(other) == ("compressor", None)
    missing = objects.pager(0xFFFFFE9900000000)
    assert missing.kind == missing.vnode == Unreadable("unmapped at 0xfffffe9900000000")


def test_a_submap_that_is_none():
    plan = Planted("10.13.6 x86_64")
    junk = plan.made.alloc(bytes(0x200))
    plan.entry(0x1000, 0x2000, thing=junk, submap=True)
    plan.entry(0x3000, 0x4000, thing=0xFFFFFF9900000000, submap=True)
    report = Report()
    maps = Maps(plan.finish(), report)
    assert len(list(maps.entries(maps.reader.of_kernel(), submaps=True))) == 2
    assert f"no ring of entries at {junk:#x}" in report.stops[0]
    assert "0xffffff9900000010 is unmapped" in report.stops[1]


def test_a_process_whose_map_is_null():
    made = Sparse("10.13.6 x86_64")
    task = made.record("task")

    class Proc:
        pid, task = 7, 0

    proc = Proc()
    proc.task = task.address
    with pytest.raises(UnsupportedError, match="process 7 has no address space: its map is null"):
        MapReader(made.target()).of_process(proc)  # type: ignore[arg-type]


def test_an_object_that_is_absent():
    plan = Planted("10.13.6 x86_64")
    plan.entry(0x1000, 0x2000, thing=0xFFFFFF9900000000)
    maps = Maps(plan.finish())
    (entry,) = maps.entries(maps.reader.of_kernel())
    assert entry.object == 0xFFFFFF9900000000
    for value in (entry.share_mode, entry.ref_count, entry.shadow_depth, entry.path):
        assert isinstance(value, Unreadable)
