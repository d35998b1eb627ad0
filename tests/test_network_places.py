"""Interfaces and routes of kernels whose structures no types know: found out, or said not to be."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.types import layouts
from kvmtool.types.flatten import Member, Struct
from kvmtool.types.model import TypeTable
from tests.builders import network, xnu
from tests.builders.eras import ERAS, banner_of
from tests.builders.specs import ProcSpec
from tests.inputs import real

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
HIDDEN = ("ifnet", "ifaddr", "if_data_internal", "rtentry")
COUNTERS = ("ipackets", "ierrors", "ibytes", "opackets", "oerrors", "obytes", "collisions")
NOTE = "no types know struct {}: where it keeps what was found out from those in memory\n"
NAMED = [  # if_xname is there
    name
    for name in ERAS
    if layouts.table(name).has("ifnet", "if_xname") and name.endswith("x86_64")
]
PROCESSES = (ProcSpec(1, "launchd", ppid=0), ProcSpec(71, "bash", 1))


@pytest.fixture
def hidden(monkeypatch):
    """No types know the structures."""
    find = TypeTable.find_struct
    monkeypatch.setattr(
        TypeTable,
        "find_struct",
        lambda table, name: None if name in HIDDEN else find(table, name),
    )


def ask(where, *args, status=0):
    found = CliRunner().invoke(cli, ["net", *args, *where, "--format", "json"])
    assert found.exit_code == status, found.output
    return (json.loads(found.stdout) if found.stdout else None), found.stderr


def without(rows, *names):
    return [{**row, **dict.fromkeys(names)} for row in rows]


@pytest.mark.parametrize("core", ["crash.kdp-core", "live.elfcore"])
def test_a_machine_that_ran(core, request):
    where = ("-N", real(KERNEL), "-M", real(f"machine/{core}"))
    interfaces, _ = ask(where, "--interfaces")
    routes, _ = ask(where, "--routes")
    request.getfixturevalue("hidden")
    found, said = ask(where, "--interfaces")
    assert found == without(interfaces, *COUNTERS)
    assert said.endswith(NOTE.format("ifnet"))
    found, said = ask(where, "--routes")
    assert found == without(routes, "mtu")
    assert said.endswith(NOTE.format("rtentry"))


def written(folder, machine):
    (folder / "kernel").write_bytes(machine.kernel)
    (folder / "core").write_bytes(machine.core)
    return "-N", str(folder / "kernel"), "-M", str(folder / "core")


def built(name, layout):
    return xnu.build(
        layout,
        name.rpartition(" ")[2],
        PROCESSES,
        banner=banner_of(name),
        parts=[lambda ground: network.Network(ground).plant()],
    )


def check(machine, where):
    rows, said = ask(where, "--interfaces")
    assert NOTE.format("ifnet") in said
    assert [int(row["address"], 16) for row in rows] == machine.truth["ifnets"]
    for index, (row, one) in enumerate(zip(rows, network.INTERFACES, strict=True), 1):
        assert (row["name"], row["index"]) == (f"{one.name}{one.unit}", index)
        assert (int(row["flags"], 16), row["mtu"]) == (one.flags, one.mtu)
        assert row["type"] == network.TYPES[one.name]
        assert row["mac"] == (one.mac.hex(":") if one.mac else None)
        assert [found["prefix"] for found in row["addresses"]] == [p for _, p, _ in one.addresses]
        assert {row[name] for name in COUNTERS} == {None}
    rows, said = ask(where, "--routes")
    assert NOTE.format("rtentry") in said
    assert [int(row["address"], 16) for row in rows] == machine.truth["rtentries"]
    names = ["lo0", "en0", "utun3"]
    for row, one in zip(rows, network.ROUTES, strict=True):
        assert row["prefix"] == one.prefix
        assert (int(row["flag_bits"], 16), row["refs"]) == (one.flags, 1)
        assert row["interface"] == names[one.interface - 1]


@pytest.mark.parametrize("name", NAMED)
def test_every_era_that_has_their_names(name, tmp_path, request):
    machine = built(name, layouts.table(name))
    request.getfixturevalue("hidden")
    check(machine, written(tmp_path, machine))


def shifted(struct, places):
    """The structure with so many bytes more before each of the named members, and all behind."""
    members, moved = {}, 0
    for member in sorted(struct.members.values(), key=lambda member: member.offset):
        moved += places.get(member.name, 0)
        members[member.name] = Member(
            member.name, member.offset + moved, member.bit_offset, member.bit_size
        )
    return Struct(struct.name, struct.size + moved, members)


# what bsd/net/if_var.h of xnu-7195 and if_var_private.h have more before if_addrhead: threads
# pending, datamov, drainers, suspend; and a later release that would move more
LATER = (
    {"ifnet": {"if_addrhead": 16}},
    {"ifnet": {"if_addrhead": 24, "if_index": 8, "if_data": 16}, "rtentry": {"rt_gateway": 16}},
)


@pytest.mark.parametrize("places", LATER)
@pytest.mark.parametrize("name", ["11.5 x86_64", "14.6 arm64", "15.5 arm64"])
def test_later_releases(name, places, tmp_path):
    last, base = layouts.table("10.13.6 x86_64"), layouts.table(name)

    def flat(tag):
        if tag in HIDDEN:
            return shifted(last.struct(tag), places.get(tag, {}))
        return base.find_struct(tag)

    machine = built(name, TypeTable(base.source, flat))
    check(machine, written(tmp_path, machine))


@pytest.mark.parametrize("name", ["10.6.8 x86_64", "10.5.8 i386", "10.10.5 x86_64"])
def test_what_does_not_tell_is_not_guessed(name, tmp_path, request):
    """Older interfaces have no if_xname; where none is planted they are as old ones."""
    layout = layouts.table(name)
    machine = built(name, layout)
    where = written(tmp_path, machine)
    named = layout.has("ifnet", "if_xname")
    request.getfixturevalue("hidden")
    if named:
        first = machine.truth["ifnets"][0]
        lie = (0x9000).to_bytes(8, "little")
        with machine.patched(first + 32, lie):
            (tmp_path / "core").write_bytes(machine.dump())
    for option, tag in (("--interfaces", "ifnet"), ("--routes", "rtentry")):
        _, said = ask(where, option, status=1)
        assert f"structure {tag} not found" in said
        assert "--types takes more" in said
