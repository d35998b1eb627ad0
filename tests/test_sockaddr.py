"""Socket addresses: how they are read and written, against the standard library and RFCs."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct

import pytest

from kvmtool.xnu.sockaddr import (
    AF_INET,
    AF_INET6,
    Endpoint,
    ipv4,
    ipv6,
    link_address,
    netmask,
    prefix_length,
    sockaddr_text,
    unix_path,
)

EN0 = struct.pack("<BBHBBBB", 20, 18, 4, 6, 3, 6, 0) + b"en0" + bytes.fromhex("001b639d4f01")


def test_addresses_as_the_standard_library_writes_them():
    generator = random.Random(1)
    for _ in range(200):
        data = bytes(generator.choice((0, 0, 255, generator.randrange(256))) for _ in range(16))
        if (data[0] == 0xFE and data[1] & 0xC0 == 0x80) or data[0] == 0xFF:
            continue
        assert ipaddress.ip_address(ipv6(data)) == ipaddress.ip_address(data)
        assert ipv4(data[:4]) == str(ipaddress.ip_address(data[:4]))
    assert ipv6(bytes(10) + b"\xff\xff" + bytes((10, 0, 2, 15))) == "::ffff:10.0.2.15"


@pytest.mark.parametrize(
    ("head", "scoped"),
    [
        ("fe80", True),
        ("febf", True),
        ("fec0", False),
        ("ff01", True),
        ("ff02", True),
        ("ff12", True),
        ("ff05", False),
        ("fd00", False),
        ("2001", False),
    ],
)
def test_which_addresses_have_their_interface_inside(head, scoped):
    """RFC 4291: link-local unicast is fe80::/10, multicast has its scope in the second byte."""
    data = bytes.fromhex(head) + b"\x00\x05" + bytes(11) + b"\x01"
    text = f"{head}::1" if scoped else f"{head}:5::1"
    assert ipv6(data) == text + ("%5" if scoped else "")
    assert ipv6(data, name_of=lambda index: f"en{index}") == text + ("%en5" if scoped else "")


def test_a_scope_beside_the_address():
    data = socket.inet_pton(socket.AF_INET6, "fe80::1")
    assert ipv6(data) == "fe80::1"
    assert ipv6(data, 4) == "fe80::1%4"
    assert ipv6(socket.inet_pton(socket.AF_INET6, "2001:db8::1"), 4) == "2001:db8::1"


@pytest.mark.parametrize(
    ("end", "dotted", "colon"),
    [
        (Endpoint("127.0.0.1", 631), "127.0.0.1.631", "127.0.0.1:631"),
        (Endpoint("0.0.0.0", 68), "*.68", "*:68"),
        (Endpoint("::", 0), "*.*", "*:*"),
        (Endpoint("fe80::1%en0", 80), "fe80::1%en0.80", "[fe80::1%en0]:80"),
    ],
)
def test_ends_as_netstat_and_lsof_write_them(end, dotted, colon):
    assert (end.dotted, end.colon) == (dotted, colon)


def test_link_addresses():
    link = link_address(EN0)
    assert (link.number, link.type, link.name, str(link)) == (4, 6, "en0", "00:1b:63:9d:4f:01")
    assert link_address(struct.pack(">BBHBBBB", 8, 18, 4, 6, 0, 0, 0), ">").number == 4
    assert sockaddr_text(EN0) == "00:1b:63:9d:4f:01"
    assert sockaddr_text(EN0[:5] + b"\0\0\0" + bytes(12)) == "link#4"


@pytest.mark.parametrize("data", [EN0[:7], EN0[:12], EN0[:6] + b"\xff" + EN0[7:], b"", b"\x14"])
def test_link_addresses_that_lie(data):
    assert link_address(data) is None
    assert sockaddr_text(data) is None


@pytest.mark.parametrize(
    "data", [b"\x10\x02\0\0\x7f\0\0", b"\x1c\x1e" + bytes(21), b"\x10\x63" + bytes(14), b"\x02"]
)
def test_addresses_cut_short_or_of_no_known_family(data):
    assert sockaddr_text(data) is None


def test_a_sockaddr_in6_names_its_scope():
    data = struct.pack("<BBHI", 28, AF_INET6, 0, 0) + socket.inet_pton(socket.AF_INET6, "fe80::7")
    assert sockaddr_text(data + struct.pack("<I", 2)) == "fe80::7%2"
    assert sockaddr_text(data + struct.pack(">I", 2), byteorder=">") == "fe80::7%2"
    assert sockaddr_text(data) == "fe80::7"


def test_masks_without_their_trailing_zeros():
    for length in range(33):
        whole = socket.inet_aton(str(ipaddress.ip_network(f"0.0.0.0/{length}").netmask))
        cut = bytes((16, AF_INET, 0, 0)) + whole.rstrip(b"\0")
        assert netmask(cut, AF_INET) == whole
        assert prefix_length(whole) == length
    assert netmask(b"\x0c" + b"\xff" * 11, AF_INET6) == b"\xff" * 4 + bytes(12)
    assert netmask(b"", AF_INET) == bytes(4)
    assert prefix_length(b"\xff\x00\xff\x00") is None


def test_paths():
    assert unix_path(b"\x0e\x01/var/run/x\0\0") == "/var/run/x"
    assert unix_path(b"\x10\x01/tmp/netd.sock") == "/tmp/netd.sock"
    assert unix_path(b"\x02\x01") == unix_path(b"") == ""
