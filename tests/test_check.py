"""Is a kernel as its makers left it: real ones that are, and the same with one thing changed.

The instruction sections of every real kernel here are zero-filled, in file and memory alike: that
their code is found equal says that the comparison runs, not much more. Real code is that of the
embedded sample, a kernel of our own that ran under QEMU.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
import zlib

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool import progress
from kvmtool.check import CHECKS, check
from kvmtool.checks import detour
from kvmtool.cli import cli
from kvmtool.errors import FaultError
from kvmtool.memory import Piece
from kvmtool.sample import write
from kvmtool.xnu.interrupts import narrow_gates
from tests.builders import chains
from tests.builders.sparse import Sparse
from tests.checking import Core, checked
from tests.inputs import DUMPS, oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
MACHINES = ("crash.kdp-core", "live.elfcore", "kaslr.raw")
ARTICLE = "com.osxbook.kext.KernelMemoryAccess"
HEAP = 0xFFFFFF8012345678  # no image lies there
CDEVSW, D_READ = 112, 16  # sizeof(struct cdevsw): data README; d_read is its third pointer
SYSENT = 32  # 10.9: {call, munge32, munge64, ret, narg, bytes}: xnu.md 5.11
OID_HANDLER = 48  # struct sysctl_oid, LP64


@pytest.fixture
def crash(tmp_path):
    return Core(tmp_path, real("machine/crash.kdp-core"))


@pytest.fixture(scope="module")
def symbols():
    """Name → address in the kernel of the machine, which is not slid in its crash."""
    with kvmtool.open(real(KERNEL)) as kvm:
        return {symbol.name: symbol.address for symbol in kvm.symbols}


def sysctl_address(name):
    return next(
        int(node["addr"], 16) for node in oracle("crash")["sysctl_tree"] if node["name"] == name
    )


@pytest.mark.parametrize("core", MACHINES)
def test_a_machine_that_ran_is_clean(core):
    found = checked(real(KERNEL), real(f"machine/{core}"))
    assert found.rows == []
    assert found.code == 0
    assert "no findings" in found.said
    assert "incomplete" not in found.said
    looked = found.said.split("looked at ")[1].split("\n")[0]
    counts = {what: int(n) for n, what in (part.split(" ", 1) for part in looked.split(", "))}
    said = oracle(core.split(".")[0])
    assert counts["pointers in sysent"] > 456
    assert counts["pointers in mach_trap_table"] >= 128
    assert counts["pointers in the interrupt table"] == 256
    assert counts["processes"] == len(said["procs"])
    assert counts["threads"] == len(said["threads"])
    assert counts["vnodes"] == len(said["vnodes"])
    handled = sum(node["handler"] is not None for node in said["sysctl_tree"])
    assert counts["pointers in the sysctl tree"] == handled
    assert counts["pointers in vnode operations"] > 900
    assert counts["pointers in the protocols"] > 500


def test_three_pointers_changed_are_the_three_found(crash, symbols):
    slot = symbols["_cdevsw"] + 3 * CDEVSW + D_READ
    call = symbols["_sysent"] + 5 * SYSENT
    oid = sysctl_address("kern.ostype") + OID_HANDLER
    for place in (slot, call, oid):
        crash.pointer(place, HEAP)
    found = checked(real(KERNEL), crash.path)
    assert found.code == 3
    assert [(row["check"], row["where"], row["address"]) for row in found.rows] == [
        ("syscalls", "sysent[5] (open)", hex(call)),
        ("devices", "cdevsw[3].d_read", hex(slot)),
        ("sysctl", "kern.ostype", hex(oid)),
    ]
    for row in found.rows:
        assert (row["kind"], row["severity"]) == ("outside", "high")
        assert row["found"]["address"] == hex(HEAP)
        assert "in no image" in row["evidence"]
    linked = [row["evidence"].split("linked as ")[1] for row in found.rows]
    assert linked == ["_open", "_mmread", "_sysctl_handle_string"]
    assert "3 findings" in found.said


def test_pointers_that_stay_inside_the_kernel(crash, symbols):
    crash.pointer(symbols["_sysent"] + 20 * SYSENT, symbols["_kill"])
    crash.pointer(symbols["_sysent"] + 37 * SYSENT, symbols["_kill"] + 7)
    crash.pointer(symbols["_sysent"] + 59 * SYSENT, symbols["_version"])  # a string
    traps = symbols["_mach_trap_table"]
    with kvmtool.open(real(KERNEL), crash.path) as kvm:
        from kvmtool.xnu.syscalls import traps as walk

        call = next(c for c in walk(kvm.nearest_target()) if c.number == 45)
    assert traps < call.handler_at < traps + 128 * 40
    crash.pointer(call.handler_at, symbols["_pid_for_task"])
    found = checked(real(KERNEL), crash.path)
    assert found.code == 3
    assert [(row["where"], row["kind"], row["found"]["name"]) for row in found.rows] == [
        ("sysent[20] (getpid)", "other", "_kill"),
        ("sysent[37] (kill)", "middle", "_kill+0x7"),
        ("sysent[59] (execve)", "outside", "_version"),
        ("mach_trap_table[45] (task_for_pid)", "other", "_pid_for_task"),
    ]
    assert found.rows[0]["expected"] == "_getpid"
    assert "in none of its code" in found.rows[2]["evidence"]


def test_functions_of_files_protocols_interrupts_and_imports(crash, symbols):
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        target = kvm.verified_target()
        vector = target.pointer(symbols["_hfs_vnodeop_p"])
        entry = target.types.offset("protosw", "pr_input")
        udp = symbols["_inetsw"] + target.types.size("protosw")  # the first is IP itself
        assert target.pointer(udp + entry) == symbols["_udp_input"]
        got = next(s for s in kvm.kernel.sections if s.sectname == "__got")
    crash.pointer(vector + 8 * 3, HEAP)  # operations are numbered in vfs_op_descs
    crash.pointer(symbols["_hfs_vfsops"], symbols["_version"])
    crash.pointer(udp + entry, HEAP)
    gate = symbols["_master_idt64"] + 14 * 16  # page fault
    crash.write(gate, struct.pack("<HHBBHII", 0x5678, 8, 0, 0x8E, 0x1234, 0xFFFFFF80, 0))
    crash.pointer(got.addr, symbols["_version"])
    found = checked(real(KERNEL), crash.path)
    assert [(row["check"], row["kind"], row["where"]) for row in found.rows] == [
        ("filesystems", "outside", "hfs: vfs_mount"),
        ("filesystems", "outside", "hfs_vnodeop_p: vnop_lookup"),
        ("protocols", "outside", "internet protocol 17: pr_input"),
        ("interrupts", "outside", "interrupt vector 0xe"),
        ("imports", "differs", "__DATA,__got+0x0"),
    ]
    assert found.rows[3]["found"]["address"] == "0xffffff8012345678"


def test_a_vector_of_vnode_operations_that_nobody_registered(crash, symbols):
    first = oracle("crash")["vnodes"][0]
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        target = kvm.verified_target()
        at = int(first["addr"], 16) + target.types.offset("vnode", "v_op")
        inside = target.pointer(symbols["_hfs_vnodeop_p"]) + 8  # functions, but no vector
    crash.pointer(at, inside)
    found = checked(real(KERNEL), crash.path, "--only", "filesystems").rows
    (row,) = [row for row in found if row["kind"] == "other"]
    assert (row["severity"], row["address"]) == ("high", hex(at))
    assert "no registered file system's" in row["evidence"]
    rest = [row for row in found if row["kind"] != "other"]
    assert all(row["where"].startswith(f"vector at {inside:#x}: ") for row in rest)
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        types = kvm.types
        nfs = symbols["_vfstbllist"] + types.size("vfstable")  # as if a kext had brought it
        start, size = (types.offset("vfstable", f"vfc_desc{name}") for name in ("ptr", "size"))
        operations = kvm.nearest_target().integer(symbols["_vfs_opv_numops"])
    crash.pointer(nfs + start, inside)
    crash.write(nfs + size, struct.pack("<i", operations * 8))
    found = checked(real(KERNEL), crash.path, "--only", "filesystems").rows
    assert [row["where"] for row in found] == [
        row["where"].replace(f"vector at {inside:#x}", "nfs vector 0") for row in rest
    ]


LAYOUT = ("--layout", "10.9.5 x86_64")  # instead of the CTF that this kernel has with it


def test_types_that_have_no_requests_leave_their_numbers(crash, symbols):
    found = checked(real(KERNEL), crash.path, "--only", "protocols", *LAYOUT)
    assert (found.code, found.rows) == (0, [])
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        target = kvm.verified_target()
        bind = target.types.offset("pr_usrreqs", "pru_bind")
    crash.pointer(symbols["_udp_usrreqs"] + bind, HEAP)
    (exact,) = checked(real(KERNEL), crash.path, "--only", "protocols").rows
    assert exact["where"] == "requests of internet protocol 17: pru_bind"
    (row,) = checked(real(KERNEL), crash.path, "--only", "protocols", *LAYOUT).rows
    assert row["where"] == f"requests of internet protocol 17: pr_usrreqs[{bind // 8}]"
    assert row["address"] == exact["address"] == hex(symbols["_udp_usrreqs"] + bind)


@pytest.mark.parametrize("dump", DUMPS)
def test_dumps_that_were_planted_are_clean(dump):
    kernel = real(f"dumps/{dump}/mach_kernel")
    found = checked(kernel, plain_core(dump), "--all")
    assert found.code == 0
    planted = truth(dump)
    (driver,) = [row for row in found.rows if row["check"] == "devices"]
    major = planted["cdevsw"]["kext_major"]
    assert driver["where"] == f"cdevsw[{major}]"
    assert (driver["severity"], driver["expected"]) == ("info", f"kext {ARTICLE}")
    assert {row["severity"] for row in found.rows} == {"info"}
    assert checked(kernel, plain_core(dump)).rows == []
    for name in ("syscalls", "traps", "sysctl", "filesystems", "protocols", "policies"):
        assert f"{name}: not there: " in found.said
    people, groups = len(planted["processes"]), sum(len(g["members"]) for g in planted["pgrps"])
    assert f" {people} processes, {groups} members of process groups" in found.said
    assert f" {len(planted['kexts'])} kexts" in found.said


def kext_in(dump, name=ARTICLE):
    return next(kext for kext in truth(dump)["kexts"] if kext["name"] == name)


def test_a_kext_in_the_slot_of_a_kernels_driver(tmp_path):
    dump = "x86_64-10.13.6"
    core, planted = Core(tmp_path, plain_core(dump)), truth(dump)["cdevsw"]
    kext = kext_in(dump)["address"]
    slot = planted["address"] + 3 * CDEVSW + D_READ  # /dev/mem
    core.pointer(slot, kext + 0xC10)  # where the article's kext has its own read
    other = planted["address"] + planted["kext_major"] * CDEVSW + D_READ
    core.pointer(other, kext_in(dump, "com.apple.iokit.IOPCIFamily")["address"] + 0xB10)
    core.pointer(planted["address"] + 6 * CDEVSW + D_READ, kext + 0x100)  # its header, no code
    found = checked(real(f"dumps/{dump}/mach_kernel"), core.path)
    rows = [(row["kind"], row["severity"], row["where"], row["kext"]) for row in found.rows]
    assert rows == [
        ("hook", "medium", "cdevsw[3].d_read", ARTICLE),
        ("outside", "high", "cdevsw[6].d_read", ARTICLE),
        (
            "hook",
            "medium",
            f"cdevsw[{planted['kext_major']}].d_read",
            "com.apple.iokit.IOPCIFamily",
        ),
    ]
    assert found.rows[0]["evidence"].endswith(f"points into kext {ARTICLE}; linked as _mmread")
    assert found.rows[2]["expected"] == f"code of kext {ARTICLE} or the kernel"


@pytest.mark.parametrize("dump", ["x86_64-10.8.5", "x86_64-10.13.6"])
def test_a_process_taken_off_a_list(dump, tmp_path):
    core, planted = Core(tmp_path, plain_core(dump)), truth(dump)
    by_pid = {proc["pid"]: proc for proc in planted["processes"]}
    before, hidden, after = (by_pid[pid]["address"] for pid in planted["allproc"][3:6])
    core.pointer(before, after)  # p_list.le_next is the first word of struct proc
    found = checked(real(f"dumps/{dump}/mach_kernel"), core.path)
    assert found.code == 3
    high = [row for row in found.rows if row["severity"] == "high"]
    assert high == found.rows
    assert {row["check"] for row in high} == {"processes"}
    assert {row["address"] for row in high} == {hex(hidden)}
    assert high[0]["evidence"].endswith("but not on allproc or zombproc")
    assert str(planted["allproc"][4]) in high[0]["where"]


def test_a_kext_taken_off_a_list(tmp_path):
    dump = "x86_64-10.13.6"
    core, loaded = Core(tmp_path, plain_core(dump)), truth(dump)["kexts"]
    by_name = {kext["name"]: kext for kext in loaded}
    hidden = by_name["com.apple.iokit.IOStorageFamily"]
    after = next(k for k in loaded if k["id"] == hidden["id"] - 1)  # last loaded first
    before = next(k for k in loaded if k["id"] == hidden["id"] + 1)
    core.pointer(before["kmod_info"], after["kmod_info"])
    core.pointer(by_name[ARTICLE]["kmod_info"] + 0xBC, HEAP)  # stop, packed to 4 bytes
    found = checked(real(f"dumps/{dump}/mach_kernel"), core.path, "--only", "kexts")
    assert [(row["kind"], row["severity"], row["where"]) for row in found.rows] == [
        ("unlisted", "high", hidden["name"]),
        ("outside", "high", f"{ARTICLE}: its stop function"),
    ]
    assert "in the kext summaries, not in the kmod list" in found.rows[0]["evidence"]


def test_imports_of_a_kext(tmp_path):
    """Its __DATA,__data is said to be a table of imports: three good pointers, two that are not."""
    dump = "x86_64-10.13.6"
    core, port = Core(tmp_path, plain_core(dump)), "com.apple.driver.AppleAHCIPort"
    kext = kext_in(dump, port)
    with kvmtool.open(real(f"dumps/{dump}/mach_kernel"), plain_core(dump)) as kvm:
        printf = kvm.address("_printf")
        image = next(k for k in kvm.kexts if k.identifier == port).image
        data = next(s for s in image.sections if s.sectname == "__data")
        head = kvm.read(kext["address"], 0x1000)
    at = head.index(b"__data\0") + 64  # flags of a section_64
    core.write(kext["address"] + at, struct.pack("<I", 6))
    size = head.index(b"__data\0") + 40
    core.write(kext["address"] + size, struct.pack("<Q", 40))
    family = kext_in(dump, "com.apple.iokit.IOPCIFamily")["address"]  # it is linked against that
    article = kext_in(dump)["address"] + 0xB00
    core.write(
        data.addr, struct.pack("<5Q", printf, kext["address"] + 0xB00, family, article, HEAP)
    )
    found = checked(real(f"dumps/{dump}/mach_kernel"), core.path, "--only", "imports")
    assert [(row["kind"], row["where"], row["found"]["address"]) for row in found.rows] == [
        ("hook", f"{port}: __data+0x18", hex(article)),
        ("outside", f"{port}: __data+0x20", hex(HEAP)),
    ]
    assert "looked at 5 pointers that kexts import" in found.said


# What the machine's own kernel does to its code: its table of segments stands there, and start-up
# writes where that is (tests/machine/src/start_x86_64.s)
GDT = ("high", "_mb_header+0x35")
_LIME = struct.Struct("<IIQQ8x")
_STATIC = 0xFFFFFF8000000000  # the static kernel lies this far above its physical address


class Sample:
    """The embedded machine, which has real code: its files, and a way to write to its memory."""

    def __init__(self, folder):
        files = {os.path.basename(path): path for path in write(folder, "machine")}
        self.kernel, self.memory = files["mach_kernel"], files["memory.lime"]
        with kvmtool.open(self.kernel, self.memory) as kvm:
            self.symbols = {symbol.name: symbol.address for symbol in kvm.symbols}
            self.slide = kvm.kerndisp
            self.mmread = kvm.address("org.kvmtool.machine.mmread:_my_mmread")

    def write(self, address, data):
        with open(self.memory, "r+b") as file:
            while header := file.read(_LIME.size):
                _, _, start, end = _LIME.unpack(header)
                place = address - _STATIC - start
                if 0 <= place <= end - start:
                    file.seek(place, 1)
                    file.write(data)
                    return
                file.seek(end - start + 1, 1)
        raise AssertionError(f"{address:#x} is not in the sample")

    def checked(self, *options):
        return checked(self.kernel, self.memory, "--only", "text", *options)


@pytest.fixture
def sample(tmp_path):
    return Sample(str(tmp_path))


def shown(found):
    return [(row["severity"], row["where"]) for row in found.rows]


def test_code_of_a_machine_that_ran_is_that_of_its_file(sample):
    found = sample.checked("--all")
    assert found.code == 3
    assert shown(found) == [GDT, ("info", "__TEXT")]
    assert "by the booter" in found.rows[1]["evidence"]
    assert "93 cf 00 17 00 90 14 40 04 in memory" in found.rows[0]["evidence"]


def test_code_that_was_written_over(sample):
    """A jump to the kext, a longer one out of every image, a breakpoint: each is found."""
    at = sample.symbols
    distance = sample.mmread - at["_print"] - 5
    sample.write(at["_print"], b"\xe9" + struct.pack("<i", distance))
    sample.write(at["_crc32"], b"\x48\xb8" + struct.pack("<Q", HEAP) + b"\xff\xe0")
    sample.write(at["_memcpy"], b"\xcc")
    found = sample.checked()
    assert shown(found) == [
        GDT,
        ("medium", "_memcpy"),
        ("high", "_crc32"),
        ("high", "_print"),
    ]
    _, stop, far, near = found.rows
    assert "a breakpoint: 1 bytes, 55 in the file, cc in memory" in stop["evidence"]
    assert near["found"]["name"] == "org.kvmtool.machine.mmread:_my_mmread"
    assert near["evidence"].startswith(
        "code goes to org.kvmtool.machine.mmread:_my_mmread: 5 bytes"
    )
    assert near["address"] == hex(at["_print"])
    assert far["found"]["address"] == hex(HEAP)
    assert far["address"] == hex(at["_crc32"])  # its first byte is what it was


def test_probes_of_dtrace_are_known(sample):
    """_mmread is push, mov %rsp,%rbp, xor, pop, ret: it has a probe at its entry and its return."""
    sample.write(sample.symbols["_mmread"] + 1, b"\xf0")
    sample.write(sample.symbols["_mmread"] + 6, b"\xf0")
    assert shown(sample.checked()) == [GDT]
    every = sample.checked("--all")
    assert shown(every) == [GDT, ("info", "_mmread+0x1"), ("info", "__TEXT")]
    assert every.rows[1]["kind"] == "expected"
    assert "a probe of dtrace" in every.rows[1]["evidence"]
    sample.write(sample.symbols["_mmread"] + 4, b"\xf0")  # no probe is made of an xor
    assert ("high", "_mmread+0x1") in shown(sample.checked())


def test_relocations_of_code_are_known(sample):
    with open(sample.kernel, "rb") as file:
        kernel = bytearray(file.read())
    at, text = sample.symbols["_ptcread"] - sample.slide, 0xFFFFFF8000200000
    (word,) = struct.unpack_from("<Q", kernel, at - text)  # __TEXT is first in the file
    sample.write(at + sample.slide, struct.pack("<Q", (word + sample.slide) & (1 << 64) - 1))
    assert ("high", "_ptcread+0x2") in shown(sample.checked())
    entry = struct.pack(
        "<II", at - text, 1 | 3 << 25
    )  # in section 1, 8 bytes, X86_64_RELOC_UNSIGNED
    chains.add_command(kernel, struct.pack("<20I", 0xB, 80, *[0] * 16, len(kernel), 1))
    with open(sample.kernel, "wb") as file:
        file.write(kernel + entry)
    assert shown(sample.checked()) == [GDT]


def test_lockstats_probes_are_known(crash, symbols, tmp_path):
    """A return that became a nop: at the kernel's own label for it, and one byte beside."""
    kernel = str(tmp_path / "mach_kernel")
    shutil.copyfile(real(KERNEL), kernel)
    with kvmtool.open(kernel, crash.path) as kvm:
        label = kvm.nearest_target().pointer(symbols["_lck_mtx_unlock_lockstat_patch_point"])
        text = kvm.kernel.segment("__TEXT")
        (found,) = kvm.symbols.at(label)[:1]
    assert found.name == "_lck_mtx_unlock"
    for place in (label, label + 32):
        with open(kernel, "r+b") as file:
            file.seek(text.fileoff + place - text.vmaddr)
            file.write(b"\xc3")
        crash.write(place, b"\x90")
    found = checked(kernel, crash.path, "--only", "text", "--all")
    code = {row["address"]: row for row in found.rows if "constant" not in row["evidence"]}
    assert (code[hex(label)]["severity"], code[hex(label)]["kind"]) == ("info", "expected")
    assert "a lockstat probe of dtrace" in code[hex(label)]["evidence"]
    assert code[hex(label + 32)]["severity"] == "high"


