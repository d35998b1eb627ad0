"""The kernel's message buffer, which dmesg(8) prints.

Source: bsd/sys/msgbuf.h, bsd/kern/subr_log.c, xnu-792..11417. The ring is part of the structure in
10.4 and behind a pointer since; 10.6's integers are longs on x86_64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, NotFoundError
from kvmtool.target import unsigned

if TYPE_CHECKING:
    from kvmtool.memory import Piece
    from kvmtool.target import Target

MSG_MAGIC = 0x063061
SIZE_LIMIT = 1 << 26  # bytes; XNU allows 1 MiB (MAX_MSG_BSIZE)
SYMBOLS = ("_msgbufp", "_aslbufp")


class MessageBuffer(NamedTuple):
    """A message buffer at the kernel address `address`: a ring of `size` bytes at `bufc`.

    The next byte is written at `bufx`; `bufr` is up to where syslogd has read. `pieces` are the
    messages, oldest first, with what could not be read; NULs, which were never written, are left
    out.
    """

    address: int
    size: int
    bufx: int
    bufr: int
    bufc: int
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        """Whether every byte could be read."""
        return all(piece.data is not None for piece in self.pieces)

    def text(self) -> str:
        """The messages; a gap says so in brackets. Bytes not UTF-8 become lone surrogates."""
        parts = [
            piece.data.replace(b"\0", b"")
            if piece.data is not None
            else f"[{piece.size:#x} bytes at {piece.address:#x} are {piece.reason}]\n".encode()
            for piece in self.pieces
        ]
        return b"".join(parts).decode("utf-8", "surrogateescape")


def message_buffer(target: Target, unread: bool = False, symbol: str = SYMBOLS[0]) -> MessageBuffer:
    """The message buffer that `symbol` points at; with `unread` only what came after `bufr`.

    Raises `NotFoundError`, `FaultError` for its head, `FormatError` for one that is none.
    """
    found = target.symbols.get(symbol)
    if found is None:
        raise NotFoundError("symbol", symbol, hint=target.symbols.hint)
    address = target.pointer(found.address)
    if not address:
        raise NotFoundError("message buffer", symbol, hint="the pointer is null")
    bufc, size, bufx, bufr = _head(target, address)
    if not 0 < size <= SIZE_LIMIT or bufx > size or bufr > size:
        what = f"size {size:#x}, bufx {bufx:#x}, bufr {bufr:#x}: expected positions in the ring"
        raise FormatError("message buffer", None, f"at {address:#x}: {what}")
    if unread:
        spans = [(bufr, bufx)] if bufr <= bufx else [(bufr, size), (0, bufx)]
    else:
        spans = [(bufx, size), (0, bufx)]
    pieces = [
        piece
        for start, end in spans
        if end > start
        for piece in target.memory.read_pieces(bufc + start, end - start)
    ]
    return MessageBuffer(address, size, bufx, bufr, bufc, tuple(pieces))


def _head(target: Target, address: int) -> tuple[int, int, int, int]:
    """(address of the ring, its size, bufx, bufr)."""
    types = target.types

    def number(member: str) -> int:
        return target.unsigned(address + types.offset("msgbuf", member), widths[member])

    widths = {
        member: unsigned(types, "msgbuf", member)
        for member in ("msg_magic", "msg_size", "msg_bufx", "msg_bufr")
        if types.has("msgbuf", member)
    }
    magic = number("msg_magic")
    if magic != MSG_MAGIC:
        what = f"magic {magic:#x} at {address:#x}, expected {MSG_MAGIC:#x}"
        raise FormatError("message buffer", None, what)
    inside = address + types.offset("msgbuf", "msg_bufc")
    if "msg_size" not in widths:
        size = types.size("msgbuf") - types.offset("msgbuf", "msg_bufc")
        return inside, size, number("msg_bufx"), number("msg_bufr")
    return target.pointer(inside), number("msg_size"), number("msg_bufx"), number("msg_bufr")
