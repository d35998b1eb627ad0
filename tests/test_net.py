"""Connections, interfaces and routes, against what was planted, what lldb read from the same
memory with the kernel's DWARF, and what the running kernel itself answered."""

from __future__ import annotations

import json
import socket
import struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.xnu.pcb import STATES
from tests.inputs import DUMPS, oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
MACHINE = {"crash": "machine/crash.kdp-core", "live": "machine/live.elfcore"}
VERSIONS = {1: "4", 2: "6", 3: "46"}


def net(*args):
    found = CliRunner().invoke(cli, ["net", *args, "--format", "json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def machine(name):
    return "-N", real(KERNEL), "-M", real(MACHINE[name])


def number(text):
    return None if text is None else int(text, 16)


@pytest.mark.parametrize("dump", DUMPS)
def test_sockets_of_descriptors_are_those_planted(dump):
    """These dumps have no lists of pcbs: every socket is one of a process."""
    rows = net("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    found = {number(row["socket"]): row for row in rows}
    planted = {
        fd["socket"]: (process, fd)
        for process in truth(dump)["processes"]
        for fd in process["fds"]
        if fd["dtype"] == 2
    }
    assert planted.keys() == found.keys()
    assert len(planted) >= 9
    for address, (process, fd) in planted.items():
        row = found[address]
        assert row["lists"] == ["descriptors"]
        assert process["pid"] in row["pids"]
        if fd["family"] == "unix":
            assert (row["proto"], row["local"]) == ("unix", fd["local"])
            continue
        ends = [f"{row[f'{end}_address']}:{row[f'{end}_port']}" for end in ("local", "foreign")]
        assert ends == [fd["local"], fd["remote"]]
        assert row["proto"] == fd["proto"] + "4"
        assert row["state"] == (None if fd["state"] is None else STATES[fd["state"]])


@pytest.mark.parametrize("name", MACHINE)
def test_pcbs_of_a_machine_that_ran(name):
    """In the order of the kernel's lists, as lldb walked them."""
    rows = [row for row in net(*machine(name)) if row["proto"][:3] in ("tcp", "udp")]
    said = oracle(name)["inpcbs"]
    assert len(rows) == len(said) == 6
    for row, pcb in zip(rows, said, strict=True):
        assert row["lists"] == [pcb["info"][1:], "descriptors"]
        assert (row["pcb"], row["socket"]) == (pcb["addr"], pcb["so"])
        assert row["tcpcb"] == pcb.get("tcpcb")
        assert (
            row["proto"]
            == pcb["info"][1:4].replace("tcb", "tcp").replace("udb", "udp")
            + (VERSIONS[pcb["vflag"]])
        )
        assert (row["local_port"], row["foreign_port"]) == (pcb["lport"], pcb["fport"])
        assert row["recv_q"] == pcb["rcv_cc"]
        assert row["pid"] == row["last_pid"] == pcb["so_last_pid"]
        assert (row["command"], row["pids"]) == ("netd", [3])
        assert row["state"] == (STATES[pcb["t_state"]] if "t_state" in pcb else None)


@pytest.mark.parametrize("name", MACHINE)
def test_local_sockets_of_a_machine_that_ran(name):
    rows = net(*machine(name), "--unix")
    said = oracle(name)["unpcbs"]
    assert [row["pcb"] for row in rows] == [pcb["addr"] for pcb in said]
    for row, pcb in zip(rows, said, strict=True):
        assert row["socket"] == pcb["socket"]
        assert row["conn"] == (None if pcb["conn"] == "0x0" else pcb["conn"])
        assert row["vnode"] == (None if pcb["vnode"] == "0x0" else pcb["vnode"])
        assert pcb["head"][1:] in row["lists"]
        assert (row["local"] is None) == (pcb["addrp"] == "0x0")


def records(name):
    """What net.inet.*.pcblist_n answered: kind -> bytes for each pcb (bsd/netinet/in_pcblist.c)."""
    data = bytes.fromhex(oracle("crash")["userland"]["sysctl"][name])
    at, pcbs = 24, []
    while at + 24 < len(data):
        size, kind = struct.unpack_from("<2I", data, at)
        if kind == 0x10:  # XSO_INPCB is the first of each
            pcbs.append({})
        pcbs[-1][kind] = data[at : at + size]
        at += -(-size // 8) * 8
    return pcbs


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_pcbs_as_the_running_kernel_listed_them(proto):
    rows = net(*machine("crash"), f"--{proto}")
    pcbs = records(f"net.inet.{proto}.pcblist_n")
    assert [number(row["pcb"]) for row in rows] == [
        struct.unpack_from("<Q", pcb[0x10], 8)[0] for pcb in pcbs
    ]
    assert len(pcbs) == {"tcp": 4, "udp": 2}[proto]
    for row, pcb in zip(rows, pcbs, strict=True):
        inpcb = pcb[0x10]
        assert (row["foreign_port"], row["local_port"]) == struct.unpack_from(">2H", inpcb, 16)
        assert row["proto"] == proto + VERSIONS[inpcb[44]]
        for end, at in (("foreign", 48), ("local", 64)):
            raw = inpcb[at : at + 16]
            wide = socket.inet_ntop(socket.AF_INET6, raw)
            assert row[f"{end}_address"] in (socket.inet_ntoa(raw[12:]), wide)
            assert (row[f"{end}_address"] == wide) == (inpcb[44] == 3)
        assert number(row["socket"]) == struct.unpack_from("<Q", pcb[1], 8)[0]
        assert row["qlimit"] == struct.unpack_from("<H", pcb[1], 48)[0]
        for name, kind in (("recv_q", 2), ("send_q", 4)):
            assert row[name] == struct.unpack_from("<I", pcb[kind], 8)[0]
        if proto == "tcp":
            assert row["state"] == STATES[struct.unpack_from("<i", pcb[0x20], 36)[0]]


def test_local_sockets_as_the_running_kernel_listed_them():
    """struct xunpcb: addresses are moved by one secret number, paths are plain."""
    rows = [row for row in net(*machine("crash"), "--unix") if row["type"] == "stream"]
    data = bytes.fromhex(oracle("crash")["userland"]["sysctl"]["net.local.stream.pcblist"])
    (size,) = struct.unpack_from("<I", data, 24)
    listed = [data[at : at + size] for at in range(24, len(data) - 24, size)]
    assert len(listed) == len(rows) == 7
    first = struct.unpack_from("<I", listed[0], 4)[0] - number(rows[0]["pcb"])
    for row, entry in zip(rows, listed, strict=True):
        pcb, _, _, so, _, _, conn = struct.unpack_from("<7I", entry, 4)
        for name, moved in (("pcb", pcb), ("socket", so), ("conn", conn)):
            value = number(row[name])
            assert moved == (0 if value is None else value + first & 0xFFFFFFFF)
        ends = (entry[66 : 66 + 104], entry[66 + 256 : 66 + 256 + 104])
        local, foreign = (end.split(b"\0", 1)[0].decode() for end in ends)
        assert row["local"] == (local or None)
        assert not foreign or row["foreign"] == foreign


def test_only_what_is_asked_for():
    where = machine("crash")
    everything = net(*where)
    assert {row["proto"] for row in everything} == {"tcp4", "tcp46", "udp4", "unix", "kctl"}
    assert [row["local"] for row in net(*where, "--listening")] == [
        "*.8081",
        "*.8080",
        "/tmp/netd.sock",
    ]
    parts = [net(*where, f"--{kind}") for kind in ("tcp", "udp", "raw", "unix", "system")]
    assert [row for part in parts for row in part] == everything
    assert net(*where, "--tcp", "--system") == parts[0] + parts[4]
    for options, said in (
        (("--routes", "--interfaces"), "choose one"),
        (("--routes", "--tcp"), "list no sockets"),
        (("--interfaces", "--listening"), "list no sockets"),
    ):
        wrong = CliRunner().invoke(cli, ["net", *where, *options])
        assert wrong.exit_code == 2
        assert said in wrong.stderr


@pytest.mark.parametrize("name", MACHINE)
def test_interfaces_of_a_machine_that_ran(name):
    rows = net(*machine(name), "--interfaces")
    said = oracle(name)["ifnets"]
    assert len(rows) == 3
    for row, ifnet in zip(rows, said, strict=True):
        assert row["address"] == ifnet["addr"]
        assert row["name"] == f"{ifnet['name']}{ifnet['unit']}"
        assert (row["index"], row["mtu"]) == (ifnet["index"], ifnet["mtu"])
        assert number(row["flags"]) == int(ifnet["flags"], 16)


def test_a_kernel_control_by_its_name(tmp_path):
    """netd's control socket, connected by hand to the first control the kernel has registered.

    struct ctl_cb keeps its kctl at 0x20, struct kctl its name at 0x10 and its list at 0xb8.
    """
    import kvmtool

    (row,) = net(*machine("crash"), "--system")
    assert (row["proto"], row["local"], row["lists"]) == ("kctl", None, ["descriptors"])
    block = number(row["pcb"])
    with open(real(MACHINE["crash"]), "rb") as file:
        core = bytearray(file.read())
    with kvmtool.open(real(KERNEL), real(MACHINE["crash"])) as kvm:
        control = int.from_bytes(kvm.read(kvm.address("_ctl_head"), 8), "little")
        name = kvm.read(control + 0x10, 96).split(b"\0")[0].decode()
        assert kvm.read(block + 0x20, 8) == kvm.read(control + 0xB8, 8) == bytes(8)
    for place, pointer in ((block + 0x20, control), (control + 0xB8, block)):
        at = in_core(core, place)
        core[at : at + 8] = pointer.to_bytes(8, "little")
    (tmp_path / "core").write_bytes(core)
    where = ("-N", real(KERNEL), "-M", str(tmp_path / "core"))
    (row,) = net(*where, "--system")
    assert name.startswith("com.apple.")
    assert (row["proto"], row["local"], row["lists"]) == ("kctl", name, ["ctl_head", "descriptors"])
    found = CliRunner().invoke(cli, ["files", *where, "--pid", "3", "-o", "name"])
    assert f"[control {name}]" in found.stdout.splitlines()


def in_core(core, address):
    """Where an address lies in the file of an MH_CORE."""
    (count,) = struct.unpack_from("<I", core, 16)
    at = 32
    for _ in range(count):
        cmd, size = struct.unpack_from("<2I", core, at)
        if cmd == 0x19:  # LC_SEGMENT_64
            start, length, offset = struct.unpack_from("<3Q", core, at + 24)
            if start <= address < start + length:
                return offset + address - start
        at += size
    raise LookupError(f"{address:#x}")


def sockaddrs(data, mask):
    """The sockaddrs of a routing message by their RTAX_ number, each on four bytes."""
    found, at = {}, 0
    for which in range(8):
        if mask >> which & 1:
            size = data[at]
            found[which] = data[at : at + size]
            at += max(4, -(-size // 4) * 4)
    return found


def messages(name):
    """Type and bytes of the messages of net.route.iflist or net.route.dump."""
    data = bytes.fromhex(oracle("crash")["userland"]["mib"][name])
    at = 0
    while at < len(data):
        size, _, kind = struct.unpack_from("<HBB", data, at)
        yield kind, data[at : at + size]
        at += size


def test_interfaces_as_the_running_kernel_listed_them():
    """RTM_IFINFO: if_msghdr is 112 bytes; RTM_NEWADDR: ifa_msghdr is 20."""
    rows = net(*machine("crash"), "--interfaces")
    words = {0x1: "UP", 0x8: "LOOPBACK", 0x10: "POINTOPOINT", 0x40: "RUNNING", 0x8000: "MULTICAST"}
    named, addresses = [], {}
    for kind, data in messages("net.route.iflist"):
        if kind == 0x0E:
            flags, index = struct.unpack_from("<iH", data, 8)
            link = sockaddrs(data[112:], struct.unpack_from("<i", data, 4)[0])[4]
            named.append((index, flags & 0xFFFF, link[8 : 8 + link[5]].decode()))
            row = rows[len(named) - 1]
            assert (row["type"], row["mtu"]) == (data[16], struct.unpack_from("<I", data, 24)[0])
            assert row["options"] == [word for bit, word in words.items() if flags & bit]
        else:
            assert kind == 0x0C
            index = struct.unpack_from("<H", data, 12)[0]
            addresses.setdefault(index, []).append(
                sockaddrs(data[20:], struct.unpack_from("<i", data, 4)[0])
            )
    assert [(r["index"], number(r["flags"]), r["name"]) for r in rows] == named
    assert list(addresses) == [1]
    for one, parts in zip(rows[0]["addresses"], addresses[1], strict=True):
        if one["family"] == "inet":
            assert one["address"] == socket.inet_ntoa(parts[5][4:8])
            assert one["netmask"] == "0x" + parts[2][4:].ljust(4, b"\0").hex()
            assert one["prefix"] == 8
        else:
            assert one["address"] == socket.inet_ntop(socket.AF_INET6, parts[5][8:24])
            assert one["prefix"] == sum(byte.bit_count() for byte in parts[2][8:24]) == 128


def test_routes_as_the_running_kernel_dumped_them():
    """RTM_GET: rt_msghdr is 92 bytes, its metrics begin at 36."""
    rows = net(*machine("crash"), "--routes")
    dumped = list(messages("net.route.dump"))
    assert len(rows) == len(dumped) == 4
    for row, (kind, data) in zip(rows, dumped, strict=True):
        assert kind == 0x04
        (index,) = struct.unpack_from("<H", data, 4)
        flags, mask = struct.unpack_from("<2i", data, 8)
        assert (row["interface"], index) == ("lo0", 1)
        assert number(row["flag_bits"]) == flags
        assert row["mtu"] == struct.unpack_from("<I", data, 40)[0]
        parts = sockaddrs(data[92:], mask)
        for name, part in (("destination", parts[0]), ("gateway", parts[1])):
            if row["family"] == "inet":
                assert row[name] == socket.inet_ntoa(part[4:8])
            else:
                raw = part[8:24]
                if raw[0] == 0xFF:  # the kernel's own form has the interface inside
                    assert row[name].endswith("%lo0")
                    raw = raw[:2] + bytes(2) + raw[4:]
                assert row[name].partition("%")[0] == socket.inet_ntop(socket.AF_INET6, raw)
        length = sum(byte.bit_count() for byte in parts[2][8:]) if 2 in parts else None
        assert row["prefix"] == length
    assert [row["flags"] for row in rows] == ["UH", "UHL", "UmCI", "UmCI"]


def test_tables_of_every_column():
    from kvmtool.cli import net as module

    where = machine("crash")
    for listing, option in (
        (module.LISTING, ()),
        (module.INTERFACES, ("--interfaces",)),
        (module.ROUTES, ("--routes",)),
    ):
        columns = ",".join(column.name for column in listing.columns)
        found = CliRunner().invoke(cli, ["net", *where, *option, "-o", columns])
        assert found.exit_code == 0, found.output
        assert len(found.stdout.splitlines()) == len(net(*where, *option)) + 1
