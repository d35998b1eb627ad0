"""The gdb client, against the stub of the builders and, where it is installed, against QEMU."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmtool.errors import FaultError, KvmError, UnsupportedError
from kvmtool.formats import UNSAID, Facts, gdb_target
from kvmtool.formats import gdb_packets as packets
from kvmtool.formats.gdb import Gdb, open_gdb
from kvmtool.formats.gdb_packets import Event, Kind
from kvmtool.formats.gdb_session import parse_url
from kvmtool.memory import Region, read_partial
from tests.builders import gdbserver
from tests.builders.gdbserver import Stub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KERNEL = 0xFFFFFF8000200000
DATA = random.Random(4).randbytes(0x9000)
HOLED = ((KERNEL, DATA[:0x3000]), (KERNEL + 0x5000, DATA[0x5000:]))  # pages 3 and 4 are missing
FORBIDDEN = (b"k", b"c", b"C", b"s", b"S", b"vC", b"vK", b"R", b"G", b"M", b"P", b"X")


# framing


def events(data: bytes) -> list[Event]:
    """All that is in `data`, taken one after the other."""
    found, at = [], 0
    while True:
        event, after = packets.next_event(data, at)
        assert after >= at
        if event is None:
            return found
        assert after > at
        found.append(event)
        at = after


def test_the_checksum_is_that_of_the_manual():
    # gdb manual, "Overview": $packet-data#checksum, the sum of all characters modulo 256
    assert packets.frame(b"g") == b"$g#67"
    assert packets.frame(b"") == b"$#00"


@given(st.binary())
def test_what_is_framed_is_found_again(data):
    payload = packets.escape(data)
    framed = packets.frame(payload)
    assert framed[1:-3] == payload
    assert not {b"$", b"#", b"*"} & {payload[at : at + 1] for at in range(len(payload))}
    assert events(framed) == [Event(Kind.PACKET, payload)]
    assert packets.unescape(payload) == data


@given(st.binary())
def test_the_stub_of_the_tests_escapes_alike(data):
    assert packets.unescape(gdbserver.escaped(data)) == data


@given(st.binary(max_size=400))
@example(b"$#00" * 3)
@example(b"$$#00*#2a")
@example(b"%Stop:T05#00$OK#9a")
def test_garbage_gives_events_and_nothing_else(data):
    for event in events(data):
        assert isinstance(event.kind, Kind)
        for decode in (packets.stop, packets.text, packets.memory, packets.binary):
            decode(event.payload)
        for decode in (packets.okay, packets.part, packets.output, packets.has_exited):
            decode(event.payload)


@given(st.lists(st.sampled_from([b"$", b"#", b"+", b"-", b"%", b"*", b"}", b"a", b"00", b"~"])))
def test_garbage_of_special_characters_too(pieces):
    test_garbage_gives_events_and_nothing_else.hypothesis.inner_test(b"".join(pieces))


@given(st.lists(st.binary(max_size=20), max_size=5), st.data())
def test_how_the_bytes_arrive_makes_no_difference(payloads, data):
    stream = b"+".join(packets.frame(packets.escape(payload)) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    buffer, found = bytearray(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer += stream[start:end]
        while True:
            event, at = packets.next_event(buffer)
            del buffer[:at]
            if event is None:
                break
            found.append(event)
    assert found == events(stream)


@given(st.text("0123456789abcdef", max_size=300))
def test_run_lengths(digits):
    payload = digits.encode()
    assert packets.expand(gdbserver.shortened(payload)) == payload


def test_run_lengths_of_the_manual():
    # gdb manual: "0* " is 0000; a star is a valid count too
    assert packets.expand(b"0* ") == b"0000"
    assert packets.expand(b"0**") == b"0" * 14
    assert packets.expand(b"0*~") == b"0" * 98


@pytest.mark.parametrize("payload", [b"*a", b"0*", b"0*\x1f", b"0*\x7f", b"0* *"])
def test_run_lengths_that_are_none(payload):
    assert packets.expand(payload) is None


def test_a_packet_in_a_packet_begins_anew():
    assert events(b"$half$OK#9a") == [Event(Kind.PACKET, b"OK")]


def test_a_bad_checksum_is_damage():
    assert events(b"$OK#9b+$OK#9a") == [
        Event(Kind.DAMAGED),
        Event(Kind.ACK),
        Event(Kind.PACKET, b"OK"),
    ]


@pytest.mark.parametrize("reply", [b"T05thread:p01.01;", b"S05", b"T02thread:01;"])
def test_a_stop_answers_only_the_question_for_it(reply):
    assert packets.stop(reply) == reply
    decoders: list[Callable[[bytes], object]] = [packets.text, packets.memory, packets.binary]
    for decode in [*decoders, packets.okay, packets.part, packets.output]:
        assert decode(reply) is None


def test_what_memory_answers():
    assert packets.memory(b"0aff") == b"\x0a\xff"
    assert packets.memory(b"E14") == b""
    assert packets.memory(b"E.no such place") == b""
    assert packets.memory(b"E145") == b"\xe1\x45"
    assert packets.memory(b"OK") is None


# addresses


def test_urls():
    assert parse_url("gdb://mac.example:8864") == ("mac.example", 8864)
    assert parse_url("gdb://mac") == ("mac", 1234)
    assert parse_url("gdb://[::1]:99") == ("::1", 99)
    assert parse_url("gdb://[::1]") == ("::1", 1234)


@pytest.mark.parametrize("url", ["gdb://", "gdb://h:0", "gdb://h:99999", "gdb://h:x", "kdp://h:1"])
def test_urls_that_are_none(url):
    with pytest.raises(KvmError, match="expected gdb://HOST:PORT"):
        parse_url(url)


# target descriptions


def test_registers_in_comments_are_not_numbered():
    # QEMU's own file has p0x1d or so for cr3 only if its comments are skipped
    description = gdb_target.describe(
        {"target.xml": gdbserver.X86_64_XML, "core.xml": gdbserver.CORE_XML}.__getitem__
    )
    assert description.architecture == "i386:x86-64"
    assert description.registers["rip"].number == 16
    assert description.registers["fs_base"].number == 24
    assert description.registers["cr3"].number == 29
    assert "cs_base" not in description.registers


def test_arm64_system_registers_have_numbers_of_their_own():
    xml = (
        "<target><architecture>aarch64</architecture><feature><reg name='x0' bitsize='64'/>"
        '<reg name="TTBR1_EL1" bitsize="64" regnum="210"/><reg name="TCR_EL1" bitsize="64"/>'
        "</feature></target>"
    )
    registers = gdb_target.describe({"target.xml": xml}.__getitem__).registers
    assert registers["TTBR1_EL1"].number == 210
    assert registers["TCR_EL1"].number == 211


def test_a_description_that_includes_itself_ends():
    loop = '<xi:include href="target.xml"/>' * 10 + '<reg name="a" bitsize="64"/>'
    assert list(gdb_target.describe(lambda _: loop).registers) == ["a"]


@pytest.mark.parametrize("text", ["<!--", "<reg ", "a" * 9, '<reg name="', "<reg a=", "&lol;"])
def test_hostile_descriptions_cost_no_time(text):
    began = time.process_time()
    gdb_target.describe(lambda _: text * (gdb_target.DOCUMENT_LIMIT // 64 // len(text)))
    assert time.process_time() - began < 2


# QEMU 7.2, qemu-system-x86_64 -m 64: the view of the bus masters first, then the processor's
MTREE = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): pc.ram
  00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000
  0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
"""


