"""Apple's LZ4 frames, read at any offset.

XNU since 8792 (macOS 13) writes on-disk cores through this (`osfmk/kdp/output_stages/out_lz4.c`);
the frame is described in `libkern/libkern/compression/compression.h`: blocks, each with a header of
its own, then an end mark. A block may refer to the 64 KiB decoded before it, so that the whole
frame is one sequence.
"""

from __future__ import annotations

import struct
import warnings
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, Self

from kvmtool.checkpoints import Checkpoints
from kvmtool.errors import FormatError, KvmWarning, TruncatedError
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.source import Source

    Decoder = Callable[[bytes, int, bytes], bytes]  # block, decoded size, window

MAGICS = (b"bv41", b"bv4-", b"bv4$")
COMPRESSED, STORED, END = MAGICS

WINDOW = 64 << 10  # decoded bytes that a block may refer back to
_MAX_BLOCK = 64 << 20  # decoded; Apple's encoder makes 64 KiB blocks
_MAX_RATIO = 256  # one encoded byte yields at most 255, and the shortest match a few more
_HEADER = struct.Struct("<4sII")  # magic, decoded size, encoded size
_STORED_HEADER = 8  # magic, size


class _Block(NamedTuple):
    pos: int  # offset of the header
    stored: bool
    data: int  # offset of the bytes
    encoded: int
    size: int  # decoded, as claimed

    @property
    def end(self) -> int:
        return self.data + self.encoded


def _header(parent: Source, pos: int) -> _Block | None:
    """The block at `pos`, None for the end mark; its numbers are checked against what is there.

    Raises `TruncatedError` where the block is cut off, `FormatError` for nonsense.
    """
    header = parent.read_at(pos, min(_HEADER.size, max(0, parent.size - pos)))
    magic = header[:4]
    if len(magic) == 4 and magic not in MAGICS:
        raise FormatError(parent.name, pos, f"LZ4 block: expected magic bv4., got {magic.hex()}")
    if magic == END:
        return None
    length = _STORED_HEADER if magic == STORED else _HEADER.size
    if len(header) < length:
        raise TruncatedError(parent.name, pos, length, len(header), "LZ4 block header")
    if magic == STORED:
        size = encoded = int.from_bytes(header[4:8], "little")
    else:
        _, size, encoded = _HEADER.unpack(header)
    if not 0 < size <= min(_MAX_BLOCK, encoded * _MAX_RATIO):
        raise FormatError(
            parent.name, pos, f"LZ4 block: {encoded:#x} bytes cannot decode to {size:#x}"
        )
    left = parent.size - pos - length
    if encoded > left:
        raise TruncatedError(parent.name, pos + length, encoded, left, "LZ4 block")
    return _Block(pos, magic == STORED, pos + length, encoded, size)


