"""kinfo_proc: its bytes as the headers lay them out, its values as a running kernel told them."""

from __future__ import annotations

import functools
import mmap
import random
import struct
from contextlib import ExitStack
from dataclasses import asdict, replace

import pytest

from kvmtool import kvm
from kvmtool.arch import arch_for
from kvmtool.errors import FaultError, FormatError, KvmError, UnsupportedError
from kvmtool.macho import MachO
from kvmtool.source import open_source
from kvmtool.symbols import SymbolTable
from kvmtool.target import Target
from kvmtool.types import layouts
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.getprocs import (
    KERN_PROC_ALL,
    KERN_PROC_PGRP,
    KERN_PROC_PID,
    KERN_PROC_RUID,
    KERN_PROC_SESSION,
    KERN_PROC_TTY,
    KERN_PROC_UID,
    getprocs,
)
from kvmtool.xnu.kinfo import ExternProc, Itimerval, KinfoProc, Timeval
from kvmtool.xnu.kinfo_reader import NO_PID
from kvmtool.xnu.queues import Report
from tests.builders.xnu import ProcSpec, build
from tests.inputs import oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"

# What moves between the sysctl and the dump some seconds later. Everything else must be equal.
MOVING = {
    "kp_eproc.e_ucred.cr_ref": "every thread and open file that comes or goes counts",
}

# bsd/sys/proc.h and sysctl.h: path, then offset and size for a 32-bit and for an LP64 program.
OFFSETS = """
kp_proc.p_starttime 0 8 0 12
kp_proc.p_vmspace 8 4 16 8
kp_proc.p_sigacts 12 4 24 8
kp_proc.p_flag 16 4 32 4
kp_proc.p_stat 20 1 36 1
kp_proc.p_pid 24 4 40 4
kp_proc.p_oppid 28 4 44 4
kp_proc.p_dupfd 32 4 48 4
kp_proc.user_stack 36 4 56 8
kp_proc.exit_thread 40 4 64 8
kp_proc.p_debugger 44 4 72 4
kp_proc.sigwait 48 4 76 4
kp_proc.p_estcpu 52 4 80 4
kp_proc.p_cpticks 56 4 84 4
kp_proc.p_pctcpu 60 4 88 4
kp_proc.p_wchan 64 4 96 8
kp_proc.p_wmesg 68 4 104 8
kp_proc.p_swtime 72 4 112 4
kp_proc.p_slptime 76 4 116 4
kp_proc.p_realtimer 80 16 120 28
kp_proc.p_rtime 96 8 152 12
kp_proc.p_uticks 104 8 168 8
kp_proc.p_sticks 112 8 176 8
kp_proc.p_iticks 120 8 184 8
kp_proc.p_traceflag 128 4 192 4
kp_proc.p_tracep 132 4 200 8
kp_proc.p_siglist 136 4 208 4
kp_proc.p_textvp 140 4 216 8
kp_proc.p_holdcnt 144 4 224 4
kp_proc.p_sigmask 148 4 228 4
kp_proc.p_sigignore 152 4 232 4
kp_proc.p_sigcatch 156 4 236 4
kp_proc.p_priority 160 1 240 1
kp_proc.p_usrpri 161 1 241 1
kp_proc.p_nice 162 1 242 1
kp_proc.p_comm 163 17 243 17
kp_proc.p_pgrp 180 4 264 8
kp_proc.p_addr 184 4 272 8
kp_proc.p_xstat 188 2 280 2
kp_proc.p_acflag 190 2 282 2
kp_proc.p_ru 192 4 288 8
kp_eproc.e_paddr 196 4 296 8
kp_eproc.e_sess 200 4 304 8
kp_eproc.e_pcred.pc_lock 204 72 312 72
kp_eproc.e_pcred.pc_ucred 276 4 384 8
kp_eproc.e_pcred.p_ruid 280 4 392 4
kp_eproc.e_pcred.p_svuid 284 4 396 4
kp_eproc.e_pcred.p_rgid 288 4 400 4
kp_eproc.e_pcred.p_svgid 292 4 404 4
kp_eproc.e_pcred.p_refcnt 296 4 408 4
kp_eproc.e_ucred.cr_ref 300 4 416 4
kp_eproc.e_ucred.cr_uid 304 4 420 4
kp_eproc.e_ucred.cr_ngroups 308 2 424 2
kp_eproc.e_ucred.cr_groups 312 64 428 64
kp_eproc.e_vm.dummy 376 4 496 4
kp_eproc.e_vm.dummy2 380 4 504 8
kp_eproc.e_vm.dummy3 384 20 512 20
kp_eproc.e_vm.dummy4 404 12 536 24
kp_eproc.e_ppid 416 4 560 4
kp_eproc.e_pgid 420 4 564 4
kp_eproc.e_jobc 424 2 568 2
kp_eproc.e_tdev 428 4 572 4
kp_eproc.e_tpgid 432 4 576 4
kp_eproc.e_tsess 436 4 584 8
kp_eproc.e_wmesg 440 8 592 8
kp_eproc.e_xsize 448 4 600 4
kp_eproc.e_xrssize 452 2 604 2
kp_eproc.e_xccount 454 2 606 2
kp_eproc.e_xswrss 456 2 608 2
kp_eproc.e_flag 460 4 612 4
kp_eproc.e_login 464 12 616 12
kp_eproc.e_lcid 476 4 628 4
kp_eproc.e_spare 480 12 632 12
"""
TABLE = [line.split() for line in OFFSETS.split("\n") if line]


