"""A gdb stub over bytes, in a thread: what QEMU 7.2 does, and what others do, one switch each.

Written from the gdb manual, not from the client: it frames and checks for itself.
"""

from __future__ import annotations

import re
import socket
import threading
from typing import NamedTuple

X86_64_XML = """<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target>
<architecture>i386:x86-64</architecture><xi:include href="core.xml"/></target>"""

_LONG = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip"
_SHORT = "eflags cs ss ds es fs gs"
_CONTROL = "fs_base gs_base k_gs_base cr0 cr2 cr3 cr4 cr8 efer"

# As QEMU's i386-64bit.xml: registers that stand in a comment are not there.
CORE_XML = (
    '<?xml version="1.0"?><!-- <reg name="no" bitsize="64"/> --><feature name="core">'
    '<reg name="rax" bitsize="64" type="int64" regnum="0"/>'
    + "".join(f'<reg name="{name}" bitsize="64" type="int64"/>' for name in _LONG.split()[1:])
    + "".join(f'<reg name="{name}" bitsize="32" type="int32"/>' for name in _SHORT.split())
    + '<!--reg name="cs_base" bitsize="64" type="int64"/>\n'
    '<reg name="ds_base" bitsize="64" type="int64"/-->'
    + "".join(f'<reg name="{name}" bitsize="64"/>' for name in _CONTROL.split())
    + "</feature>"
)


class Options(NamedTuple):
    """How the stub behaves. `memory` and `physical` are (address, bytes) pairs.

    `unasked`: a stop packet at connecting, as from a machine that ran. `hang_after`, `close_after`:
    requests answered before it falls silent or hangs up. `short`: most bytes an `m` answers with,
    whatever was asked. `grain`: a read that touches a hole fails; 0 lets it answer the part before.
    """

    memory: tuple[tuple[int, bytes], ...] = ()
    physical: tuple[tuple[int, bytes], ...] | None = None
    packet_size: int | None = 0x1000
    acks: bool = True
    no_ack_offered: bool = False
    binary: bool = False
    unasked: bool = False
    xml: dict[str, str] | None = {"target.xml": X86_64_XML, "core.xml": CORE_XML}  # noqa: RUF012
    registers: bytes = b""
    p_packet: bool = True
    monitor: str = ""
    short: int = 0
    run_lengths: bool = False
    noise: bytes = b""
    damage: tuple[int, ...] = ()
    hang_after: int | None = None
    close_after: int | None = None
    host_info: str = ""