def test_code_that_is_another_kernels(sample):
    """Where much differs one finding says how much."""
    with open(sample.kernel, "rb") as file:
        kernel = bytearray(file.read())
    for at in range(0x1470, 0x4660, 32):  # __text begins at 0x1470 of the file
        kernel[at] ^= 0xFF
    with open(sample.kernel, "wb") as file:
        file.write(kernel)
    found = sample.checked()
    assert shown(found) == [("high", "__TEXT,__text")]
    assert found.rows[0]["evidence"].startswith("4 of 4 pages differ")


def test_code_that_is_not_all_there(sample):
    """A page of code is taken out of the dump: the rest is judged, and it is said."""
    lost = (sample.symbols["_mmread"] & ~0xFFF) - _STATIC
    with open(sample.memory, "rb") as file:
        memory = file.read()
    parts, at = [], 0
    while at < len(memory):
        magic, version, start, end = _LIME.unpack_from(memory, at)
        data = memory[at + _LIME.size : at + _LIME.size + end - start + 1]
        at += _LIME.size + len(data)
        runs = [(start, data)]
        if start <= lost <= end:
            runs = [(start, data[: lost - start]), (lost + 0x1000, data[lost + 0x1000 - start :])]
        for first, bytes_there in runs:
            if bytes_there:
                last = first + len(bytes_there) - 1
                parts += [_LIME.pack(magic, version, first, last), bytes_there]
    with open(sample.memory, "wb") as file:
        file.write(b"".join(parts))
    found = sample.checked()
    assert (found.code, shown(found)) == (3, [GDT])
    assert "text: incomplete: __TEXT,__text: 0x1000 of 0x31f5 bytes cannot be read" in found.said


