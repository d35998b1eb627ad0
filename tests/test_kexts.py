"""Loaded kexts, against what was planted."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool import sample
from kvmtool.cli import cli
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.kext import kexts, version_string
from kvmtool.xnu.queues import Report
from tests.inputs import DUMPS, plain_core, real, truth

ARTICLE = "com.osxbook.kext.KernelMemoryAccess"


def where(dump):
    return ("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))


@pytest.mark.parametrize("dump", DUMPS)
def test_kexts_are_those_planted(dump):
    found = CliRunner().invoke(cli, ["kexts", *where(dump), "--format", "json"])
    assert found.exit_code == 0, found.output
    rows = {row["index"]: row for row in json.loads(found.stdout)}
    planted = {kext["id"]: kext for kext in truth(dump)["kexts"]}
    assert list(rows) == sorted(planted, reverse=True)  # last loaded first
    for index, kext in planted.items():
        row = rows[index]
        assert (row["identifier"], row["version"]) == (kext["name"], kext["version"])
        assert row["refs"] == kext["reference_count"]
        assert row["linked"] == kext["references"]
        addresses = {name: int(row[name], 16) for name in ("address", "size", "kmod", "start")}
        assert addresses == {
            "address": kext["address"],
            "size": kext["size"],
            "kmod": kext["kmod_info"],
            "start": kext["start"],
        }
        assert int(row["wired"], 16) == kext["size"] - kext["hdr_size"]
        if "summaries" in row["lists"]:
            assert row["uuid"] == kext["uuid"]
    assert found.stderr == ""  # both lists agree


def test_a_summary_s_version_is_the_kmod_s():
    compared = 0
    for dump in DUMPS:
        for kext in truth(dump)["kexts"]:
            if "summary_version" in kext:
                # the number does not tell 1.0.0 from 1.0
                told = version_string(kext["summary_version"])
                assert told in (kext["version"], kext["version"].removesuffix(".0"))
                compared += 1
    assert compared >= 20


def test_a_pointer_into_a_kext_names_it():
    dump = "x86_64-10.8.5"
    planted = truth(dump)["cdevsw"]
    (kext,) = [k for k in truth(dump)["kexts"] if k["name"] == ARTICLE]
    with kvmtool.open(*where(dump)[1::2]) as kvm:
        address = planted["kext_symbols"]["_my_mmread"]
        code = kvm.code_at(address)
        assert (code.kext, code.symbol, code.inside) == (ARTICLE, None, True)
        assert code.offset == address - kext["address"]
        entry = planted["entries"][0]["d_open"]
        assert str(kvm.code_at(entry)) == "_cnopen"
        assert not kvm.code_at(kext["address"] - 0x100000000).inside
    with kvmtool.open(
        *where(dump)[1::2], kexts=[(real(f"dumps/{dump}/KernelMemoryAccess"), kext["address"])]
    ) as kvm:
        assert str(kvm.code_at(address)) == f"{ARTICLE}:_my_mmread"


class Lying:
    """A memory in which some addresses hold other bytes."""

    def __init__(self, memory, lies):
        self._memory, self._lies = memory, lies

    def read(self, address, size):
        data = bytearray(self._memory.read(address, size))
        for at, told in self._lies.items():
            for place, byte in enumerate(told, at - address):
                if 0 <= place < size:
                    data[place] = byte
        return bytes(data)

    def __getattr__(self, name):
        return getattr(self._memory, name)


def test_lists_that_differ_are_told_apart():
    dump = "x86_64-10.8.5"
    with kvmtool.open(*where(dump)[1::2]) as kvm:
        target = kvm.verified_target()
        header = target.pointer(kvm.address("_gLoadedKextSummaries"))
        first = header + 16
        target.memory = Lying(target.memory, {first: b"hidden\0", header + 16 + 0x50: b"\x01"})
        report = Report()
        found = kexts(target, report)
    names = [kext.name for kext in found]
    assert "hidden" in names
    assert len(names) == len(truth(dump)["kexts"]) + 1
    assert any("hidden: in the kext summaries, not in the kmod list" in n for n in report.notes)
    assert any("in the kmod list, not in the kext summaries" in n for n in report.notes)


def test_a_torn_list_says_where():
    dump = "x86_64-10.8.5"
    with kvmtool.open(*where(dump)[1::2]) as kvm:
        target = kvm.verified_target()
        head = kvm.address("_kmod")
        second = target.pointer(target.pointer(head))
        target.memory = Lying(target.memory, {second: (0x1234).to_bytes(8, "little")})
        report = Report()
        found = kexts(target, report)
    # the summaries have the rest; what the torn link led to is shown for what it is
    names = [kext.name for kext in found]
    assert len(names) == len(truth(dump)["kexts"]) + 1
    assert [name for name in names if isinstance(name, Unreadable)] == [names[2]]
    assert any(stop.startswith("kmod: stopped after 3 elements") for stop in report.stops)


@pytest.mark.parametrize("dump", DUMPS)
def test_a_kext_s_file_beside_the_kernel_gives_its_symbols(dump, tmp_path):
    """Found by UUID, or by identifier and version where one of the two has no UUID."""
    for name in ("mach_kernel", "KernelMemoryAccess"):
        shutil.copy(real(f"dumps/{dump}/{name}"), tmp_path / name)
    (tmp_path / "not a kext").write_bytes(b"\xcf\xfa\xed\xfe damaged")
    planted = truth(dump)["cdevsw"]["kext_symbols"]
    with kvmtool.open(str(tmp_path / "mach_kernel"), plain_core(dump)) as kvm:
        for name, address in planted.items():
            assert str(kvm.code_at(address)) == f"{ARTICLE}:{name}"
            assert kvm.lookup(f"KernelMemoryAccess:{name}").address == address


def test_another_kext_s_file_is_left_alone(tmp_path):
    """10.13.6's build of the article's kext lies beside 10.8.5's kernel."""
    shutil.copy(real("dumps/x86_64-10.8.5/mach_kernel"), tmp_path / "mach_kernel")
    shutil.copy(real("dumps/x86_64-10.13.6/KernelMemoryAccess"), tmp_path / "KernelMemoryAccess")
    planted = truth("x86_64-10.8.5")["cdevsw"]["kext_symbols"]
    with kvmtool.open(str(tmp_path / "mach_kernel"), plain_core("x86_64-10.8.5")) as kvm:
        assert kvm.code_at(planted["_my_mmread"]).symbol is None


def test_a_kext_in_memory_whose_symbols_its_loader_left_as_linked(tmp_path):
    """The machine's loader slid the kext's header, not its symbols; the serial line says where."""
    paths = {os.path.basename(path): path for path in sample.write(str(tmp_path), "machine")}
    with open(paths["serial.jsonl"]) as lines:
        said = next(row for row in map(json.loads, lines) if row["kind"] == "kext")
    where = ("-N", paths["mach_kernel"], "-M", paths["memory.lime"])
    found = CliRunner().invoke(cli, ["nlist", f"{said['name']}:_my_mmread", *where])
    assert found.stdout.split()[0] == said["my_mmread"]
    found = CliRunner().invoke(cli, ["print", "cdevsw[11].d_read", *where])
    assert found.stdout == f"{said['my_mmread']}  {said['name']}:_my_mmread\n"
