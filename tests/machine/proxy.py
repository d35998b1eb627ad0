"""Between lldb and QEMU's gdb stub: what lldb needs to know before it writes a Mach-O core.

QEMU's stub has no qHostInfo and no qMemoryRegionInfo, and lldb's `k` would end the machine.
Everything else passes through unchanged, acknowledgements included.
"""

from __future__ import annotations

import re
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_CPUTYPE = {"i386": 7, "x86_64": 0x1000007}
_TOKEN = re.compile(rb"[-+\x03]|\$([^#]*)#..", re.DOTALL)
_SPACE = 1 << 64


class Proxy:
    """Listens on `port` for one client; a context manager."""

    def __init__(self, arch: str, stub: int, regions: list[tuple[int, int]]) -> None:
        """`stub` is the port of QEMU's stub, `regions` what is mapped, ascending."""
        self._arch, self._stub, self._regions = arch, stub, regions
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client, socket.create_connection(("127.0.0.1", self._stub)) as stub:
            for wire in (client, stub):
                wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(stub, client), daemon=True)
            back.start()
            self._forward(client, stub)
            stub.shutdown(socket.SHUT_RDWR)
            back.join(5)

    def _forward(self, client: socket.socket, stub: socket.socket) -> None:
        """lldb's side; ends when lldb hangs up."""
        waiting, ours = b"", 0  # answers of our own that lldb has yet to acknowledge
        while data := client.recv(65536):
            waiting += data
            while token := _TOKEN.match(waiting):
                waiting = waiting[token.end() :]
                answer = self._answer(token[1]) if token[1] is not None else None
                if answer is not None:
                    client.sendall(b"+" + _packet(answer))
                    ours += 1
                elif token[0] == b"+" and ours:
                    ours -= 1
                else:
                    stub.sendall(token[0])

    def _answer(self, packet: bytes) -> bytes | None:
        """Our own answer to a packet; None for what QEMU answers itself."""
        if packet == b"k":
            return b"X09"
        if packet in (b"qHostInfo", b"qProcessInfo"):
            triple = f"{self._arch}-apple-macosx".encode().hex()
            size = 8 if self._arch == "x86_64" else 4
            text = f"triple:{triple};ptrsize:{size};endian:little;cputype:{_CPUTYPE[self._arch]};"
            return f"pid:1;{text}".encode() if packet == b"qProcessInfo" else text.encode()
        if packet == b"qMemoryRegionInfo:":
            return b""
        if packet.startswith(b"qMemoryRegionInfo:"):
            return self._region(int(packet.partition(b":")[2], 16))
        return None

    def _region(self, address: int) -> bytes:
        """The mapped region around `address`, or the gap; the last one ends at 2**64 - 1.

        lldb goes on with start + size: where that wraps to 0, or is answered at 2**64 - 1, it
        never ends.
        """
        if address == _SPACE - 1:
            return b"E01"
        start = 0
        for low, high in self._regions:
            if address < low:
                return f"start:{start:x};size:{low - start:x};".encode()
            if address < high:
                return f"start:{low:x};size:{high - low:x};permissions:rwx;".encode()
            start = high
        return f"start:{start:x};size:{_SPACE - 1 - start:x};".encode()


def _packet(payload: bytes) -> bytes:
    return b"$%s#%02x" % (payload, sum(payload) & 0xFF)


def _pump(source: socket.socket, target: socket.socket) -> None:
    """The stub's side, byte for byte."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        return  # the other side has hung up
