"""The device switches, against what was planted and what an independent reader saw."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvmtool import sample
from kvmtool.cli import cli
from tests.inputs import DUMPS, oracle, plain_core, real, truth

ARTICLE = "com.osxbook.kext.KernelMemoryAccess"
MACHINES = {
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core"),
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile"),
}


def rows(*args):
    found = CliRunner().invoke(cli, ["devsw", *args, "--all", "--format", "json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def of_kind(found, kind):
    return [row for row in found if row["kind"] == kind]


@pytest.mark.parametrize("dump", DUMPS)
def test_slots_are_those_planted(dump):
    found = rows("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    planted = truth(dump)["cdevsw"]
    characters = of_kind(found, "character")
    assert len(characters) == len(planted["entries"])
    assert len(of_kind(found, "block")) == truth(dump)["bdevsw"]["count"]
    for row, entry in zip(characters, planted["entries"], strict=True):
        for name in ("open", "close", "read", "write", "ioctl", "select"):
            assert int(row[name]["address"], 16) == entry[f"d_{name}"]
        assert row["outside"] == []
    (kext,) = [row for row in characters if row["driver"] == ARTICLE]
    assert kext["major"] == planted["kext_major"]


@pytest.mark.parametrize("machine", MACHINES)
def test_slots_of_a_machine_that_ran(machine):
    kernel, core = (real(f"machine/{name}") for name in MACHINES[machine])
    said = oracle(machine)
    characters = of_kind(rows("-N", kernel, "-M", core), "character")
    assert len(characters) == len(said["cdevsw"]) > 40
    compared = 0
    for row, entry in zip(characters, said["cdevsw"], strict=True):
        if isinstance(entry, list):
            order = ("open", "close", "read", "write", "ioctl", "stop", "reset")
            entry = {f"d_{name}": symbol for name, symbol in zip(order, entry, strict=False)}
        for name in ("open", "close", "read", "write", "ioctl", "stop", "reset", "select", "mmap"):
            if f"d_{name}" in entry:
                assert row[name]["name"] == entry[f"d_{name}"]
                compared += 1
    assert compared > 250


def test_a_pointer_out_of_all_text_is_marked(tmp_path):
    dump = "i386-10.5.8"
    planted = truth(dump)["cdevsw"]
    with open(plain_core(dump), "rb") as file:
        core = bytearray(file.read())
    old = planted["entries"][3]["d_read"]  # _mmread
    at = core.find(old.to_bytes(4, "little"))
    slot = planted["address"] + 3 * 0x38 + 8
    while at >= 0:
        core[at : at + 4] = (slot).to_bytes(4, "little")
        at = core.find(old.to_bytes(4, "little"), at + 1)
    damaged = tmp_path / "core"
    damaged.write_bytes(core)
    found = rows("-N", real(f"dumps/{dump}/mach_kernel"), "-M", str(damaged))
    marked = [row for row in found if row["outside"]]
    assert [(row["kind"], row["major"], row["outside"]) for row in marked] == [
        ("character", 3, ["read"])
    ]


def test_a_slid_kernel_without_its_file_has_its_own_text(tmp_path):
    """The header in memory is slid: what lies in the kernel is no one else's for that."""
    kernel, core = (sample.write(str(tmp_path), "machine")[i] for i in (1, 0))
    assert rows("-M", core) == rows("-N", kernel, "-M", core)
    assert not any(row["outside"] for row in rows("-M", core))
    kernel, core = real("machine/x86_64-xnu-2422.115.4.mach_kernel"), real("machine/kaslr.raw")
    assert not any(row["outside"] for row in rows("-M", core))
    assert rows("-M", core) == rows("-N", kernel, "-M", core)


@pytest.mark.parametrize("kernel", ["arm64-xnu-4903.221.2", "arm64e-xnu-6153.11.26"])
def test_the_switches_of_a_file_that_does_not_say_how_long_they_are(kernel):
    """bsd/dev/arm/conf.c: 24 block devices, 43 character devices; _mmread reads major 3."""
    found = rows("-N", real(f"kernels/{kernel}-release.macho"))
    assert [len(of_kind(found, kind)) for kind in ("block", "character")] == [24, 43]
    assert of_kind(found, "character")[3]["read"]["name"] == "_mmread"
    assert not any(row["outside"] for row in found)
