"""The gdb remote serial protocol as bytes: framing, and what replies mean. Pure functions.

Nothing here knows of sockets; whatever a peer sends, the answer is an event or a decoded reply,
never an exception. Source: gdb manual, "Overview" and "Packets" of the remote protocol.
"""

from __future__ import annotations

import re
from binascii import Error as HexError
from binascii import unhexlify
from enum import Enum
from typing import NamedTuple

PACKET_LIMIT = 1 << 20  # bytes; gdbserver offers 0x4000, debugserver 0x20000
_STARTS = b"$+-%"
_ESCAPED = b"#$}*"
_REPEATS = range(3, 98)  # of a run-length count: the printable characters from space to ~
_STOPS = b"TSWXN"
_ESCAPE = re.compile(b"}(.)", re.DOTALL)


class Kind(Enum):
    """What came over the line."""

    PACKET = "packet"
    ACK = "ack"
    NAK = "nak"
    NOTICE = "notification"
    DAMAGED = "damaged packet"


class Event(NamedTuple):
    """One thing received; `payload` only of a packet, with its runs expanded."""

    kind: Kind
    payload: bytes = b""


def frame(payload: bytes) -> bytes:
    """The packet that carries `payload`, whose special characters are escaped already."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def escape(data: bytes) -> bytes:
    """Binary data as it stands in a payload."""
    if not any(special in data for special in _ESCAPED):
        return data
    return b"".join(b"}%c" % (byte ^ 0x20) if byte in _ESCAPED else b"%c" % byte for byte in data)


def unescape(payload: bytes) -> bytes:
    """The binary data in a payload; a brace at the very end, which escapes nothing, is kept."""
    return _ESCAPE.sub(lambda found: b"%c" % (found[1][0] ^ 0x20), payload)


def expand(payload: bytes) -> bytes | None:
    """`payload` with its run lengths (``X*c``) written out; None if one of them is not valid."""
    star = payload.find(b"*")
    if star < 0:
        return payload
    out = bytearray()
    at = 0
    while star >= 0:
        out += payload[at:star]
        count = payload[star + 1] - 29 if star + 1 < len(payload) else 0
        if not out or count not in _REPEATS:
            return None
        out += out[-1:] * count
        at = star + 2
        star = payload.find(b"*", at)
    return bytes(out + payload[at:])


def next_event(buffer: bytes | bytearray, at: int = 0) -> tuple[Event | None, int]:
    """The first event in `buffer` from `at` on, and where the next one may begin.

    None when more bytes are needed: those before the returned position are of no more use. What
    stands between packets is skipped; a packet inside another begins anew, as in gdb.
    """
    size = len(buffer)
    while at < size and buffer[at] not in _STARTS:
        at += 1
    if at == size:
        return None, at
    start = buffer[at]
    if start == 0x2B:  # +
        return Event(Kind.ACK), at + 1
    if start == 0x2D:  # -
        return Event(Kind.NAK), at + 1
    end = buffer.find(b"#", at)
    if end < 0 or end + 3 > size:
        return None, at
    begin = max(buffer.rfind(b"$", at, end), at) + 1
    payload = bytes(buffer[begin:end])
    if buffer[begin - 1] == 0x25:  # %: nobody acknowledges it, nor asks for it again
        return Event(Kind.NOTICE), end + 3
    if b"%02x" % (sum(payload) & 0xFF) != bytes(buffer[end + 1 : end + 3]).lower():
        return Event(Kind.DAMAGED), end + 3
    expanded = expand(payload)
    if expanded is None:
        return Event(Kind.DAMAGED), end + 3
    return Event(Kind.PACKET, expanded), end + 3


# What replies mean. Each decoder returns None for a packet that cannot be the answer to the
# question, such as a stop that nobody asked for; an empty packet says "I do not know the question".


def stop(reply: bytes) -> bytes | None:
    """The answer to `?`: why the target stands, or that it is gone."""
    return reply if reply[:1] and reply[0] in _STOPS else None


def has_exited(reply: bytes) -> bool:
    """Whether a packet says that the target is gone."""
    return len(reply) >= 3 and reply[:1] in (b"W", b"X") and _hex(reply[1:3]) is not None


def text(reply: bytes) -> bytes | None:
    """Any text that is no stop: answers to qSupported, qqemu.PhyMemMode, qC, qHostInfo."""
    exited_or_stopped = len(reply) >= 3 and stop(reply) and _hex(reply[1:3]) is not None
    return None if exited_or_stopped else reply


def late(reply: bytes) -> bytes | None:
    """Any answer at all, for a question that is of no more interest."""
    return None if text(reply) is None or output(reply) is not None else reply


def okay(reply: bytes) -> bool | None:
    """Whether a request was carried out: OK, or an error, or not understood."""
    if reply == b"OK":
        return True
    return False if not reply or is_error(reply) else None


def is_error(reply: bytes) -> bool:
    """Whether a reply is ``E NN`` or ``E.text``."""
    if reply[:1] != b"E":
        return False
    return reply[1:2] == b"." or (len(reply) == 3 and _hex(reply[1:]) is not None)


def memory(reply: bytes) -> bytes | None:
    """The bytes that `m`, `p` or `g` answers; none where they cannot be read."""
    data = _hex(reply)
    if data is not None:
        return data
    return b"" if is_error(reply) or reply[:1] == b"x" else None  # x: a register not available


def binary(reply: bytes) -> bytes | None:
    """The bytes that `x` answers in gdb's form (``b`` and data); none where they cannot be read."""
    if reply[:1] == b"b":
        return unescape(reply[1:])
    return b"" if not reply or is_error(reply) else None


def part(reply: bytes) -> tuple[bool, bytes] | None:
    """A part of a qXfer object or of a list of threads: (whether more follows, the part)."""
    if reply[:1] in (b"m", b"l"):
        return reply[:1] == b"m", unescape(reply[1:])
    return (False, b"") if not reply or is_error(reply) else None


def output(reply: bytes) -> bytes | None:
    """Console output in an ``O`` packet."""
    return _hex(reply[1:]) if reply[:1] == b"O" and reply != b"OK" else None


def _hex(digits: bytes) -> bytes | None:
    try:
        return unhexlify(digits)
    except HexError:
        return None