def test_ram_of_qemu():
    assert gdb_target.ram(MTREE) == (
        Region(0, 0xE8000),
        Region(0x100000, 0x3F00000),
        Region(0xFFFC0000, 0x40000),
    )
    assert gdb_target.ram("unknown command") is None
    overlapping = MTREE.replace("00000000000c3000-", "00000000000c2000-")
    assert gdb_target.ram(overlapping) is None


# a session


@pytest.fixture(
    params=[
        {},
        {"unasked": True},
        {"acks": True, "no_ack_offered": True},
        {"binary": True},
        {"packet_size": None},
        {"packet_size": 0x20000},
        {"packet_size": 0x3FFF, "run_lengths": True},
        {"short": 100},
        {"physical": ()},
        {"noise": b"+%Stop:T05#a8" + gdbserver.packet(b"T05thread:01;")},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def holed(request) -> Iterator[tuple[Stub, Gdb]]:
    """A stub of each habit, with two pages missing, and a client of it."""
    with Stub(memory=HOLED, registers=gdbserver.registers(efer=0xD01), **request.param) as stub:
        gdb = open_gdb(stub.url, timeout=5)
        yield stub, gdb
        gdb.close()


def test_reads_give_the_bytes(holed):
    _, gdb = holed
    memory = gdb.virtual()
    assert memory.space == "kernel"
    for start, size in ((0, 4), (0xFF9, 14), (1, 0x2FFE), (0, 0x3000), (0x5000, 0x4000), (7, 0)):
        assert memory.read(KERNEL + start, size) == DATA[start : start + size]


def test_the_first_bad_address_is_named(holed):
    _, gdb = holed
    memory = gdb.virtual()
    for start, size in ((0x2FFF, 2), (0, 0x9000), (0x2000, 0x1004), (0x1001, 0x2FFF)):
        with pytest.raises(FaultError) as fault:
            memory.read(KERNEL + start, size)
        assert fault.value.address == KERNEL + 0x3000
        assert (fault.value.space, fault.value.size) == ("kernel", size)
        assert fault.value.reason == "unmapped"
    with pytest.raises(FaultError) as fault:
        memory.read(KERNEL + 0x3004, 4)
    assert fault.value.address == KERNEL + 0x3004
    with pytest.raises(FaultError) as fault:
        memory.check(KERNEL + 0x2000, 0x2000)
    assert fault.value.address == KERNEL + 0x3000


def test_pieces_hold_all_that_can_be_read(holed):
    _, gdb = holed
    memory = gdb.virtual()
    parts: list[tuple[int, bytes | None]] = []
    for address, size, data, reason in memory.read_pieces(KERNEL - 0x1800, 0xC000):
        assert reason == ("unmapped" if data is None else "")
        if data is not None and parts and parts[-1][1] is not None:
            parts[-1] = (parts[-1][0] + size, parts[-1][1] + data)
        else:
            parts.append((address + size - KERNEL, data))
    assert parts == [
        (0, None),
        (0x3000, DATA[:0x3000]),
        (0x5000, None),
        (0x9000, DATA[0x5000:]),
        (0xA800, None),
    ]
    assert read_partial(memory, KERNEL + 0x2FF0, 0x40) == DATA[0x2FF0:0x3000]
    assert (len(memory), list(memory.regions()), memory.extent) == (0, [], None)


def test_what_must_never_be_sent_is_never_sent(holed):
    stub, gdb = holed
    gdb.virtual().read(KERNEL, 0x3000)
    list(gdb.virtual().read_pieces(KERNEL, 0x9000))
    gdb.close()
    wrong = [r for r in stub.requests if r.startswith(FORBIDDEN) and not r.startswith(b"QStart")]
    assert wrong == []


def test_facts(holed):
    _, gdb = holed
    assert (gdb.name, gdb.live, gdb.facts.cputype) == ("gdb", True, 0x01000007)
    assert list(gdb.runs()) == []
    assert gdb.facts.control[0]["efer"] == 0xD01
    with pytest.raises(UnsupportedError):
        gdb.source.read_at(0, 1)


@given(st.integers(0, 0x8FFF), st.integers(0, 0x4000))
def test_a_live_memory_reads_as_the_bytes_do(start, size):
    memory = _shared_client().virtual()
    expected = DATA[start : start + size]
    hole = next((at for at in range(0x3000, 0x5000) if start <= at < start + size), None)
    if hole is None and start + size > len(DATA):
        hole = len(DATA)
    if size == 0 or hole is None:
        assert memory.read(KERNEL + start, size) == expected
        return
    with pytest.raises(FaultError) as fault:
        memory.read(KERNEL + start, size)
    assert fault.value.address == KERNEL + hole


_CLIENT: list[Gdb] = []


def _shared_client() -> Gdb:
    if not _CLIENT:
        _CLIENT.append(open_gdb(Stub(memory=HOLED, packet_size=0x4000).url))
    return _CLIENT[0]


@pytest.fixture(scope="module", autouse=True)
def hang_up() -> Iterator[None]:
    """The shared client is closed at the end."""
    yield
    for gdb in _CLIENT:
        gdb.close()


# registers and processors


def test_registers_become_a_thread_state():
    values = gdbserver.registers(
        rip=KERNEL + 0x1234, rax=5, efer=0x500, eflags=0x246, cr3=0x1000, cs=8
    )
    with Stub(registers=values) as stub, open_gdb(stub.url) as gdb:
        assert gdb.facts.control[0]["cr3"] == 0x1000
        [(flavor, state)] = gdb.facts.threads[0].states
        assert (flavor, len(state)) == (4, 168)  # x86_THREAD_STATE64
        assert state[:8] == (5).to_bytes(8, "little")
        assert state[16 * 8 : 17 * 8] == (KERNEL + 0x1234).to_bytes(8, "little")


def test_registers_without_the_p_packet():
    values = gdbserver.registers(rip=7, cr3=0x42000)
    with Stub(registers=values, p_packet=False) as stub, open_gdb(stub.url) as gdb:
        assert gdb.registers()["rip"] == 7
        assert gdb.facts.control[0]["cr3"] == 0x42000


def test_a_processor_not_in_long_mode_is_the_32_bit_one():
    values = gdbserver.registers(efer=0, rip=0x1_0000_1234)
    with Stub(registers=values) as stub, open_gdb(stub.url) as gdb:
        assert gdb.facts.cputype == 7
        assert "efer" in gdb.facts.said["cputype"]
        assert gdb.facts.threads[0].states[0][0] == 1  # x86_THREAD_STATE32


def test_a_stub_that_does_not_say_its_processor():
    with Stub(xml=None) as stub, open_gdb(stub.url) as gdb:
        assert gdb.facts == Facts(UNSAID, 0, control=({},))


def test_lldb_stubs_say_it_elsewhere():
    info = "cputype:16777228;cpusubtype:2;ostype:macosx;"
    with Stub(xml=None, host_info=info) as stub, open_gdb(stub.url) as gdb:
        assert (gdb.facts.cputype, gdb.facts.cpusubtype) == (0x0100000C, 2)


# physical memory


def test_the_two_spaces_share_one_line():
    with Stub(memory=HOLED, physical=((0x1000, b"physical"),)) as stub, open_gdb(stub.url) as gdb:
        virtual, physical = gdb.virtual(), gdb.physical()
        assert physical is not None
        assert physical.space == "physical"
        for _ in range(2):
            assert physical.read(0x1000, 8) == b"physical"
            assert virtual.read(KERNEL, 8) == DATA[:8]
            assert virtual.read(KERNEL + 8, 8) == DATA[8:16]
        modes = [r for r in stub.requests if r.startswith(b"Qqemu")]
        assert modes == [b"Qqemu.PhyMemMode:%d" % n for n in (1, 0, 1, 0)]
        assert physical.read(0x1000, 1) == b"p"
    assert not stub.physical_mode  # the next client finds the stub as we did


def test_only_ram_is_asked_for():
    ram = DATA * 2
    physical = ((0, ram),)
    mtree = MTREE.replace("00000000000c2fff", f"{len(ram) - 1:016x}").replace("c3000-", "c8000-")
    with Stub(physical=physical, monitor=mtree) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.physical()
        assert memory is not None
        assert memory.extent == tuple(memory.regions())
        assert next(memory.regions()) == Region(0, len(ram))
        stub.requests.clear()
        with pytest.raises(FaultError) as fault:
            memory.read(0xFEC00000, 4)
        assert (fault.value.reason, stub.requests) == ("absent", [])
        with pytest.raises(FaultError) as fault:
            memory.read(len(ram) - 4, 8)
        assert fault.value.address == len(ram)
        pieces = list(memory.read_pieces(len(ram) - 0x10, 0x20))
        assert [(p.address, p.size, p.reason) for p in pieces] == [
            (len(ram) - 0x10, 0x10, ""),
            (len(ram), 0x10, "absent"),
        ]


def test_a_needle_is_found_across_pieces():
    memory_size = 0x30000
    ram = bytearray(memory_size)
    for place in (0x3, 0xFFFC, 0x10004, 0x2FFF8):
        ram[place : place + 8] = b"Catfish "
    mtree = (
        'FlatView #0\n AS "memory", root: system\n'
        f"  0000000000000000-{memory_size - 1:016x} (prio 0, ram): pc.ram\n"
    )
    with Stub(physical=((0, bytes(ram)),), monitor=mtree) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.physical()
        assert memory is not None
        assert list(memory.find(b"Catfish ")) == [0x3, 0xFFFC, 0x10004, 0x2FFF8]
        assert list(memory.find(b"Catfish ", 4)) == [0xFFFC, 0x10004, 0x2FFF8]


def test_no_physical_mode_is_said():
    with Stub(memory=HOLED) as stub, open_gdb(stub.url) as gdb:
        assert gdb.physical() is None


def test_a_stub_that_does_not_list_its_ram_is_warned_of():
    with Stub(physical=()) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.physical()
        assert memory is not None
        assert memory.extent is None
        assert "zeros" in gdb.warnings[0]


# what goes wrong


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(KvmError, match=f"gdb://127.0.0.1:{port}: cannot connect"):
        open_gdb(f"gdb://127.0.0.1:{port}")


def test_a_peer_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(KvmError, match=r"no answer within 0\.2 s"):
            open_gdb(f"gdb://127.0.0.1:{server.getsockname()[1]}", timeout=0.2)
        assert time.monotonic() - began < 2


def test_a_killed_target_is_one_error_and_no_wait():
    with Stub(memory=HOLED) as stub:
        gdb = open_gdb(stub.url)
        memory = gdb.virtual()
        assert memory.read(KERNEL, 4) == DATA[:4]
        stub.kill()
        began = time.monotonic()
        with pytest.raises(KvmError, match="the connection is lost") as first:
            memory.read(KERNEL, 4)
        assert not isinstance(first.value, FaultError)
        with pytest.raises(KvmError, match=r"the connection is lost.*reconnect"):
            memory.read(KERNEL, 0x2000)
        with pytest.raises(KvmError, match="reconnect"):
            list(memory.read_pieces(KERNEL, 0x2000))
        gdb.close()
        assert time.monotonic() - began < 1


def test_a_silent_target_is_waited_for_once():
    with Stub(memory=HOLED, xml=None, hang_after=8) as stub:
        gdb = open_gdb(stub.url, timeout=0.3)
        memory = gdb.virtual()
        with pytest.raises(KvmError, match=r"no answer within 0\.3 s"):
            for _ in range(9):
                memory.read(KERNEL, 4)
        began = time.monotonic()
        with pytest.raises(KvmError, match="no answer"):
            memory.read(KERNEL, 4)
        gdb.close()
        assert time.monotonic() - began < 0.2


@pytest.mark.parametrize("answers", [0, 1, 5])
def test_an_interrupted_read_does_not_shift_the_next(answers):
    with Stub(memory=HOLED, physical=()) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.virtual()
        memory.read(KERNEL, 4)  # the stub's mode is set
        replies = gdb.source.ask_all(
            [b"m%x,10" % (KERNEL + at) for at in range(0, 0x100, 16)], packets.memory, 8
        )
        for at in range(answers + 1):
            assert next(replies) == DATA[16 * at : 16 * at + 16]
        replies.close()  # as ^C does
        assert memory.read(KERNEL + 0x1000, 16) == DATA[0x1000:0x1010]
        assert memory.read(KERNEL + 0x800, 0x2000) == DATA[0x800:0x2800]


def test_reconnecting_is_explicit_and_works():
    with Stub(memory=HOLED) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.virtual()
        stub.hang_up()
        for _ in range(2):
            with pytest.raises(KvmError, match="lost"):
                memory.read(KERNEL, 4)
        gdb.reconnect()
        assert memory.read(KERNEL, 4) == DATA[:4]


def test_a_target_that_exits():
    exited = pytest.raises(KvmError, match="the target has exited")
    with Stub(memory=HOLED, noise=b"$W00#b7") as stub, exited:
        open_gdb(stub.url)


@pytest.mark.parametrize("request_number", range(1, 7))
def test_damaged_packets_are_asked_for_again(request_number):
    with Stub(memory=HOLED, damage=(request_number,)) as stub, open_gdb(stub.url) as gdb:
        assert gdb.virtual().read(KERNEL, 0x100) == DATA[:0x100]


def test_an_endless_stream_of_stops_ends():
    stops = gdbserver.packet(b"T05thread:01;") * 999
    with peer(lambda line: [line.sendall(stops) for _ in iter(int, 1)]) as url:
        began = time.monotonic()
        with pytest.raises(KvmError, match="no answer within"):
            open_gdb(url, timeout=0.3)
        assert time.monotonic() - began < 3


@contextmanager
def peer(talk: Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of something that takes one connection and does there what `talk` does."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"gdb://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()


@given(st.binary(max_size=200))
@example(b"$PacketSize=zz#00")
@example(b"+" + gdbserver.packet(b"PacketSize=ffffffffffffffffff") + gdbserver.packet(b"T05") * 9)
def test_a_peer_that_talks_nonsense_is_a_kvm_error(garbage):
    def talk(line: socket.socket) -> None:
        line.sendall(garbage)
        line.shutdown(socket.SHUT_WR)
        while line.recv(4096):
            pass

    with peer(talk) as url, pytest.raises(KvmError):
        open_gdb(url, timeout=2)


def test_more_bytes_than_asked_for_is_out_of_step():
    noise = gdbserver.packet(b"00" * 64)
    out_of_step = pytest.raises(KvmError, match="out of step")
    with Stub(memory=((KERNEL, DATA),), noise=noise) as stub, out_of_step:
        open_gdb(stub.url).virtual().read(KERNEL, 4)


# coming and going


@pytest.mark.parametrize(
    ("unasked", "detach", "expected"),
    [
        (True, None, True),
        (False, None, False),
        (True, False, False),
        (False, True, True),
    ],
)
def test_the_target_is_left_as_it_was_found(unasked, detach, expected):
    with Stub(memory=HOLED, unasked=unasked) as stub:
        with open_gdb(stub.url, detach=detach) as gdb:
            assert gdb.source.found_running == unasked
        assert stub.detached == expected
        assert (stub.requests[-1] == b"D") == expected


def test_small_reads_are_fast_enough():
    with Stub(memory=((KERNEL, DATA),), physical=()) as stub, open_gdb(stub.url) as gdb:
        memory = gdb.virtual()
        began = time.perf_counter()
        for at in range(2000):
            memory.read(KERNEL + at, 8)
        rate = 2000 / (time.perf_counter() - began)
    assert rate > 1000, f"{rate:.0f} reads a second"  # both ends share one interpreter here


# QEMU itself


class Machine(NamedTuple):
    """A QEMU that runs its BIOS."""

    process: subprocess.Popen[bytes]
    url: str
    qmp: str

    def ask(self, command: str, **arguments) -> object:
        """What QEMU's own monitor answers."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            deadline = time.monotonic() + 10
            while line.connect_ex(self.qmp) and time.monotonic() < deadline:
                time.sleep(0.02)
            replies = line.makefile("rw")
            replies.readline()
            for name, content in (("qmp_capabilities", {}), (command, arguments)):
                replies.write(json.dumps({"execute": name, "arguments": content}) + "\n")
                replies.flush()
                while True:
                    reply = json.loads(replies.readline())
                    assert "error" not in reply, reply
                    if "return" in reply:
                        break
            return reply["return"]

    def running(self) -> bool:
        """Whether the machine runs."""
        status = self.ask("query-status")
        assert isinstance(status, dict)
        return status["running"]


@pytest.fixture(params=[False, True], ids=["runs", "stands"])
def machine(request, tmp_path) -> Iterator[Machine]:
    """QEMU, running or halted at reset."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 (apt-get install qemu-system-x86)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    qmp = str(tmp_path / "qmp")
    arguments = [qemu, "-display", "none", "-nodefaults", "-accel", "tcg", "-m", "16", "-smp", "2"]
    arguments += ["-gdb", f"tcp:127.0.0.1:{port}", "-qmp", f"unix:{qmp},server=on,wait=off"]
    process = subprocess.Popen(
        arguments + ["-S"] * request.param, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    found = Machine(process, f"gdb://127.0.0.1:{port}", qmp)
    try:
        deadline = time.monotonic() + 10
        while found.running() == request.param and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0 if request.param else 0.3)  # the BIOS leaves something to read
        yield found
    finally:
        process.kill()
        process.wait()


def test_qemu(machine, tmp_path):
    ran = machine.running()
    with open_gdb(machine.url) as gdb:
        assert not machine.running()
        assert gdb.source.found_running == ran
        assert len(gdb.facts.threads) == len(gdb.facts.control) == 2
        assert gdb.facts.cputype == 7  # real mode: not in long mode
        memory = gdb.physical()
        assert memory is not None
        assert list(memory.regions())[-1] == Region(0xFFFC0000, 0x40000)
        saved = str(tmp_path / "ram")
        machine.ask("pmemsave", val=0x80000, size=0x100000, filename=saved)
        with open(saved, "rb") as dump:
            expected = dump.read()
        began = time.perf_counter()
        assert memory.read(0x80000, 0x20000) == expected[:0x20000]
        assert time.perf_counter() - began < 2
        assert memory.read(0xF1234, 0x8000) == expected[0x71234:0x79234]
        assert memory.read(0xFFFFFFF0, 5) == expected[0x7FFF0:0x7FFF5]  # the reset vector's jump
        with pytest.raises(FaultError) as fault:
            memory.read(0xFFFFF0, 0x20)
        assert (fault.value.address, fault.value.reason) == (0x1000000, "absent")
        began = time.perf_counter()
        for _ in range(2000):
            memory.read(0xF1234, 64)
        rate = 2000 / (time.perf_counter() - began)
        assert rate > 2000, f"{rate:.0f} reads a second"
    assert machine.running() == ran


class Translations:
    forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1


def test_qemu_goes_on_when_told(machine):
    kept = Translations()
    with open_gdb(machine.url) as gdb:
        gdb.physical().watch(kept)
        assert gdb.halted
        gdb.resume()
        assert (gdb.halted, kept.forgotten) == (False, 1)
        assert machine.running()
        with pytest.raises(KvmError, match="the target is running"):
            gdb.virtual().read(0x1000, 4)
        gdb.interrupt()
        assert not machine.running()
        assert len(gdb.virtual().read(0x1000, 4)) == 4
        gdb.resume()
    assert machine.running()


def test_qemu_killed_under_a_session(machine):
    gdb = open_gdb(machine.url)
    memory = gdb.virtual()
    assert len(memory.read(0x1000, 4)) == 4
    machine.process.kill()
    machine.process.wait()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(KvmError, match="the connection is lost"):
            memory.read(0x1000, 4)
    gdb.close()
    assert time.monotonic() - began < 1