def put(record, path: str, value):
    """The record with another value at the dotted `path`."""
    head, _, rest = path.partition(".")
    return replace(record, **{head: put(getattr(record, head), rest, value) if rest else value})


def get(record, path: str):
    return functools.reduce(getattr, path.split("."), record)


def ones(value):
    """All bits of every number and byte in a field set."""
    if isinstance(value, tuple):
        return type(value)(*map(ones, value)) if hasattr(value, "_fields") else (-1,) * len(value)
    return b"\xff" * 72 if isinstance(value, bytes) else -1


# bytes


@pytest.mark.parametrize(("path", "off32", "size32", "off64", "size64"), TABLE)
def test_every_field_lies_where_the_header_puts_it(path, off32, size32, off64, size64):
    """One field is set, all others are 0: its bytes are there and nowhere else."""
    record = put(KinfoProc(), path, ones(get(KinfoProc(), path)))
    for lp64, at, size in ((False, int(off32), int(size32)), (True, int(off64), int(size64))):
        data = record.pack("<", lp64)
        used = {place for place, byte in enumerate(data) if byte}
        assert min(used) == at, f"lp64={lp64}"
        assert max(used) == at + size - 1, f"lp64={lp64}"


def test_the_table_names_every_field():
    def names(record, prefix=""):
        for name, value in record.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert list(names(asdict(KinfoProc()))) == [row[0] for row in TABLE]


def test_sizes_are_492_and_648():
    assert len(KinfoProc().pack("<", lp64=False)) == 492
    assert len(KinfoProc().pack(">", lp64=False)) == 492
    assert len(KinfoProc().pack("<", lp64=True)) == 648


