"""Mounts and the paths of vnodes, against what was planted and what a running kernel answered."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.xnu.mount import mounts
from kvmtool.xnu.queues import Report
from kvmtool.xnu.vnode import VnodeReader
from tests.inputs import DUMPS, oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"


@pytest.mark.parametrize("dump", DUMPS)
def test_mounts_are_those_planted(dump):
    args = ["mounts", "-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump)]
    found = CliRunner().invoke(cli, [*args, "--format", "json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert len(rows) == len(truth(dump)["mounts"])
    for row, planted in zip(rows, truth(dump)["mounts"], strict=True):
        assert (row["on"], row["from"], row["type"]) == tuple(
            planted[name] for name in ("on", "from", "type")
        )
        assert int(row["flags"], 16) == planted["flags"]
        assert int(row["address"], 16) == planted["address"]
        for name in ("bsize", "blocks", "bfree", "bavail", "bused", "files", "ffree", "owner"):
            assert row[name] == planted[f"f_{name}"], name


@pytest.mark.parametrize("dump", DUMPS)
def test_paths_of_vnodes_are_those_planted(dump):
    compared = 0
    with kvmtool.open(real(f"dumps/{dump}/mach_kernel"), plain_core(dump)) as kvm:
        reader = VnodeReader(kvm.verified_target())
        for process in truth(dump)["processes"]:
            files = [(fd["vnode"], fd["path"]) for fd in process["fds"] if fd["type"] == "vnode"]
            if process.get("textvp"):
                files.append((process["textvp"], process["path"]))
            for vnode, path in files:
                assert reader.read(vnode).path == path
                compared += 1
    assert compared > 100


def test_mounts_of_a_machine_that_ran():
    said = oracle("crash")
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        report = Report()
        found = list(mounts(kvm.verified_target(), report))
    assert not report.partial
    assert [(m.address, m.on, m.from_, m.type, m.flags, m.blocks, m.bsize) for m in found] == [
        (
            int(m["addr"], 16),
            m["mntonname"],
            m["mntfromname"],
            m["fstypename"],
            int(m["flag"], 16),
            m["f_blocks"],
            m["f_bsize"],
        )
        for m in said["mounts"]
    ]


def test_vnodes_of_a_machine_that_ran():
    said = oracle("crash")["vnodes"]
    names = {vnode["addr"]: vnode["name"] for vnode in said}
    assert len(names) > 20
    with kvmtool.open(real(KERNEL), real("machine/crash.kdp-core")) as kvm:
        reader = VnodeReader(kvm.verified_target())
        for address, name in names.items():
            path = reader.read(int(address, 16)).path
            assert path is None or name is None or path.rpartition("/")[2] == name or path == "/"