def test_without_a_kernels_file_its_code_cannot_be_compared():
    found = CliRunner().invoke(
        cli, ["check", "-M", real("machine/crash.kdp-core"), "--only", "text", "--only", "syscalls"]
    )
    assert found.exit_code == 0
    assert "text: not there: no kernel file to compare with: name it with -N" in found.stderr
    assert "pointers in sysent" in found.stderr


def test_policies(tmp_path):
    """Planted where the dump has zeros: the hooks of one policy, two of which lead astray."""
    dump = "x86_64-10.13.6"
    core = Core(tmp_path, plain_core(dump))
    kernel, types = real(f"dumps/{dump}/mach_kernel"), real(f"types/{dump}.types.json.gz")
    article = kext_in(dump)
    with kvmtool.open(kernel, plain_core(dump), types=types) as kvm:
        head, good = kvm.address("_mac_policy_list"), kvm.address("_vnode_getattr")
        pages = range(head & ~0xFFF, 0, -0x1000)  # of the kernel's own data
        room = next(at for at in pages[1:] if not any(kvm.read(at, 0x1000)))
        members = kvm.types.struct("mac_policy_ops").members
        opened, created, renamed = (
            members[f"mpo_vnode_check_{name}"].offset for name in ("open", "create", "rename")
        )
    entries, conf, name, hooks = room, room + 0x100, room + 0x200, room + 0x300
    core.write(head, struct.pack("<6IQ", 1, 512, 0, 3, 1, 1, entries))
    core.pointer(entries + 8, conf)  # the first was unloaded
    core.write(name, b"Planted\0")
    core.write(conf, struct.pack("<QQQIxxxxQ", name, name, 0, 0, hooks))
    core.pointer(hooks + opened, good)
    core.pointer(hooks + created, HEAP)
    core.pointer(hooks + renamed, article["address"] + 0xC10)
    found = checked(kernel, core.path, "--only", "policies", "--types", types)
    assert {row["where"]: (row["kind"], row["address"]) for row in found.rows} == {
        "policy Planted: mpo_vnode_check_create": ("outside", hex(hooks + created)),
        "policy Planted: mpo_vnode_check_rename": ("hook", hex(hooks + renamed)),
    }
    assert "looked at 3 pointers in the policies, 1 policies" in found.said
    numbered = checked(kernel, core.path, "--only", "policies")
    assert {row["where"] for row in numbered.rows} == {
        f"policy Planted: mpc_ops[{created // 8}]",
        f"policy Planted: mpc_ops[{renamed // 8}]",
    }


