"""One conversation with a gdb stub: connect, ask, get the answer that fits, or fail once, clearly.

A reply that cannot be the answer (a stop that nobody asked for shifts every answer by one) is
dropped until the right one comes or the time is up. After a failure the session is dead and says
so at once to every further question; only `reconnect` opens it again.
"""

from __future__ import annotations

import socket
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, NoReturn, TypeVar

from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.formats import gdb_packets as packets
from kvmtool.formats.gdb_packets import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Answer = TypeVar("Answer")

SCHEME = "gdb://"
DEFAULT_PORT = 1234  # of QEMU's -s
DEFAULT_TIMEOUT = 5.0
_DEFAULT_PACKET = 400  # bytes, for a stub that does not say: gdb's own default
_RESENDS = 3
_RECEIVE = 1 << 16


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of ``gdb://host:port``; the port is 1234 if none is named.

    Raises `KvmError` for what is no such address.
    """
    where = url.removeprefix(SCHEME).rstrip("/")
    host, colon, port = where.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):  # the colons are the address's own
        host, port = where, str(DEFAULT_PORT)
    number = int(port) if port.isascii() and port.isdigit() else 0
    host = host.removeprefix("[").removesuffix("]")
    if not url.startswith(SCHEME) or not host or not 0 < number < 65536:
        raise KvmError(f"{url}: expected gdb://HOST:PORT, port 1 to 65535")
    return host, number


class GdbSession:
    """A connection to the stub at `name`. It stands in the place of a file, but holds no bytes.

    `found_running` says that the target ran until we came; `packet_size` is the longest request or
    reply in bytes, `features` what the stub offers. `farewell` is called before hanging up.
    """

    size = 0

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Connect and shake hands. `timeout` in seconds holds for connecting and for each reply.

        Raises `KvmError` naming the address and what went wrong.
        """
        self.name, self.timeout = url, timeout
        self.lock = RLock()  # of the line: one question at a time
        self._where = parse_url(url)
        self.farewell: Callable[[], None] | None = None
        self._socket: socket.socket | None = None
        self._failure = "is not connected"
        self.reconnect()

    def reconnect(self) -> None:
        """Connect anew after a failure; what the old connection knew is forgotten.

        Raises `KvmError`.
        """
        self._drop("is being reconnected")
        try:
            self._socket = socket.create_connection(self._where, self.timeout)
        except OSError as error:
            text = f"cannot connect: {error.strerror or error} (is the stub there? QEMU: -s)"
            self.fail(text, error)
        # without it Nagle and the peer's delayed acknowledgement allow 23 reads a second
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._acks, self._in_flight, self._last = True, 0, b""
        self.running = self.found_running = False
        self._stops = 0
        self._shake_hands()

    def _shake_hands(self) -> None:
        offered = self.ask(b"qSupported:xmlRegisters=i386;qXfer:features:read+", packets.text)
        self.found_running = self._stops > 0
        features = [item.partition(b"=") for item in offered.split(b";")]
        self.features = {name.decode("latin-1"): value for name, _, value in features}
        size = self.features.get("PacketSize", b"")
        try:
            self.packet_size = min(int(size, 16), packets.PACKET_LIMIT) if size else _DEFAULT_PACKET
        except ValueError:
            self.packet_size = _DEFAULT_PACKET
        if "QStartNoAckMode+" in self.features and self.ask(b"QStartNoAckMode", packets.okay):
            self._acks = False
        if packets.has_exited(self.ask(b"?", packets.stop)):
            self.fail("there is nothing to read: the target has exited")

    @property
    def closed(self) -> bool:
        """Whether the connection is gone, by `close` or by a failure."""
        return self._socket is None

    def ask(self, request: bytes, decode: Callable[[bytes], Answer | None]) -> Answer:
        """The answer to `request`: the first reply that `decode` does not refuse.

        Raises `KvmError` when the peer is gone, is silent, or talks nonsense.
        """
        with self.lock:
            self._settle()
            self._in_flight, self._last = 1, packets.frame(request)
            self._send(self._last)
            answer = self._answer(decode)
            self._in_flight = 0
            return answer

    def ask_all(
        self, requests: Sequence[bytes], decode: Callable[[bytes], Answer | None], window: int
    ) -> Iterator[Answer]:
        """The answers in order, `window` requests under way at a time; the caller holds `lock`.

        Raises `KvmError` as `ask`.
        """
        self._settle()
        for done in range(len(requests)):
            sent = done + self._in_flight
            if self._in_flight <= window // 2 and sent < len(requests):
                frames = [packets.frame(request) for request in requests[sent : done + window]]
                self._in_flight, self._last = self._in_flight + len(frames), frames[-1]
                self._send(b"".join(frames))
            answer = self._answer(decode)
            self._in_flight -= 1
            yield answer

    def _settle(self) -> None:
        """Take the answers nobody waited for: an interrupt (^C) must not shift those to come."""
        while self._in_flight:
            self._answer(packets.late)
            self._in_flight -= 1

    def command(self, request: bytes) -> None:
        """Send `request`, to which no answer comes until the target stops."""
        with self.lock:
            self._settle()
            self._send(packets.frame(request))

    def interrupt(self) -> None:
        """Stop a running target and wait for it. Raises `KvmError`."""
        with self.lock:
            self._send(b"\x03")
            self._answer(packets.stop)

    def _answer(self, decode: Callable[[bytes], Answer | None]) -> Answer:
        deadline = monotonic() + self.timeout
        while True:
            payload = self._packet(deadline)
            answer = decode(payload)
            if answer is not None:
                return answer
            if packets.has_exited(payload):
                self.fail("the target has exited")
            self._stops += packets.stop(payload) is not None

    def _packet(self, deadline: float) -> bytes:
        """The next packet whose checksum is right, acknowledged where that is the custom."""
        resends = 0
        while True:
            event, at = packets.next_event(self._buffer)
            del self._buffer[:at]
            if event is None:
                self._receive(deadline)
            elif event.kind is Kind.PACKET:
                if self._acks:
                    self._send(b"+")
                return event.payload
            elif event.kind in (Kind.NAK, Kind.DAMAGED) and self._acks:
                resends += 1
                if resends > _RESENDS or self._in_flight != 1:
                    self.fail(f"the line is bad: {event.kind.value}")
                self._send(b"-" if event.kind is Kind.DAMAGED else self._last)
            elif event.kind is Kind.DAMAGED:
                self.fail("the line is bad: damaged packet")

    def _send(self, data: bytes) -> None:
        if self._socket is None:
            raise KvmError(f"{self.name}: {self._failure}")
        try:
            self._socket.sendall(data)
        except OSError as error:
            self.fail(f"the connection is lost: {error.strerror or error}", error)

    def _receive(self, deadline: float) -> None:
        if self._socket is None:
            raise KvmError(f"{self.name}: {self._failure}")
        if len(self._buffer) > 2 * packets.PACKET_LIMIT:
            self.fail(f"sends a packet of more than {packets.PACKET_LIMIT:#x} bytes")
        try:
            data = self._socket.recv(_RECEIVE)
        except TimeoutError as error:
            self.fail(f"no answer within {self.timeout:g} s", error)
        except OSError as error:
            self.fail(f"the connection is lost: {error.strerror or error}", error)
        if not data:
            self.fail("the connection is lost: the stub has closed it (is the target gone?)")
        self._buffer += data
        if monotonic() > deadline:
            self.fail(f"no answer within {self.timeout:g} s")

    def fail(self, text: str, cause: BaseException | None = None) -> NoReturn:
        """End the session with an error: raises `KvmError`, as does every further question."""
        self._drop(f"{text}; reconnect to go on")
        raise KvmError(f"{self.name}: {text}") from cause

    def _drop(self, why: str) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._failure = None, why

    def close(self) -> None:
        """Say `farewell` and hang up. Raises `KvmError` when that cannot be said any more."""
        farewell, self.farewell = self.farewell, None
        try:
            if farewell is not None and not self.closed:
                farewell()
        finally:
            self._drop("is closed")

    # the place of a file

    def read_at(self, off: int, size: int) -> bytes:
        """A live target has no file offsets: raises `UnsupportedError`."""
        raise UnsupportedError(f"{self.name}: a live target holds memory, not a file")

    def find(self, needle: bytes, start: int, end: int) -> int:
        """There are no file offsets to find anything at: always -1."""
        return -1
