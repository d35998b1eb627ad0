"""Open files of generated machines: tables that lie, slots on missing pages, twenty thousand."""

from __future__ import annotations

import json
import struct
import time

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.types import layouts
from tests.builders import xnu
from tests.builders.descriptors import SOCKET, Descriptors, Fd
from tests.builders.eras import banner_of
from tests.builders.filesystem import FileSystem
from tests.builders.sockets import Sockets
from tests.builders.specs import ProcSpec

NAMES = ("10.4.11 i386", "10.9.5 x86_64", "12.5 arm64")


class Planted:
    """A machine with `wanted` open in each of its processes; `tables` are filedesc by pid."""

    def __init__(self, name, wanted, pids=(71,), limit=None):
        self.name = name
        self.tables = {}
        layout, arch = layouts.table(name), name.rpartition(" ")[2]
        self.layout = layout
        procs = [ProcSpec(1, "launchd", ppid=0), *(ProcSpec(pid, f"p{pid}", 1) for pid in pids)]

        def part(ground):
            if limit is not None:
                ground.int_variable("_maxfilesperproc", limit)
            files = FileSystem(ground)
            files.plant()
            sockets = Sockets(ground, 71)
            sockets.plant()
            descriptors = Descriptors(ground, files, sockets)
            for pid in pids:
                self.tables[pid] = descriptors._table(pid)
                descriptors._fill(self.tables[pid], wanted)
            return {}

        self.built = xnu.build(layout, arch, procs, banner=banner_of(name), parts=[part])

    def write(self, folder, core=None):
        (folder / "kernel").write_bytes(self.built.kernel)
        (folder / "core").write_bytes(self.built.core if core is None else core)
        where = ("-N", str(folder / "kernel"), "-M", str(folder / "core"))
        return (*where, "--layout", self.name)

    def patched(self, pid, member, data):
        """A core where a member of the table of `pid` has other bytes."""
        place = self.tables[pid].address + self.layout.offset("filedesc", member)
        with self.built.patched(place, data):
            return self.built.dump()

    def pointer(self, pid, member):
        place = self.tables[pid].address + self.layout.offset("filedesc", member)
        width = self.built.memory.width
        value = int.from_bytes(self.built.memory.read(place, width), "little")
        return value | 0xFFFF800000000000 if "arm64" in self.name else value


def ask(where, status):
    found = CliRunner().invoke(cli, ["files", *where, "--format", "json"])
    assert found.exit_code == status, found.output
    return json.loads(found.stdout), found.stderr


def null(count, step=1):
    return {fd: Fd("/dev/null", "CHR", 1) for fd in range(0, count * step, step)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("limit", "most"), [(None, 1 << 18), (0, 1 << 18), (20_000, 20_000), (99, 10240)]
)
def test_a_length_beyond_what_the_kernel_allows(name, limit, most, tmp_path):
    planted = Planted(name, null(3), limit=limit)
    for claim in (0x7FFFFFFF, 300_000, -1):
        core = planted.patched(71, "fd_nfiles", struct.pack("<i", claim))
        rows, said = ask(planted.write(tmp_path, core), 3)
        assert f"the table says {claim} slots, the kernel allows {most}" in said
        assert {0, 1, 2} <= {row["fd"] for row in rows if row["pid"] == 71}


@pytest.mark.parametrize("name", NAMES)
def test_two_lengths_beyond_reason(name, tmp_path):
    planted = Planted(name, null(3))
    after = planted.layout.has("filedesc", "fd_afterlast")
    last = "fd_afterlast" if after else "fd_lastfile"
    size = 2 if name.startswith("10.4") else 4
    place = planted.tables[71].address + planted.layout.offset("filedesc", last)
    with planted.built.patched(place, b"\xf0" * size):
        core = planted.patched(71, "fd_nfiles", b"\xff" * 4)
    rows, said = ask(planted.write(tmp_path, core), 3)
    assert "descriptors of pid 71: stopped after" in said
    assert "the table says -1 slots" in said
    held = {row["fd"] for row in rows if row["pid"] == 71 and isinstance(row["fd"], int)}
    assert held >= {0, 1, 2} if size == 2 else not held  # 61,680 slots are allowed


@pytest.mark.parametrize("name", NAMES)
def test_slots_on_a_missing_page_are_counted(name, tmp_path):
    """3,000 slots lie on two pages or more; one of these, without the table itself, is missing."""
    planted = Planted(name, null(3000))
    page, width = planted.built.memory.page, planted.built.memory.width
    files, table = planted.pointer(71, "fd_ofiles"), planted.tables[71].address
    slots = [files + slot * width for slot in range(3000)]
    gone = next(at & -page for at in slots if at & -page != table & -page)
    first = max(0, (gone - files) // width)
    last = min(3005, (gone + page - files - 1) // width)
    rows, said = ask(planted.write(tmp_path, planted.built.dump(without=[gone])), 3)
    assert f"descriptors of pid 71: slots {first} to {last} are unmapped at " in said
    held = {row["fd"] for row in rows if row["pid"] == 71 and isinstance(row["fd"], int)}
    assert held == set(range(3000)) - set(range(first, last + 1))


@pytest.mark.parametrize("name", NAMES)
def test_flags_on_a_missing_page_cost_only_themselves(name, tmp_path):
    planted = Planted(name, null(3))
    core = planted.patched(71, "fd_ofileflags", planted.built.memory.pointer(8))
    rows, _ = ask(planted.write(tmp_path, core), 3)
    held = [row for row in rows if row["pid"] == 71 and isinstance(row["fd"], int)]
    assert [row["path"] for row in held] == ["/dev/null"] * 3
    assert all("unreadable" in row["slot"] for row in held)
    own = planted.layout.has("fileproc", "fp_guard_attrs")
    assert all(row["cloexec"] is False if own else "unreadable" in row["cloexec"] for row in held)


@pytest.mark.parametrize("name", NAMES)
def test_a_type_that_is_none_is_marked(name, tmp_path):
    planted = Planted(name, {0: Fd("odd", 77), 1: Fd("/dev/null", "CHR", 1)})
    rows, _ = ask(planted.write(tmp_path), 3)
    odd, plain = (row for row in rows if row["pid"] == 71 and isinstance(row["fd"], int))
    assert odd["type"]["unreadable"].endswith("is 77")
    assert plain["type"] == "CHR"


def test_twenty_thousand_descriptors(tmp_path):
    """Files and sockets of fifty processes, in at most 3 s with all columns."""
    wanted = {
        fd: Fd("ssh", SOCKET) if fd % 4 == 3 else Fd(f"/private/var/log/{fd}.log", "REG", 1, fd)
        for fd in range(400)
    }
    planted = Planted("10.13.6 x86_64", wanted, pids=range(100, 150))
    where = planted.write(tmp_path)
    start = time.process_time()
    rows, said = ask(where, 0)
    took = time.process_time() - start
    assert said == ""
    assert sum(isinstance(row["fd"], int) for row in rows) == 20_000
    assert took < 3, f"{took:.1f} s"