def test_interrupts_by_the_second_mapping(tmp_path):
    """From 10.13.2 on gates lead dblmap_dist bytes beside the code they mean."""
    dump = "x86_64-10.13.6"
    core = Core(tmp_path, plain_core(dump))
    with kvmtool.open(real(f"dumps/{dump}/mach_kernel"), plain_core(dump)) as kvm:
        table = kvm.address("_master_idt64")
        code = next(
            section.addr + kvm.kerndisp
            for section in kvm.kernel.sections
            if (section.segname, section.sectname) == ("__HIB", "__text")
        )
        base, end, distance = (kvm.address(f"_dblmap_{n}") for n in ("base", "max", "dist"))
        start = kvm.kernel.segment("__HIB").vmaddr + kvm.kerndisp
    mapped = 0xFFFFFFE000000000
    core.pointer(base, mapped)
    core.pointer(end, mapped + 0x99000)
    core.pointer(distance, mapped - start & (1 << 64) - 1)

    def gate(number, handler, access=0x8E):
        low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
        core.write(table + 16 * number, struct.pack("<HHBBHII", low, 8, 0, access, middle, high, 0))

    gate(0, code - start + mapped)
    gate(3, code, 0xEE)
    gate(13, mapped + 0x40)  # the second mapping of page tables
    gate(14, 0xFFFFFFE000000000 - 0x1000)
    gate(15, HEAP, 0x0E)  # not present
    found = checked(real(f"dumps/{dump}/mach_kernel"), core.path, "--only", "interrupts")
    assert [(row["kind"], row["where"]) for row in found.rows] == [
        ("outside", "interrupt vector 0xd"),
        ("outside", "interrupt vector 0xe"),
    ]
    assert "looked at 4 pointers" in found.said