class _Unpacker:
    """A `Cursor` over the blocks of a frame. Ends at a block that is damaged: see `faults`.

    A copy keeps the window, not the block: it decodes the block again when it is asked.
    """

    __slots__ = ("data", "decode", "faults", "out", "parent", "pos", "taken", "window")

    def __init__(self, parent: Source, decode: Decoder, faults: list[FormatError]) -> None:
        self.parent = parent
        self.decode = decode
        self.faults = faults
        self.out = 0
        self.pos = 0  # of the present block
        self.window = b""  # what was decoded before it
        self.data: bytes | None = None  # what it decodes to, once that is known
        self.taken = 0  # bytes of that

    def copy(self) -> Self:
        new = type(self)(self.parent, self.decode, self.faults)
        new.out, new.pos, new.window, new.taken = self.out, self.pos, self.window, self.taken
        return new

    def take(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size:
            block = self._block()
            if block is None:
                break
            data, end = block
            piece = data[self.taken : self.taken + size]
            pieces.append(piece)
            size -= len(piece)
            self.out += len(piece)
            self.taken += len(piece)
            if self.taken == len(data):
                self.window = (self.window + data[-WINDOW:])[-WINDOW:]
                self.data, self.pos, self.taken = None, end, 0
        return b"".join(pieces)

    def _block(self) -> tuple[bytes, int] | None:
        """The present block, decoded, and where it ends; None at the end of the frame."""
        try:
            block = _header(self.parent, self.pos)
            if block is None:
                return None
            if self.data is None:
                data = self.parent.read_at(block.data, block.encoded)
                self.data = data if block.stored else self.decode(data, block.size, self.window)
        except FormatError as error:
            self._fail(error)
        except ValueError as error:
            self._fail(FormatError(self.parent.name, self.pos, f"LZ4 block is corrupt ({error})"))
        else:
            return self.data, block.end
        return None

    def _fail(self, error: FormatError) -> None:
        if all(error.offset != known.offset for known in self.faults):
            self.faults.append(error)


class Lz4Source:
    """The decoded bytes of the Apple LZ4 frame that `parent` begins with, as a `Source`.

    `size` is the sum of what the blocks claim; none of it is believed when the bytes are read. A
    frame that is cut off or damaged can be read up to there, after a `KvmWarning` that names the
    file and the offset; reads beyond raise `FormatError`. Without the package `lz4` this works too,
    slowly, and says so. Closes `parent` when closed. Safe to use from several threads.
    """

    def __init__(self, parent: Source) -> None:
        """Raises `FormatError` if `parent` does not begin with an LZ4 frame."""
        _header(parent, 0)
        self.name = parent.name
        self._parent = parent
        self._lock = RLock()
        self._faults: list[FormatError] = []
        self._blocks: Checkpoints[_Unpacker] | None = None
        self._size: int | None = None

    @property
    def size(self) -> int:
        """Decoded bytes there are, found from the headers of the blocks alone."""
        with self._lock:
            if self._size is None:
                self._size = self._walk()
                for fault in self._faults:
                    message = f"{fault}; {self._size:#x} bytes before that are readable"
                    warnings.warn(message, KvmWarning, stacklevel=3)
            return self._size

    @property
    def truncated(self) -> bool:
        """Whether the frame ends before its end mark."""
        return self.size >= 0 and any(isinstance(fault, TruncatedError) for fault in self._faults)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`; also raises `FormatError` (offset of the block) beyond damage."""
        with self._lock:
            there = self.size
            if off < 0 or size < 0 or (off + size > there and (self.truncated or not self._faults)):
                raise TruncatedError(self.name, off, size, max(0, min(size, there - off)))
            if self._blocks is None:
                unpacker = _Unpacker(self._parent, _decoder(self.name), self._faults)
                self._blocks = Checkpoints(unpacker)
            data = self._blocks.read(off, size)
            if len(data) < size:
                first = min(self._faults, key=lambda fault: fault.offset or 0)
                raise first.with_traceback(None)
            return data

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        with self._lock:
            self._blocks = self._size = None
            self._parent.close()

    def _walk(self) -> int:
        """The sum of the decoded sizes; what stops the walk is added to the faults."""
        size = pos = 0
        try:
            while (block := _header(self._parent, pos)) is not None:
                size += block.size
                pos = block.end
        except FormatError as error:
            self._faults.append(error)
        return size


def _decoder(name: str) -> Decoder:
    """The fastest decoder there is for the LZ4 blocks of the file `name`."""
    try:
        from lz4.block import LZ4BlockError, decompress
    except ImportError as error:
        message = f"{name}: LZ4 is read slowly ({error}: pip install 'kvmtool[lz4]')"
        warnings.warn(message, KvmWarning, stacklevel=3)
        return decode_block

    def decode(block: bytes, size: int, window: bytes) -> bytes:
        try:
            data = bytes(decompress(block, uncompressed_size=size, dict=window))
        except LZ4BlockError as error:
            raise ValueError(str(error)) from error
        if len(data) != size:
            raise ValueError(f"expected {size:#x} bytes, got {len(data):#x}")
        return data

    return decode


def decode_block(block: bytes, size: int, window: bytes) -> bytes:
    """The `size` bytes of a raw LZ4 block whose matches may reach back into `window`.

    Plain Python, some MB/s. Raises ValueError for a block that is not exactly that.
    """
    out = bytearray(window)
    limit = len(window) + size
    try:
        at = 0
        while True:
            token = block[at]
            length, at = _length(block, at + 1, token >> 4)
            out += block[at : at + length]
            at += length
            if at >= len(block) or len(out) > limit:
                break
            distance = block[at] | block[at + 1] << 8
            length, at = _length(block, at + 2, token & 15)
            length += 4
            if not 0 < distance <= len(out) or len(out) + length > limit:
                raise ValueError(f"match of {length:#x} bytes at distance {distance:#x}")
            start = len(out) - distance
            match = out[start : start + length]
            if len(match) < length:  # it overlaps itself: a repetition
                match = (match * (length // distance + 1))[:length]
            out += match
    except IndexError:
        raise ValueError("it ends inside a sequence") from None
    if len(out) != limit or at != len(block):
        raise ValueError(f"expected {size:#x} bytes, got {len(out) - len(window):#x}")
    return bytes(out[len(window) :])


def _length(block: bytes, at: int, length: int) -> tuple[int, int]:
    """A length that begins with the four bits `length`, and the offset after it."""
    if length == 15:
        while block[at] == 255:
            length += 255
            at += 1
        length += block[at]
        at += 1
    return length, at
