"""Connections, interfaces and routes of generated machines: every era, odd sockets, damage."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.types import layouts
from tests.builders import network, xnu
from tests.builders.descriptors import Descriptors
from tests.builders.eras import ERAS, banner_of, whole
from tests.builders.filesystem import FileSystem
from tests.builders.specs import ProcSpec

WITH_IFNET = [name for name in ERAS if layouts.table(name).has("ifnet")]
PROCESSES = (ProcSpec(1, "launchd", ppid=0), ProcSpec(71, "bash", 1))


def built(name, *parts):
    layout, arch = layouts.table(name), name.rpartition(" ")[2]
    return xnu.build(layout, arch, PROCESSES, banner=banner_of(name), parts=parts)


def written(folder, machine, core=None):
    (folder / "kernel").write_bytes(machine.kernel)
    (folder / "core").write_bytes(machine.core if core is None else core)
    return "-N", str(folder / "kernel"), "-M", str(folder / "core")


def ask(where, *args, status=0):
    found = CliRunner().invoke(cli, [*args, *where, "--format", "json"])
    assert found.exit_code == status, found.output
    return (json.loads(found.stdout) if found.stdout else None), found.stderr


def number(text):
    return int(text, 16) if isinstance(text, str) else text


def dotted(end):
    host, port = end
    host = "*" if host in ("0.0.0.0", "::", "") else host
    return f"{host}.{port or '*'}"


@pytest.mark.parametrize("name", ERAS)
def test_connections_of_every_era(name, tmp_path):
    machine, layout = whole(name), layouts.table(name)
    rows, said = ask(written(tmp_path, machine), "net")
    known = layout.has("inpcb")
    assert said.count("\n") == (0 if known else 1)
    assert ("structure inpcb not found" in said) == (not known)
    truth = machine.truth["sockets"]
    found = {number(row["socket"]): row for row in rows}
    assert found.keys() == {true["socket"] for true in truth.values()}
    protocols = {6: "tcp", 17: "udp", 1: "icmp"}
    lists = {6: "tcbinfo", 17: "udbinfo", 1: "ripcbinfo"}
    for true in truth.values():
        row = found[true["socket"]]
        assert (row["pid"], row["pids"], row["command"]) == (71, [71], "bash")
        assert row["last_pid"] == (71 if layout.has("socket", "last_pid") else None)
        assert number(row["pcb"]) == (true["pcb"] if "unix" in true or known else 8)
        if "unix" in true:
            unix = true["unix"]
            peer = truth[unix.peer] if unix.peer else None
            assert (row["proto"], row["type"], row["local"]) == ("unix", "stream", unix.path)
            assert number(row["conn"]) == (peer and peer["pcb"])
            path = peer and peer["unix"].path
            assert row["foreign"] == (path or (f"{peer['pcb']:#x}" if peer else None))
            assert row["state"] == ("LISTEN" if unix.listening else "CONNECTED")
            continue
        net = true["net"]
        assert (row["recv_q"], row["send_q"]) == net.queued
        if not known:
            assert row["proto"] == protocols[net.protocol]
            assert row["local"] is row["state"] is None
            continue
        assert row["proto"] == protocols[net.protocol] + ("6" if net.family == 30 else "4")
        assert (row["local"], row["foreign"]) == (dotted(net.local), dotted(net.foreign))
        assert row["state"] == net.state
        assert row["lists"] == [lists[net.protocol], "descriptors"]


def prefix_mask(prefix):
    return f"{(1 << prefix) - 1 << 32 - prefix:#010x}"


@pytest.mark.parametrize("name", WITH_IFNET)
def test_interfaces_of_every_era(name, tmp_path):
    machine = built(name, lambda ground: network.Network(ground).plant())
    rows, said = ask(written(tmp_path, machine), "net", "--interfaces")
    assert said == ""
    assert [number(row["address"]) for row in rows] == machine.truth["ifnets"]
    for index, (row, one) in enumerate(zip(rows, network.INTERFACES, strict=True), 1):
        assert (row["name"], row["index"]) == (f"{one.name}{one.unit}", index)
        assert (number(row["flags"]), row["mtu"]) == (one.flags, one.mtu)
        assert row["mac"] == (one.mac.hex(":") if one.mac else None)
        assert (row["ipackets"], row["obytes"]) == (index * 1000, index << 33)
        assert len(row["addresses"]) == len(one.addresses)
        for found, (address, prefix, other) in zip(row["addresses"], one.addresses, strict=True):
            wide = ":" in address
            local = f"%{row['name']}" if address.startswith("fe80") else ""
            assert found["family"] == ("inet6" if wide else "inet")
            assert found["address"] == address + local
            assert found["netmask"] == (None if wide else prefix_mask(prefix))
            assert (found["prefix"], found["broadcast"]) == (prefix, other)
    assert rows[1]["options"] == ["UP", "BROADCAST", "SMART", "RUNNING", "SIMPLEX", "MULTICAST"]


@pytest.mark.parametrize("name", WITH_IFNET)
def test_routes_of_every_era(name, tmp_path):
    machine = built(name, lambda ground: network.Network(ground).plant())
    rows, said = ask(written(tmp_path, machine), "net", "--routes")
    assert said == ""
    assert [number(row["address"]) for row in rows] == machine.truth["rtentries"]
    letters = ["UGS", "UG", "UC", "UH", "UI", "UH"]
    names = ["lo0", "en0", "utun3"]
    for row, one, flags in zip(rows, network.ROUTES, letters, strict=True):
        local = "%en0" if one.destination == "fe80::" else ""
        assert (row["destination"], row["prefix"]) == (one.destination + local, one.prefix)
        link = isinstance(one.gateway, int)
        assert row["gateway"] == (f"link#{one.gateway}" if link else one.gateway)
        assert (row["flags"], number(row["flag_bits"])) == (flags, one.flags)
        assert (row["interface"], row["refs"], row["mtu"]) == (names[one.interface - 1], 1, 1280)


def test_a_tree_that_comes_back_is_left(tmp_path):
    machine = built("10.9.5 x86_64", lambda ground: network.Network(ground).plant())
    leaf = machine.truth["rtentries"][2]
    with machine.patched(leaf + 40, machine.memory.pointer(machine.truth["rtentries"][1])):
        core = machine.dump()
    rows, said = ask(written(tmp_path, machine, core), "net", "--routes", status=3)
    assert "rt_tables[2]: stopped after" in said
    assert "comes back to" in said
    assert {row["family"] for row in rows} == {"inet", "inet6"}


@pytest.mark.parametrize("name", sorted(set(ERAS) - set(WITH_IFNET)))
def test_types_that_do_not_know_interfaces_are_named(name, tmp_path):
    where = written(tmp_path, built(name))
    for option, struct in (("--interfaces", "ifnet"), ("--routes", "rtentry")):
        _, said = ask(where, "net", option, status=1)
        assert said.startswith(f"kvmtool: structure {struct} not found")
        whose = f"types are the built-in ones of {name}"
        assert said.endswith(f"; {whose}: --types takes more (a dSYM, CTF, ISF)\n")


ODD = {
    "both": ("udp46", "*.5000", "*.5000"),
    "mapped": ("udp6", "::ffff:10.0.2.15.5001", "*.5001"),
    "both, used by IPv4": ("udp46", "10.0.2.15.5002", "10.0.2.2.5002"),
    "link-local": ("udp6", "fe80::17%{0}.5003", "fe80::1%{0}.5003"),
    "without socket": ("udp4", "1.2.3.4.5005", "*.5005"),
    "dead": ("udp4", "4.3.2.1.5006", "*.5006"),
}


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "12.0.1 x86_64", "15.5 arm64"])
def test_sockets_that_are_not_like_others(name, tmp_path):
    """Each pcb on the list is shown; ipi_count, which says two more, is noted."""
    known = name in WITH_IFNET
    parts = [network.plant_odd]
    if known:
        parts.append(lambda ground: network.Network(ground).plant())
    machine = built(name, *parts)
    rows, said = ask(written(tmp_path, machine), "net")
    assert said == "kvmtool: udbinfo: 6 pcbs are on its list, ipi_count is 8\n"
    found = {number(row["pcb"]): row for row in rows}
    places = machine.truth["pcbs"]
    assert found.keys() == {places[key] for key in ODD}
    for key, (proto, local, foreign) in ODD.items():
        row = found[places[key]]
        scope = "en0" if known else "2"
        assert (row["proto"], row["local"], row["foreign"]) == (
            proto,
            local.format(scope),
            foreign.format(scope),
        )
        assert row["dead"] == (key == "dead")
        assert (row["socket"] is None) == (key == "without socket")
        assert row["lists"] == ["udbinfo"]


def hidden(ground):
    """A process with a descriptor of a socket whose pcb is on no list."""
    truth = network.plant_odd(ground)

    class Only:
        of = truth["sockets"]

    files = FileSystem(ground)
    files.plant()
    table = Descriptors(ground, files, Only)
    from tests.builders import descriptors

    wanted = {5: descriptors.Fd("hidden", descriptors.SOCKET)}
    table._fill(table._table(71), wanted)
    return truth


@pytest.mark.parametrize("name", ["10.6.8 i386", "10.13.6 x86_64", "14.6 arm64"])
def test_a_socket_on_no_list_is_found_and_noted(name, tmp_path):
    machine = built(name, hidden)
    rows, said = ask(written(tmp_path, machine), "net")
    assert "udbinfo: 1 of the sockets that processes have are not on its list\n" in said
    (row,) = [row for row in rows if row["lists"] == ["descriptors"]]
    assert number(row["pcb"]) == machine.truth["pcbs"]["hidden"]
    assert (row["local"], row["foreign"]) == ("10.0.2.15.5004", "10.9.8.7.5004")
    assert (row["pid"], row["command"]) == (71, "bash")


def test_a_socket_whose_page_is_missing_is_told_by_its_pcb(tmp_path):
    """The pcb stands alone on a page, the socket behind it does not."""
    machine = whole("10.9.5 x86_64")
    true = machine.truth["sockets"]["ssh"]
    page = machine.memory.page
    assert true["socket"] // page != true["pcb"] // page
    rows, said = ask(
        written(tmp_path, machine, machine.dump(without=[true["socket"]])), "net", status=3
    )
    (row,) = [row for row in rows if number(row["pcb"]) == true["pcb"]]
    assert (row["proto"], row["local"]) == ("tcp4", "10.0.2.15.50022")
    assert "unreadable" in row["recv_q"]
    assert "fields that could not be read" in said


@pytest.mark.parametrize("name", ["10.4.11 i386", "10.8.5 x86_64", "10.13.6 x86_64", "15.5 arm64"])
def test_pages_missing_at_random(name, tmp_path):
    """1 % of the pages, at least one, 50 times: every command ends, and says what is missing."""
    machine = whole(name)
    page = machine.memory.page
    kernel_page = machine.address("__mh_execute_header") & -page
    pages = [
        at
        for start, content in machine.runs()
        for at in range(start, start + len(content), page)
        if at != kernel_page
    ]
    whole_answer = {
        command: ask(written(tmp_path, machine), command, "--layout", name)[0]
        for command in ("files", "net")
    }
    cut = 0
    for seed in range(50):
        gone = random.Random(seed).sample(pages, max(1, len(pages) // 100))
        where = (*written(tmp_path, machine, machine.dump(without=gone)), "--layout", name)
        for command, everything in whole_answer.items():
            found = CliRunner().invoke(cli, [command, *where, "--format", "json"])
            assert found.exit_code in (0, 3), found.output
            assert isinstance(found.exception, (SystemExit, type(None))), found.exception
            rows = json.loads(found.stdout)
            whole_rows = [row for row in rows if "unreadable" not in json.dumps(row)]
            if found.exit_code == 0:
                assert len(rows) == len(everything)
                assert all(row in everything for row in whole_rows)
            else:
                assert found.stderr
                cut += 1
    assert cut > 0


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.13.6 x86_64"])
def test_interfaces_and_routes_with_each_page_missing(name, tmp_path):
    """What is on other pages is as before, what is on this one is marked."""
    machine = built(name, lambda ground: network.Network(ground).plant())
    page = machine.memory.page
    where = written(tmp_path, machine)
    whole_answers = {
        option: ask(where, "net", option)[0] for option in ("--interfaces", "--routes")
    }
    first = min(machine.truth["ifnets"]) & -page
    last = max(machine.truth["rtentries"]) & -page
    tables = machine.address("_rt_tables") & -page
    marked = 0
    for gone in (*range(first, last + page, page), tables):
        where = (*written(tmp_path, machine, machine.dump(without=[gone])), "--layout", name)
        for option, everything in whole_answers.items():
            found = CliRunner().invoke(cli, ["net", option, *where, "--format", "json"])
            assert found.exit_code in (0, 3), found.output
            table = CliRunner().invoke(cli, ["net", option, *where])
            assert table.exit_code == found.exit_code
            rows = json.loads(found.stdout)
            if found.exit_code == 0:
                assert [row["address"] for row in rows] == [r["address"] for r in everything]
            else:
                assert found.stderr
            known = {row["address"]: row for row in everything}
            for row in rows:
                for field, value in row.items():
                    if "unreadable" in json.dumps(value):
                        marked += 1
                    elif field != "addresses" and row["address"] in known:
                        assert named(value, known[row["address"]][field])
    assert marked > 10


def named(value, whole_value):
    """The same, but for the interface of an address, which stands as a number without a name."""
    if isinstance(value, str) and isinstance(whole_value, str):
        return value.partition("%")[0] == whole_value.partition("%")[0]
    return value in (whole_value, None)