@pytest.mark.parametrize("lp64", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_round_trip(order, lp64):
    """What is unpacked from any bytes packs to bytes that unpack to the same."""
    size = 648 if lp64 else 492
    data = random.Random(492648).randbytes(20 * size)
    records = KinfoProc.unpack(data, order, lp64)
    packed = b"".join(record.pack(order, lp64) for record in records)
    assert len(records) == 20
    assert KinfoProc.unpack(packed, order, lp64) == records
    assert [record.pack(order, lp64) for record in records] == [
        packed[at : at + size] for at in range(0, len(packed), size)
    ]


def test_big_endian_32_bit_is_powerpc():
    record = KinfoProc(kp_proc=ExternProc(p_pid=0x01020304, p_flag=0x4004))
    data = record.pack(">", lp64=False)
    assert data[24:28] == bytes((1, 2, 3, 4))
    assert data[16:20] == bytes((0, 0, 0x40, 4))


def test_a_32_bit_caller_of_a_64_bit_kernel_gets_truncated_values():
    proc = ExternProc(p_starttime=Timeval((5 << 32) + 7, 9), p_textvp=0xFFFFFF8012345678)
    data = KinfoProc(kp_proc=proc).pack("<", lp64=False)
    assert struct.unpack_from("<2i", data, 0) == (7, 9)
    assert struct.unpack_from("<I", data, 140) == (0x12345678,)


def test_a_64_bit_caller_of_a_32_bit_kernel_gets_648_bytes():
    """The layout is the caller's: the values of an i386 kernel in LP64's places."""
    record = KinfoProc(kp_proc=ExternProc(p_pid=5, p_textvp=0xC0001000))
    data = record.pack("<", lp64=True)
    assert struct.unpack_from("<i", data, 40) == (5,)
    assert struct.unpack_from("<Q", data, 216) == (0xC0001000,)


def test_size_mismatch_is_4_4bsds_message():
    with pytest.raises(FormatError, match=r"proc size mismatch \(649 total, 648 chunks\)"):
        KinfoProc.unpack(bytes(649), "<", lp64=True)
    assert KinfoProc.unpack(b"", "<", lp64=True) == []


def test_an_unreadable_field_is_not_packed_as_zero():
    record = put(KinfoProc(), "kp_eproc.e_ucred.cr_uid", Unreadable("absent at 0x1000"))
    with pytest.raises(KvmError, match=r"e_ucred\.cr_uid is unreadable: absent at 0x1000"):
        record.pack("<", lp64=True)


# against the running kernel


def told(name: str) -> list[KinfoProc]:
    """What the kernel itself answered to kern.proc.all."""
    data = bytes.fromhex(oracle(name)["userland"]["mib"]["kern.proc.all"])
    return KinfoProc.unpack(data, "<", lp64=True)


def assert_equal_but_for_what_moves(ours: list[KinfoProc], name: str) -> None:
    theirs = told(name)
    assert [record.kp_proc.p_pid for record in ours] == [r.kp_proc.p_pid for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for path in MOVING:
            our = put(our, path, get(their, path))
        assert our.pack("<", lp64=True) == their.pack("<", lp64=True), f"pid {our.kp_proc.p_pid}"


@functools.cache
def crash() -> kvm.Kvm:
    return kvm.open(real(KERNEL), real("machine/crash.kdp-core"))


def test_bytes_equal_those_of_the_kernel_that_crashed():
    answer = bytes.fromhex(oracle("crash")["userland"]["mib"]["kern.proc.all"])
    assert b"".join(r.pack("<", lp64=True) for r in told("crash")) == answer
    ours = getprocs(crash().verified_target(), KERN_PROC_ALL, pointers=False)
    assert_equal_but_for_what_moves(ours, "crash")
    assert len(ours) == 7


def test_what_moves_did_not_move_far():
    """The list of moving fields must not hide a field we read wrongly."""
    ours = getprocs(crash().verified_target(), KERN_PROC_ALL)
    for our, their in zip(ours, told("crash"), strict=True):
        assert abs(our.kp_eproc.e_ucred.cr_ref - their.kp_eproc.e_ucred.cr_ref) <= 2


def test_p_comm_holds_what_exec_left_behind_the_nul():
    record = next(r for r in crash().getprocs(KERN_PROC_PID, 4))
    assert record.kp_proc.p_comm == b"sh\0nchd\0ask\0\0\0\0\0\0"
    assert record.comm == "sh"


def test_pointers_come_from_the_core_where_the_live_kernel_keeps_them_back():
    procs = {proc["p_pid"]: proc for proc in oracle("crash")["procs"]}
    records = crash().getprocs()
    for record in records:
        proc = procs[record.kp_proc.p_pid]
        assert record.kp_eproc.e_paddr == int(proc["addr"], 16)
        assert record.kp_proc.p_pgrp == int(proc["p_pgrp"], 16)
        assert record.kp_proc.p_textvp == int(proc["p_textvp"], 16)
    for record in getprocs(crash().verified_target(), KERN_PROC_ALL, pointers=False):
        assert record.kp_eproc.e_paddr == record.kp_proc.p_pgrp == record.kp_proc.p_textvp == 0


class Walked:
    """Kernel memory behind x86_64 page tables (Intel SDM 3A 4.5): `physical` reads, `cr3` roots."""

    space = "kernel"

    def __init__(self, physical, cr3: int) -> None:
        self._physical = physical
        self._cr3 = cr3

    def _page(self, address: int) -> int:
        table = self._cr3
        for level in (39, 30, 21, 12):
            place = (table & 0xFFFFFFFFFF000) + 8 * (address >> level & 511)
            (table,) = struct.unpack("<Q", self._physical(place, 8))
            if not table & 1:
                raise FaultError(self.space, address, 1)
            if level == 12 or (level < 39 and table & 0x80):
                size = 1 << level
                return (table & 0xFFFFFFFFFF000 & -size) | (address & (size - 1) & -4096)
        raise AssertionError

    def read(self, address: int, size: int) -> bytes:
        parts = []
        while size > 0:
            length = min(size, 4096 - address % 4096)
            parts.append(self._physical(self._page(address) + address % 4096, length))
            address, size = address + length, size - length
        return b"".join(parts)


def elf_reader(data):
    """Reads physical addresses of QEMU's ELF dump by its PT_LOADs."""
    (at,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<2H", data, 54)
    loads = []
    for entry in range(at, at + size * count, size):
        kind, _, offset, _, paddr, filesz = struct.unpack_from("<2I4Q", data, entry)
        if kind == 1:
            loads.append((paddr, filesz, offset))

    def read(address: int, size: int) -> bytes:
        start, _, offset = next(run for run in loads if run[0] <= address < run[0] + run[1])
        at = offset + address - start
        return data[at : at + size]

    return read


@pytest.mark.parametrize("name", ["live", "kaslr"])
def test_bytes_equal_those_of_a_running_kernel(name):
    """The same of a machine that was stopped, not crashed: with slide 0 and with a slide."""
    file = {"live": "machine/live.elfcore", "kaslr": "machine/kaslr.raw"}[name]
    with open(real(file), "rb") as dump:
        data = mmap.mmap(dump.fileno(), 0, access=mmap.ACCESS_READ)
    physical = elf_reader(data) if name == "live" else lambda at, size: data[at : at + size]
    image = MachO(open_source(real(KERNEL)))
    facts = oracle(name)
    memory = Walked(physical, int(str(facts["cr3"]), 0))
    symbols = SymbolTable(image.symtab, int(str(facts["slide"]), 0))
    types = layouts.table("10.9.5 x86_64")
    target = Target(arch_for(image.cputype), memory, symbols, types)
    assert_equal_but_for_what_moves(getprocs(target, KERN_PROC_ALL, pointers=False), name)


# against the made dumps


@functools.cache
def made(dump: str) -> kvm.Kvm:
    return kvm.open(real(f"dumps/{dump}/mach_kernel"), plain_core(dump))


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"])
def test_fields_equal_what_was_planted(dump):
    facts = truth(dump)
    planted = {proc["pid"]: proc for proc in facts["processes"]}
    groups = {group["pgid"]: group for group in facts["pgrps"]}
    sessions = {session["sid"]: session for session in facts["sessions"]}
    records = made(dump).getprocs()
    assert [r.kp_proc.p_pid for r in records] == facts["allproc"] + facts["zombproc"]
    for record in records:
        proc, eproc = record.kp_proc, record.kp_eproc
        fact = planted[proc.p_pid]
        said = {
            "pid": proc.p_pid,
            "stat": proc.p_stat,
            "start": list(proc.p_starttime),
            "nice": proc.p_nice,
            "xstat": proc.p_xstat,
            "ppid": eproc.e_ppid,
            "pgid": eproc.e_pgid,
            "ruid": eproc.e_pcred.p_ruid,
            "svuid": eproc.e_pcred.p_svuid,
            "rgid": eproc.e_pcred.p_rgid,
            "uid": eproc.e_ucred.cr_uid,
            "groups": list(eproc.e_ucred.cr_groups[: eproc.e_ucred.cr_ngroups]),
            "address": eproc.e_paddr,
        }
        assert said == {name: fact[name] for name in said}
        assert record.comm.encode("utf-8", "surrogateescape") == fact["comm"].encode()[:16]
        assert proc.p_flag & ~0x2000 == fact["flag"] & ~0x2000  # P_WEXIT comes from p_lflag
        assert eproc.e_sess == sessions[fact["sid"]]["address"]
        assert proc.p_pgrp == groups[fact["pgid"]]["address"]
        assert bool(eproc.e_flag & 2) == (sessions[fact["sid"]]["leader"] == proc.p_pid)


def device(tty: str | None, flag: int) -> int:
    """dev_t of /dev/ttysNNN (major 16: bsd/kern/tty_ptmx.c), NODEV where there is none."""
    return 16 << 24 | int(tty.removeprefix("/dev/ttys")) if tty and flag & 2 else -1


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"])
def test_terminals(dump):
    planted = {proc["pid"]: proc for proc in truth(dump)["processes"]}
    seen = set()
    for record in made(dump).getprocs():
        fact = planted[record.kp_proc.p_pid]
        assert record.kp_eproc.e_tdev == device(fact["tty"], fact["flag"])
        seen.add(record.kp_eproc.e_tdev)
    assert seen == {-1, 16 << 24, 16 << 24 | 1}


def test_a_kernel_that_does_not_slide_tells_its_addresses():
    """10.5 answers a live sysctl with e_paddr and the rest: the leak was closed in 10.8."""
    target = made("i386-10.5.8").verified_target()
    records = getprocs(target, KERN_PROC_ALL, pointers=False)
    assert records == getprocs(target, KERN_PROC_ALL)
    assert all(record.kp_eproc.e_paddr for record in records)


# filters


def pids(records: list[KinfoProc]) -> set[int]:
    return {record.kp_proc.p_pid for record in records}


FILTERS = {
    KERN_PROC_PID: "pid",
    KERN_PROC_PGRP: "pgid",
    KERN_PROC_SESSION: "sid",
    KERN_PROC_UID: "uid",
    KERN_PROC_RUID: "ruid",
}


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.13.6"])
@pytest.mark.parametrize(("op", "name"), FILTERS.items(), ids=FILTERS.values())
def test_filters_select_exactly_what_matches(dump, op, name):
    """For every value there is, and one there is not; SESSION too, which XNU never filtered by."""
    processes = truth(dump)["processes"]
    values = sorted({proc[name] for proc in processes})
    for value in [*values[:3], *values[-3:], 77777]:
        expected = {proc["pid"] for proc in processes if proc[name] == value}
        assert pids(made(dump).getprocs(op, value)) == expected


def test_tty_filter():
    processes = truth("i386-10.5.8")["processes"]
    for unit in (0, 1, 2):
        expected = {p["pid"] for p in processes if p["tty"] == f"/dev/ttys{unit:03d}"}
        found = made("i386-10.5.8").getprocs(KERN_PROC_TTY, 16 << 24 | unit)
        assert pids(found) == expected
    assert made("i386-10.5.8").getprocs(KERN_PROC_TTY, -1) == []  # NODEV is nobody's terminal


@pytest.mark.parametrize("op", [-1, 7, 8, 0x10, 1 << 40])
def test_unknown_filter(op):
    with pytest.raises(UnsupportedError, match=r"^invalid filter$"):
        made("i386-10.5.8").getprocs(op, 0)


# eras

ERAS = {
    "10.4.11 i386": "8.11.1: x; root:xnu-792.25.20~1/RELEASE_I386",
    "10.5.8 i386": "9.8.0: x; root:xnu-1228.15.4~1/RELEASE_I386",
    "10.6.8 x86_64": "10.8.0: x; root:xnu-1504.15.3~1/RELEASE_X86_64",
    "10.7.5 i386": "11.4.2: x; root:xnu-1699.32.7~1/RELEASE_I386",
    "10.15.6 x86_64": "19.6.0: x; root:xnu-6153.141.1~1/RELEASE_X86_64",
    "11.5 arm64": "20.6.0: x; root:xnu-7195.141.2~5/RELEASE_ARM64_T8101",
    "12.5 arm64": "21.6.0: x; root:xnu-8020.140.41~1/RELEASE_ARM64_T8101",
    "15.5 x86_64": "24.5.0: x; root:xnu-11417.121.6~2/RELEASE_X86_64",
    "15.5 arm64": "24.5.0: x; root:xnu-11417.121.6~2/RELEASE_ARM64_T8101",
}
SPECS = [
    ProcSpec(1, "launchd", ppid=0),
    ProcSpec(40, "sh", uid=4294967294, ruid=501, gid=20, groups=(20, 12, 61), tty=(16, 3), nice=5),
    ProcSpec(41, "vi", ppid=40, pgid=41, sid=40, tty=(16, 3), lflag=0x2408, xstat=9),
    ProcSpec(42, "embryo", stat=1),
    ProcSpec(43, "gone", ppid=40, pgid=41, sid=40, zombie=True, xstat=0x0B),
]


def opened(built, folder) -> kvm.Kvm:
    (folder / "mach_kernel").write_bytes(built.kernel)
    (folder / "core").write_bytes(built.core)
    return kvm.open(str(folder / "mach_kernel"), str(folder / "core"))


def era(name: str, folder, **more):
    arch = name.rpartition(" ")[2]
    banner = f"Darwin Kernel Version {ERAS[name]}"
    built = build(layouts.table(name), arch, SPECS, banner=banner, uuid=bytes(range(16)), **more)
    return built, opened(built, folder)


def one(handle: kvm.Kvm, pid: int) -> KinfoProc:
    (record,) = handle.getprocs(KERN_PROC_PID, pid)
    return record


@pytest.mark.parametrize("name", ERAS)
def test_every_era(name, tmp_path):
    built, handle = era(name, tmp_path)
    records = handle.getprocs()
    assert [r.kp_proc.p_pid for r in records] == [41, 40, 1, 0, 43], "embryos are left out"
    for record in records:
        proc, eproc, fact = record.kp_proc, record.kp_eproc, built.process(record.kp_proc.p_pid)
        assert record.comm == fact["comm"]
        assert proc.p_starttime == (fact["start"] or (0, 0))  # 10.4 frees a zombie's pstats
        assert (proc.p_stat, proc.p_nice, proc.p_xstat) == (
            fact["stat"],
            fact["nice"],
            fact["xstat"],
        )
        assert (eproc.e_ppid, eproc.e_pgid) == (fact["ppid"], fact["pgid"])
        assert (eproc.e_pcred.p_ruid, eproc.e_ucred.cr_uid) == (fact["ruid"], fact["uid"])
        assert list(eproc.e_ucred.cr_groups[: eproc.e_ucred.cr_ngroups]) == fact["groups"]
        assert eproc.e_paddr == fact["address"]
        assert len(record.pack("<", lp64=False)) == 492
        assert KinfoProc.unpack(record.pack("<", lp64=True), "<", lp64=True)[0].comm == fact["comm"]
    shell = one(handle, 40)
    assert (shell.kp_eproc.e_tdev, shell.kp_eproc.e_flag) == (16 << 24 | 3, 2)
    assert one(handle, 41).kp_eproc.e_flag == 0
    handle.close()


@pytest.mark.parametrize("name", ERAS)
def test_traced_vforked_and_exiting_are_told_by_p_flag(name, tmp_path):
    """P_LTRACED, P_LPPWAIT, P_LEXIT, in the era of 10.4 bits of another meaning, and not told."""
    _, handle = era(name, tmp_path)
    told_bits = one(handle, 41).kp_proc.p_flag & (0x800 | 0x10 | 0x2000)
    assert told_bits == (0 if name.startswith("10.4") else 0x800 | 0x10 | 0x2000)
    assert one(handle, 1).kp_proc.p_flag & (0x800 | 0x10 | 0x2000) == 0
    handle.close()


def test_a_uid_may_be_given_signed(tmp_path):
    _, handle = era("10.6.8 x86_64", tmp_path)
    assert pids(handle.getprocs(KERN_PROC_UID, -2)) == {40}
    assert pids(handle.getprocs(KERN_PROC_UID, 4294967294)) == {40}
    assert pids(handle.getprocs(KERN_PROC_UID, 4294967294 + (1 << 32))) == {40}  # a C int is cut
    handle.close()


def planted(name: str, folder, pid: int, *patches: tuple[str, int, str, bytes]) -> KinfoProc:
    """pid's record where memory holds other bytes: (struct, its address, member, bytes) each.

    The address may be 0 for the process itself.
    """
    built, handle = era(name, folder)
    handle.close()
    types = layouts.table(name)
    with ExitStack() as stack:
        for struct_name, address, member, data in patches:
            place = (address or built.process(pid)["address"]) + types.offset(struct_name, member)
            stack.enter_context(built.patched(place, data))
        built.core = built.dump()
    with opened(built, folder) as handle:
        return one(handle, pid)


def test_10_4_tells_its_scheduling_fields(tmp_path):
    """They were members of proc then; p_swtime is also the length of the argument block."""
    values = {
        "p_oppid": struct.pack("<i", 0x11111111),
        "p_dupfd": struct.pack("<i", 0x12121212),
        "p_estcpu": struct.pack("<I", 0x13131313),
        "p_cpticks": struct.pack("<i", 0x14141414),
        "p_pctcpu": struct.pack("<I", 0x15151515),
        "p_swtime": struct.pack("<I", 0x16161616),
        "p_slptime": struct.pack("<I", 0x17171717),
        "p_uticks": struct.pack("<Q", 0x1818181818181818),
        "p_sticks": struct.pack("<Q", 0x1919191919191919),
        "p_iticks": struct.pack("<Q", 0x1A1A1A1A1A1A1A1A),
        "p_traceflag": struct.pack("<i", 0x1B1B1B1B),
        "p_usrpri": b"\x1c",
        "p_sigignore": struct.pack("<I", 0x1D1D1D1D),
        "p_sigcatch": struct.pack("<I", 0x1E1E1E1E),
        "user_stack": struct.pack("<Q", 0x1F1F1F1F),
    }
    patches = [("proc", 0, member, data) for member, data in values.items()]
    record = planted("10.4.11 i386", tmp_path, 40, *patches)
    for name, data in values.items():
        assert getattr(record.kp_proc, name) == int.from_bytes(data, "little"), name


def test_10_4_tells_what_a_process_waits_for(tmp_path):
    """wmesg as pointer and as text of at most 7 characters: here the kernel's own banner."""
    built, handle = era("10.4.11 i386", tmp_path)
    handle.close()
    text = built.address("_version")
    patches = [("proc", 0, name, struct.pack("<I", text)) for name in ("p_wmesg", "p_wchan")]
    record = planted("10.4.11 i386", tmp_path, 40, *patches)
    assert (record.kp_proc.p_wmesg, record.kp_proc.p_wchan) == (text, text)
    assert record.kp_eproc.e_wmesg == b"Darwin "
    assert record.pack("<", lp64=False)[440:448] == b"Darwin \0"


def test_wmesg_that_cannot_be_read_is_unreadable(tmp_path):
    record = planted("10.4.11 i386", tmp_path, 40, ("proc", 0, "p_wmesg", b"\x00\x10\0\xf0"))
    assert isinstance(record.kp_eproc.e_wmesg, Unreadable)
    assert record.kp_proc.p_wmesg == 0xF0001000


def test_10_4_asks_the_terminal_for_its_foreground_group(tmp_path):
    built, handle = era("10.4.11 i386", tmp_path)
    types = layouts.table("10.4.11 i386")
    with handle:
        before = one(handle, 40).kp_eproc
    assert before.e_tpgid == 40
    assert before.e_tsess == before.e_sess
    session = before.e_sess + types.offset("session", "s_ttyp")
    tty = int.from_bytes(built.memory.read(session, 4), "little")
    record = planted("10.4.11 i386", tmp_path, 40, ("tty", tty, "t_pgrp", bytes(4)))
    assert record.kp_eproc.e_tpgid == NO_PID == 30001


@pytest.mark.parametrize("name", ["10.5.8 i386", "11.5 arm64", "15.5 x86_64"])
def test_timers_and_signals(name, tmp_path):
    wide = not name.endswith("i386")
    timeval = "<2q" if wide else "<2i"
    record = planted(
        name,
        tmp_path,
        40,
        ("proc", 0, "p_realtimer", struct.pack(timeval, 1, 2) + struct.pack(timeval, 3, 4)),
        ("proc", 0, "p_rtime", struct.pack(timeval, 5, 6)),
        ("proc", 0, "p_oppid", struct.pack("<i", 7)),
        ("proc", 0, "user_stack", struct.pack("<Q", 0xBFFFF000)),
        ("proc", 0, "p_debugger", struct.pack("<I", 1)),
        ("proc", 0, "sigwait", struct.pack("<I", 1)),
        ("proc", 0, "p_sigignore", struct.pack("<I", 0x80000)),
        ("proc", 0, "p_sigcatch", struct.pack("<I", 0x80000001)),
        ("proc", 0, "p_acflag", struct.pack("<H", 0x12)),
        ("proc", 0, "p_priority", b"\x1f"),
    )
    proc = record.kp_proc
    assert proc.p_realtimer == Itimerval(Timeval(1, 2), Timeval(3, 4))
    assert proc.p_rtime == Timeval(5, 6)
    assert (proc.p_oppid, proc.user_stack, proc.p_debugger) == (7, 0xBFFFF000, 1)
    assert (proc.sigwait, proc.p_sigignore, proc.p_sigcatch) == (1, 0x80000, 0x80000001)
    assert (proc.p_acflag, proc.p_priority) == (0x12, 31)
    assert (proc.p_swtime, proc.p_uticks, proc.p_usrpri, proc.p_siglist) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["12.5 arm64", "15.5 arm64", "15.5 x86_64"])
def test_sigacts_is_part_of_proc_from_12_on(name, tmp_path):
    built, handle = era(name, tmp_path)
    at = layouts.table(name).offset("proc", "p_sigacts")
    with handle:
        assert one(handle, 40).kp_proc.p_sigacts == built.process(40)["address"] + at


def test_12_tells_the_device_of_a_terminal_that_is_gone(tmp_path):
    """s_ttydev outlives s_ttyp; up to 11 a session without a tty has no device."""
    for name, expected in (("11.5 arm64", -1), ("12.5 arm64", 16 << 24 | 3)):
        _, handle = era(name, tmp_path)
        with handle:
            session = one(handle, 40).kp_eproc.e_sess
        record = planted(name, tmp_path, 40, ("session", session, "s_ttyp", bytes(8)))
        assert record.kp_eproc.e_tdev == expected


def test_a_login_context_without_layout_is_unreadable_not_zero(tmp_path):
    record = planted("10.5.8 i386", tmp_path, 40, ("proc", 0, "p_lctx", b"\0\0\0\x20"))
    assert isinstance(record.kp_eproc.e_lcid, Unreadable)
    record = planted("10.5.8 i386", tmp_path, 40, ("proc", 0, "p_lctx", bytes(4)))
    assert record.kp_eproc.e_lcid == 0


def test_all_16_groups_are_told_and_ngroups_is_not_believed(tmp_path):
    built, handle = era("10.5.8 i386", tmp_path)
    handle.close()
    ucred = built.process(40)["ucred"]
    raw = struct.pack("<16I", *range(100, 116))
    record = planted(
        "10.5.8 i386",
        tmp_path,
        40,
        ("ucred", ucred, "cr_groups", raw),
        ("ucred", ucred, "cr_ngroups", struct.pack("<h", 30000)),
    )
    assert record.kp_eproc.e_ucred.cr_groups == tuple(range(100, 116))
    assert record.kp_eproc.e_ucred.cr_ngroups == 30000
    assert record.pack("<", lp64=False)[312:376] == raw


# damage


def damaged(name: str) -> kvm.Kvm:
    return kvm.open(
        real("dumps/i386-10.5.8/mach_kernel"), real(f"dumps/i386-10.5.8/damaged/{name}")
    )


def test_a_missing_page_costs_only_what_lay_on_it():
    """Every other process is told in full; the filters say whom they could not judge."""
    planted_procs = {proc["pid"]: proc for proc in truth("i386-10.5.8")["processes"]}
    hole = truth("i386-10.5.8")["formats"]["damaged"]["core.missing-page.macho"]
    with damaged("core.missing-page.macho") as handle:
        report = Report()
        records = {r.kp_eproc.e_paddr: r for r in handle.getprocs(KERN_PROC_ALL, 0, report)}
        assert report.partial
        for pid, fact in planted_procs.items():
            if pid in hole["procs_touched"]:
                continue
            record = records[fact["address"]]
            assert record.kp_proc.p_pid == pid
            assert record.kp_eproc.e_ucred.cr_uid == fact["uid"]
            record.pack("<", lp64=False)
        touched = [r for r in records.values() if isinstance(r.kp_proc.p_pid, Unreadable)]
        for record in touched:
            with pytest.raises(KvmError, match="is unreadable"):
                record.pack("<", lp64=False)
        report = Report()
        root = {pid for pid, fact in planted_procs.items() if fact["uid"] == 0}
        assert pids(handle.getprocs(KERN_PROC_UID, 0, report)) >= root - {*hole["procs_touched"]}


def test_a_process_that_cannot_be_judged_is_left_out_and_named(tmp_path):
    """Its credentials are not in the core: no uid is made up, and the report says so."""
    built, handle = era("10.5.8 i386", tmp_path)
    handle.close()
    ucred = built.process(40)["ucred"]
    (tmp_path / "core").write_bytes(built.dump(without={ucred}))
    with kvm.open(str(tmp_path / "mach_kernel"), str(tmp_path / "core")) as handle:
        record = one(handle, 40)
        assert isinstance(record.kp_eproc.e_ucred.cr_uid, Unreadable)
        assert record.comm == "sh"
        report = Report()
        assert 40 not in pids(handle.getprocs(KERN_PROC_UID, 4294967294, report))
        assert any(f"{built.process(40)['address']:#x} left out" in note for note in report.notes)


def test_a_cycle_in_allproc_ends():
    with damaged("core.cyclic.macho") as handle:
        report = Report()
        records = handle.getprocs(KERN_PROC_ALL, 0, report)
    assert report.partial
    assert pids(records) == {proc["pid"] for proc in truth("i386-10.5.8")["processes"]}
    assert len(records) == len(pids(records))