I386 = "i386-10.5.8"
TOP = 0xFFE00000  # HIGH_MEM_BASE of a kernel with PAE: osfmk/i386/pmap.h


def narrow(handler, access=0x8E):
    """A gate of 32 bits: Intel SDM vol. 3A, 6.11."""
    return struct.pack("<HHBBH", handler & 0xFFFF, 8, 0, access, handler >> 16)


def wide(handler, access=0x8E):
    return struct.pack(
        "<HHBBHII", handler & 0xFFFF, 8, 0, access, handler >> 16 & 0xFFFF, handler >> 32, 0
    )


def test_interrupts_of_i386(tmp_path):
    """Gates lead to the top of memory, where hi_remap_text lies once more."""
    core = Core(tmp_path, plain_core(I386))
    kernel = real(f"dumps/{I386}/mach_kernel")
    with kvmtool.open(kernel, plain_core(I386)) as kvm:
        at = {symbol.name: symbol.address for symbol in kvm.symbols}

    def high(name):
        return at[name] - at["_hi_remap_text"] + TOP

    table = at["_master_idt"]
    core.write(table, narrow(at["_lo_alltraps"]))
    core.write(table + 8 * 8, narrow(0, 0x85))  # a task gate: it has no address
    core.write(table + 13 * 8, narrow(high("_hi_gen_prot")))
    core.write(table + 14 * 8, narrow(high("_hi_page_fault")))
    core.write(table + 0x80 * 8, narrow(high("_hi_unix_scall"), 0xEE))
    core.write(at["_master_idt64"] + 14 * 16, wide(0xFFFFFF80 << 32 | high("_hi_page_fault")))
    clean = checked(kernel, core.path, "--only", "interrupts")
    assert (clean.code, clean.rows) == (0, [])
    assert "looked at 4 pointers in the interrupt table, 1 pointers in" in clean.said
    core.write(table + 13 * 8, narrow(0x12345678))
    core.write(table + 0x80 * 8, narrow(TOP + 0x5000, 0xEE))  # behind what lies there
    core.write(at["_master_idt64"] + 14 * 16, wide(0xFFFFFF8012345678))
    found = checked(kernel, core.path, "--only", "interrupts")
    assert [(row["kind"], row["where"], row["found"]["address"]) for row in found.rows] == [
        ("outside", "interrupt vector 0xd", "0x12345678"),
        ("outside", "interrupt vector 0x80", hex(TOP + 0x5000)),
        ("outside", "interrupt vector 0xe of 64 bits", "0x12345678"),
    ]