class Stub:
    """A listening stub; a context manager. `requests` is all it was asked, in order."""

    def __init__(self, **options) -> None:
        self.options = Options(**options)
        self.requests: list[bytes] = []
        self.physical_mode = False
        self.detached = False
        self.reading = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"gdb://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def kill(self) -> None:
        """End as a killed process does: every socket is closed."""
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection but go on listening."""
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    self._converse(connection)
                except OSError:
                    continue

    def _converse(self, connection: socket.socket) -> None:
        acks = self.options.acks
        if self.options.unasked:
            connection.sendall(packet(b"T02thread:01;"))
        buffer = b""
        last = b""
        while True:
            data = connection.recv(65536)
            if not data:
                return
            buffer += data
            while buffer:
                if buffer[:1] == b"-":
                    connection.sendall(last)
                if buffer[:1] != b"$":
                    buffer = buffer[1:]
                    continue
                end = buffer.find(b"#")
                if end < 0 or len(buffer) < end + 3:
                    break
                payload, digits = buffer[1:end], buffer[end + 1 : end + 3]
                assert int(digits, 16) == sum(payload) % 256, payload
                buffer = buffer[end + 3 :]
                self.requests.append(payload)
                count = len(self.requests)
                if self.options.close_after is not None and count > self.options.close_after:
                    return
                if self.options.hang_after is not None and count > self.options.hang_after:
                    continue
                replies = [
                    packet(reply, self.options.run_lengths) for reply in self._reply(payload)
                ]
                last = replies[-1] if replies else b""
                if count in self.options.damage and last:
                    replies[-1] = last[:-1] + (b"0" if last[-1:] != b"0" else b"1")
                connection.sendall((b"+" if acks else b"") + self.options.noise + b"".join(replies))
                if payload == b"QStartNoAckMode":
                    acks = False

    def _reply(self, request: bytes) -> list[bytes]:
        text = request.decode("latin-1")
        if text.startswith("qSupported"):
            return [self._supported()]
        if text == "?":
            return [b"T05thread:01;"]
        if text == "QStartNoAckMode":
            return [b"OK" if self.options.no_ack_offered else b""]
        if text.startswith("qXfer:features:read:"):
            return [self._document(text)]
        if text == "qqemu.PhyMemMode":
            return [b"" if self.options.physical is None else b"%d" % self.physical_mode]
        if text.startswith("Qqemu.PhyMemMode:"):
            if self.options.physical is None:
                return [b""]
            self.physical_mode = text.endswith("1")
            return [b"OK"]
        if text == "qHostInfo":
            return [self.options.host_info.encode()]
        if text == "qfThreadInfo":
            return [b"m01"]
        if text == "qsThreadInfo":
            return [b"l"]
        if text.startswith("qRcmd,") and self.options.monitor:
            lines = self.options.monitor.splitlines(keepends=True)
            return [*(b"O" + line.encode().hex().encode() for line in lines), b"OK"]
        if text in ("Hg01", "D"):
            self.detached |= text == "D"
            return [b"OK"]
        return self._data(text)

    def _data(self, text: str) -> list[bytes]:
        found = re.fullmatch(r"([mx])([0-9a-f]+),([0-9a-f]+)", text)
        if found and (found[1] == "m" or self.options.binary):
            self.reading += 1
            data = self._read(int(found[2], 16), int(found[3], 16))
            if data is None:
                return [b"E14"]
            return [data.hex().encode() if found[1] == "m" else b"b" + escaped(data)]
        if text == "g":
            return [self.options.registers.hex().encode()]
        if text.startswith("p") and self.options.p_packet:
            return [self._register(int(text[1:], 16))]
        return [b""]

    def _supported(self) -> bytes:
        size = self.options.packet_size
        offered = [] if size is None else [f"PacketSize={size:x}"]
        offered += ["qXfer:features:read+"] if self.options.xml else []
        offered += ["QStartNoAckMode+"] if self.options.no_ack_offered else []
        offered += ["binary-upload+"] if self.options.binary else []
        return ";".join(offered).encode()

    def _document(self, text: str) -> bytes:
        name, _, place = text.removeprefix("qXfer:features:read:").rpartition(":")
        offset, size = (int(number, 16) for number in place.split(","))
        if self.options.xml is None or name not in self.options.xml:
            return b"E00"
        content = self.options.xml[name].encode()
        part = content[offset : offset + size]
        return (b"m" if offset + size < len(content) else b"l") + escaped(part)

    def _register(self, number: int) -> bytes:
        sizes = [8] * 17 + [4] * 7 + [8] * 9
        start = sum(sizes[:number])
        data = self.options.registers[start : start + sizes[number]]
        return data.hex().encode() if number < len(sizes) and data else b"E00"

    def _read(self, address: int, size: int) -> bytes | None:
        pieces = self.options.physical if self.physical_mode else self.options.memory
        if self.physical_mode and self.options.physical is not None:
            out = bytearray(size)  # as QEMU: what is not there reads as zeros
            for start, data in pieces or ():
                low, high = max(start, address), min(start + len(data), address + size)
                if low < high:
                    out[low - address : high - address] = data[low - start : high - start]
            return bytes(out)
        limit = min(size, self.options.short) if self.options.short else size
        for start, data in pieces or ():
            if start <= address and address + limit <= start + len(data):
                return data[address - start : address - start + limit]
        return None


def packet(payload: bytes, run_lengths: bool = False) -> bytes:
    """A packet as it goes over the line."""
    if run_lengths:
        payload = shortened(payload)
    return b"$" + payload + b"#" + f"{sum(payload) % 256:02x}".encode()


def shortened(payload: bytes) -> bytes:
    """Runs of 4 to 98 equal characters as ``X*c``; counts that would be # or $ are avoided."""

    def short(found: re.Match[bytes]) -> bytes:
        extra = len(found[0]) - 1
        while chr(extra + 29) in "#$":
            extra -= 1
        return found[0][:1] + b"*" + bytes([extra + 29]) + found[0][: len(found[0]) - 1 - extra]

    return re.sub(rb"([^}*])\1{3,97}", short, payload)


def escaped(data: bytes) -> bytes:
    """Binary data in a payload."""
    out = bytearray()
    for byte in data:
        out += bytes([0x7D, byte ^ 0x20]) if byte in b"#$}*" else bytes([byte])
    return bytes(out)


def registers(**values: int) -> bytes:
    """The `g` answer for CORE_XML; registers not named are zero."""
    out = b"".join(values.pop(name, 0).to_bytes(8, "little") for name in _LONG.split())
    out += b"".join(values.pop(name, 0).to_bytes(4, "little") for name in _SHORT.split())
    out += b"".join(values.pop(name, 0).to_bytes(8, "little") for name in _CONTROL.split())
    assert not values, f"no such registers: {values}"
    return out
