"""The sysctl tree, against an independent reader and what the running kernel itself answered."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.xnu.queues import Report
from kvmtool.xnu.sysctl import oids
from tests.inputs import oracle, real

MACHINES = {
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core"),
    "live": ("x86_64-xnu-2422.115.4.mach_kernel", "live.elfcore"),
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile"),
}
# What counts while the machine runs; it was asked seconds before its memory was written
MOVING = {
    *("kern.num_tasks", "kern.num_threads", "kern.num_vnodes", "vm.page_free_count"),
    *("net.inet.tcp.stats", "net.inet.ip.stats", "net.inet.udp.stats", "kern.ipc.mb_stat"),
    *("vm.vm_page_external_count", "kern.num_files", "kern.openfiles", "vm.memory_pressure"),
}


def opened(machine):
    kernel, core = (real(f"machine/{name}") for name in MACHINES[machine])
    return kvmtool.open(kernel, core)


@pytest.mark.parametrize("machine", MACHINES)
def test_tree_is_the_one_an_independent_reader_saw(machine):
    said = oracle(machine)["sysctl_tree"]
    with opened(machine) as kvm:
        report = Report()
        found = list(oids(kvm.nearest_target(), report))
        names = {oid.handler: str(kvm.code_at(oid.handler)) for oid in found if oid.handler}
    assert not report.partial
    by_address = {oid.address: oid for oid in found}
    assert len(by_address) == len(found) == len(said) > 1000
    for node in said:
        oid = by_address[int(node["addr"], 16)]
        assert oid.name == node["name"]
        assert list(oid.mib) == node["mib"]
        assert (oid.kind, oid.arg1) == (int(node["kind"], 16), int(node["arg1"], 16))
        assert oid.fmt == node["fmt"]
        assert names.get(oid.handler) == node["handler"]


def in_bytes(oid, size):
    if isinstance(oid.value, int):
        return oid.value.to_bytes(size, "little", signed=oid.value < 0)
    if isinstance(oid.value, str):
        return oid.value.encode() + b"\0"
    return oid.value


@pytest.mark.parametrize("machine", ["crash", "live"])
def test_values_are_what_the_running_kernel_answered(machine):
    answered = {
        name: bytes.fromhex(said)
        for name, said in oracle(machine)["userland"]["sysctl"].items()
        if not said.startswith("ERR")
    }
    with opened(machine) as kvm:
        found = {oid.name: oid for oid in oids(kvm.nearest_target())}
    compared = [
        name
        for name, said in answered.items()
        if name in found and found[name].value is not None and name not in MOVING
    ]
    assert len(compared) >= 20
    for name in compared:
        assert in_bytes(found[name], len(answered[name])) == answered[name], name
    assert {"kern.ostype", "kern.version", "kern.maxfiles"} <= set(compared)


def test_every_name_the_running_kernel_listed_is_there():
    said = [line.split(" ") for line in oracle("crash")["userland"]["oids"]]
    with opened("crash") as kvm:
        found = {".".join(map(str, oid.mib)): oid for oid in oids(kvm.nearest_target())}
    whole = [words for words in said if len(words) >= 3]  # of some it said the name alone
    assert len(whole) > 900
    for mib, name, kind, *fmt in whole:
        assert found[mib].name == name
        assert found[mib].kind == int(kind, 16)
        assert (found[mib].fmt or "") == " ".join(fmt)


def test_the_command():
    where = [
        word
        for flag, name in zip(("-N", "-M"), MACHINES["crash"], strict=True)
        for word in (flag, real(f"machine/{name}"))
    ]
    found = CliRunner().invoke(cli, ["sysctl", "kern.ostype", *where])
    assert found.exit_code == 0
    assert found.stdout.splitlines()[1].split() == [
        *("kern.ostype", "Darwin", "string", "_sysctl_handle_string")
    ]
    found = CliRunner().invoke(cli, ["sysctl", "kern.proc", *where, "--format", "json"])
    assert found.exit_code == 0
    (row,) = [row for row in json.loads(found.stdout) if row["name"] == "kern.proc.all"][:1] or [{}]
    assert row.get("value") is None
    missing = CliRunner().invoke(cli, ["sysctl", "kern.ostpye", *where])
    assert missing.exit_code == 1
    assert "kern.ostype" in missing.stderr