@pytest.mark.parametrize("base", [TOP, 0xFFC00000])
def test_the_top_of_memory_must_be_what_it_stands_for(base):
    made = Sparse("10.5.8 i386")
    text = made.alloc(b"\xc3" * 0x100)
    made.symbols |= {"_hi_remap_text": text, "_hi_remap_etext": text + 0x100}
    made.variable("_master_idt", narrow(base + 0x20).ljust(8 * 256, b"\0"))
    assert [(g.number, g.handler) for g in narrow_gates(made.target())] == [(0, text + 0x20)]
    top = made.more("top", base)
    top.write(top.alloc(0x1000), b"\xc3" * 0x100)
    assert [g.handler for g in narrow_gates(made.target())] == [text + 0x20]
    top.write(base + 0x20, b"\xe9")
    (gate,) = narrow_gates(made.target())
    assert gate.handler == gate.mapped == base + 0x20


ARM = "machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel"


@pytest.fixture
def arm(tmp_path):
    """The core inside the corefile that an arm64 kernel wrote, to write into."""
    with open(real("machine/armc.corefile"), "rb") as file:
        file.seek(0x6000)  # data README
        content = zlib.decompressobj(31).decompress(file.read())
    (tmp_path / "whole").write_bytes(content)
    return Core(tmp_path, str(tmp_path / "whole"), "arm")


def test_exception_vectors_of_arm64(arm):
    clean = checked(real(ARM), arm.path, "--only", "interrupts")
    assert (clean.code, clean.rows) == (0, [])
    assert "looked at 16 exception vectors" in clean.said
    with kvmtool.open(real(ARM), arm.path) as kvm:
        base, elsewhere = kvm.address("_ExceptionVectorsBase"), kvm.address("_panic")
    jump = 0x14000000 | (elsewhere - (base + 0x400)) >> 2 & 0x3FFFFFF
    arm.write(base + 0x400, struct.pack("<I", jump))
    arm.write(base + 0x684, b"\x01\x02\x03\x04")
    found = checked(real(ARM), arm.path, "--only", "interrupts")
    assert found.code == 3
    assert [(row["kind"], row["where"], row["address"]) for row in found.rows] == [
        (
            "differs",
            "the vector for synchronous exceptions from 64-bit processes",
            hex(base + 0x400),
        ),
        ("differs", "the vector for interrupts from 32-bit processes", hex(base + 0x684)),
    ]
    assert found.rows[0]["evidence"].startswith("code goes to _panic: ")


@pytest.mark.parametrize("register", ["VBAR_EL1", "VBAR"])
def test_the_vectors_that_a_processor_uses(arm, register, monkeypatch):
    """They may lie elsewhere, but must be the same."""
    with kvmtool.open(real(ARM), arm.path) as kvm:
        base, other = kvm.address("_ExceptionVectorsBase"), kvm.address("_version") & ~0x7FF
        facts = kvm.facts

        def of(*vbar):
            control = tuple({register: value} for value in vbar)
            monkeypatch.setattr(type(kvm), "facts", facts._replace(control=control))
            (outcome,) = check(kvm, ["interrupts"])
            return outcome

        assert of(base, 0).findings == []
        assert of(base).looked["exception vectors in use"] == 1
        assert of(other - 0x100000000).unreadable
        (found,) = of(base, other).findings
    assert (found.kind, found.where) == ("other", "VBAR_EL1 of CPU 1")
    assert found.evidence == f"{other:#x} holds other vectors than those at {base:#x}"


# as llvm-mc 14 encodes them
@pytest.mark.parametrize(
    ("arch", "code", "target"),
    [
        ("x86_64", "e9 fb 00 00 00", 0x1100),  # jmp
        ("x86_64", "48 b8 8877665544332211 ff e0", 0x1122334455667788),  # movabs; jmp *%rax
        ("x86_64", "49 bb 8877665544332211 41 ff e3", 0x1122334455667788),  # the same by %r11
        ("x86_64", "48 b8 8877665544332211 50 c3", 0x1122334455667788),  # push; ret
        ("x86_64", "48 b8 8877665544332211 ff e1", None),  # jmp *%rcx
        ("x86_64", "68 78563412 c3", 0x12345678),  # push; ret
        ("x86_64", "ff 25 00000000 8877665544332211", 0x1122334455667788),  # jmp *0(%rip)
        ("x86_64", "55 48 89 e5 c3", None),
        ("i386", "e9 fb ef ff ff", 0),
        ("arm64", "fcffff17", 0xFF0),  # b #-16
        ("arm64", "00010094", 0x1400),  # bl #1024
        ("arm64", "50000058 00021fd6 8877665544332211", 0x1122334455667788),  # ldr x16, #8; br x16
        ("arm64", "c0035fd6", None),  # ret
        ("arm64", "50", None),
        ("ppc", "48000100", None),
    ],
)
def test_where_code_goes(arch, code, target):
    assert detour.target_of(arch, bytes.fromhex(code), 0x1000) == target


def test_probes_and_breakpoints_of_arm64():
    # add x29, sp, #16; nop; ret; brk #1, as llvm-mc 14 encodes them; FBT_PATCHVAL
    frame, nop, leave = (bytes.fromhex(word) for word in ("fd430091", "1f2003d5", "c0035fd6"))
    stop, probe = bytes.fromhex("200020d4"), (0xE7EEEE7E).to_bytes(4, "little")
    for was in (frame, nop, leave, frame + nop):
        assert detour.is_probe("arm64", was, probe * (len(was) // 4), len(was))
    assert not detour.is_probe("arm64", bytes.fromhex("50000058"), probe, 4)
    assert not detour.is_probe("arm64", frame, nop, 4)
    assert not detour.is_probe("ppc", frame, probe, 4)
    assert detour.is_breakpoint("arm64", stop)
    assert not detour.is_breakpoint("arm64", nop)
    assert not detour.is_breakpoint("ppc", stop)


class Holes:
    """A memory some pages of which are not there."""

    space = "kernel"

    def __init__(self, memory, pages):
        self._memory, self._pages = memory, pages

    def check(self, address, size):
        for page in range(address & ~0xFFF, address + size, 0x1000):
            if page in self._pages:
                raise FaultError("kernel", max(page, address), size, "absent")
        self._memory.check(address, size)

    def read(self, address, size):
        self.check(address, size)
        return self._memory.read(address, size)

    def read_pieces(self, address, size):
        at, end = address, address + size
        while at < end:
            stop = min((at & ~0xFFF) + 0x1000, end)
            if at & ~0xFFF in self._pages:
                yield Piece(at, stop - at, None, "absent")
            else:
                yield from self._memory.read_pieces(at, stop - at)
            at = stop

    def regions(self):
        return self._memory.regions()

    def __len__(self):
        return len(self._memory)


@pytest.mark.filterwarnings("ignore::kvmtool.errors.KvmWarning")
@pytest.mark.parametrize("seed", range(10))
def test_pages_that_are_not_there_accuse_nobody(seed):
    """Of the kernel's data and its heap one page in twenty is lost, at random."""
    chosen = random.Random(seed)
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        data = kvm.kernel.segment("__DATA").vmaddr
        heap_end = 0xFFFFFF8003000000
        pages = {page for page in range(data, heap_end, 0x1000) if chosen.random() < 0.05}
        kvm.__dict__["memory"] = Holes(kvm.memory, pages)
        made = {outcome.name: outcome for outcome in check(kvm)}
    assert list(made) == list(CHECKS)
    assert any(outcome.incomplete for outcome in made.values())
    accused = [f for outcome in made.values() for f in outcome.findings if f.severity == "high"]
    assert not accused


def test_the_article_is_clean(tmp_path):
    """Where a kernel's sections do not say what they hold, its executable segments count."""
    files = {os.path.basename(path): path for path in write(str(tmp_path))}
    found = checked(files["mach_kernel"], files["core"], "--all")
    assert found.code == 0
    (driver,) = found.rows
    assert (driver["where"], driver["expected"]) == ("cdevsw[11]", f"kext {ARTICLE}")
    assert "1 pages of code, 756 pages of constants" in found.said
    with open(files["mach_kernel"], "r+b") as file:
        head = file.read(0x1000)
        file.seek(head.index(b"__text\0") + 56)  # flags of a section
        file.write(bytes(4))
    found = checked(files["mach_kernel"], files["core"], "--only", "text")
    assert "756 pages of code" in found.said


@pytest.mark.parametrize("name", ["cyclic", "missing-page", "truncated", "truncated-early"])
@pytest.mark.parametrize("dump", DUMPS)
def test_damaged_dumps_accuse_nobody(dump, name):
    """What is missing is said; what cannot be followed to its end hides nothing, so nobody."""
    core = real(f"dumps/{dump}/damaged/core.{name}.macho")
    found = checked(real(f"dumps/{dump}/mach_kernel"), core)
    assert found.code == 3
    assert "processes: incomplete: allproc: stopped after" in found.said
    assert not [row for row in found.rows if row["severity"] == "high"]
    for row in found.rows:  # the article's kext, where the list of kexts is cut short
        assert row["check"] == "devices"
        assert "of which some could not be read" in row["evidence"]


def test_what_there_is_to_check():
    listed = CliRunner().invoke(cli, ["check", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(CHECKS)
    wrong = CliRunner().invoke(cli, ["check", "--only", "sysent"])
    assert wrong.exit_code == 2
    assert "expected one of syscalls, traps" in wrong.stderr
    alone = CliRunner().invoke(cli, ["check", "-N", real(KERNEL)])
    assert alone.exit_code == 1
    assert "name a core with -M" in alone.stderr
    dump = "x86_64-10.8.5"
    args = ["check", "-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump)]
    nothing = CliRunner().invoke(cli, [*args, "--only", "sysctl"])
    assert nothing.exit_code == 1
    assert "there was nothing to check" in nothing.stderr


def test_how_far_it_is_is_told(tmp_path):
    write(str(tmp_path))
    heard = []
    files = (str(tmp_path / "mach_kernel"), str(tmp_path / "core"))
    with kvmtool.open(*files) as kvm, progress.listening(heard.append):
        list(check(kvm, ["devices", "sysctl"]))
    steps = [step for step in heard if step.what == "checking"]
    assert [step[1:] for step in steps[:2]] == [(0, 2, "checks"), (1, 2, "checks")]
    assert steps[-1].done == steps[-1].total


def test_the_checks_are_quick():
    """The target is 2 s for a machine's core, start-up included; here without it."""
    began = time.process_time()
    checked(real(KERNEL), real("machine/crash.kdp-core"))
    assert time.process_time() - began < 2
