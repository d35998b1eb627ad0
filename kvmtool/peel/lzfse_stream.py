"""LZFSE streams, and the LZVN that `comp` images hold.

A stream is a row of blocks, each with a header that gives its sizes, and an end mark: `bvx-`
stored, `bvx1` and `bvx2` LZFSE, `bvxn` LZVN, `bvx$`. Source: src/lzfse_internal.h of the reference
implementation, github.com/lzfse/lzfse.

The package `lzfse` (extra `kvmtool[kernelcache]`) wraps that implementation. It doubles its output
until everything fits, so it is given one block at a time, behind a stored block with the bytes that
the block may refer back to: what a lying block can make of itself is then bounded by its kind.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.peel.layer import LIMIT, Layer, Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.source import Source

STORED, LZFSE_1, LZFSE_2, LZVN, END = b"bvx-", b"bvx1", b"bvx2", b"bvxn", b"bvx$"
LZVN_RATIO = 136  # decoded bytes to a packed one: a match of 271 bytes takes two

_STORED_HEADER = Struct("<4sI")  # magic, n_raw_bytes
_LZVN_HEADER = Struct("<4s2I")  # magic, n_raw_bytes, n_payload_bytes
_HEADER_1 = Struct("<4s6I")  # ..., n_payload_bytes, n_literals, n_matches, two payload sizes
_HEADER_1_SIZE = 772  # with states and tables
_HEADER_2 = Struct("<4sI3Q")  # magic, n_raw_bytes, packed fields
_LAYOUTS = {STORED: _STORED_HEADER, LZVN: _LZVN_HEADER, LZFSE_1: _HEADER_1, LZFSE_2: _HEADER_2}
_SIZE_BITS = 0xFFFFF  # of a payload size in the packed fields

_LITERALS, _MATCH = 0xE0, 0xF0  # LZVN opcodes, with a length in the next byte or in four bits
_NOTHING = (0x0E, 0x16)

_MAX_BLOCK = 40_000 + 10_000 * 2_359  # decoded: that many literals and matches of that length
_MAX_LZVN = 128 << 20  # decoded; the package holds it twice, and its encoder stops at 4 KiB
_MAX_BLOCKS = 1 << 14  # the encoder puts 40 KB into each at least, but for the last
_WINDOW = 1 << 18  # decoded bytes that a block may refer back to


class Block(NamedTuple):
    """`size` packed bytes (with a header) at offset `off` that decode to `raw` bytes."""

    off: int
    size: int
    raw: int
    name: str


def probe(head: bytes) -> bool:
    """Whether `head` (a file's first bytes) begins like an LZFSE stream."""
    return head[:4] in (STORED, LZFSE_1, LZFSE_2, LZVN)


def open_layer(source: Source) -> Packed:
    """The stream; it is looked at when it is decoded."""
    layer = Layer("LZFSE", f"blocks {source.read_at(0, 4).decode()}")
    return Packed(layer, 0, source.size, None, lambda: decode(source))


def blocks(source: Source) -> Iterator[Block]:
    """The blocks before the end mark, from their headers alone; every size has been checked.

    Raises `FormatError` or `TruncatedError`.
    """
    off = 0
    for _ in range(_MAX_BLOCKS):
        block = _block(source, off)
        if block is None:
            return
        yield block
        off += block.size
    raise FormatError(source.name, off, f"LZFSE stream of more than {_MAX_BLOCKS:#x} blocks")


def _block(source: Source, off: int) -> Block | None:
    """The block at `off`; None for the end mark."""
    header = source.read_at(off, min(_HEADER_2.size, source.size - off))
    magic = header[:4]
    if magic == END:
        return None
    layout = _LAYOUTS.get(magic)
    if layout is None and len(magic) == 4:
        raise FormatError(source.name, off, f"LZFSE block: expected a magic, got {magic.hex()}")
    if layout is None or len(header) < layout.size:
        wanted = layout.size if layout is not None else 4
        raise TruncatedError(source.name, off, wanted, len(header), "LZFSE block")
    fields = layout.unpack_from(header)
    raw: int = fields[1]
    name = f"LZFSE block {magic.decode()}"
    size, most = _sizes(magic, fields)
    if size < layout.size:
        raise FormatError(source.name, off, f"{name}: size {size:#x}, expected {layout.size:#x}")
    if off + size > source.size:
        raise TruncatedError(source.name, off, size, source.size - off, name)
    if not 0 < raw <= most:
        raise FormatError(
            source.name, off + 4, f"{name}: n_raw_bytes {raw:#x}, expected 0x1 to {most:#x}"
        )
    return Block(off, size, raw, name)


def _sizes(magic: bytes, fields: tuple[int, ...]) -> tuple[int, int]:
    """Of a block: its packed bytes with the header, and how many it can decode to at most."""
    if magic == STORED:
        return _STORED_HEADER.size + fields[1], fields[1]
    if magic == LZVN:
        return _LZVN_HEADER.size + fields[2], min(_MAX_LZVN, fields[2] * LZVN_RATIO)
    if magic == LZFSE_1:
        return _HEADER_1_SIZE + fields[5] + fields[6], _MAX_BLOCK
    literals, matches, header = fields[2] >> 20, fields[3] >> 40, fields[4] & 0xFFFFFFFF
    return header + (literals & _SIZE_BITS) + (matches & _SIZE_BITS), _MAX_BLOCK


def decode(source: Source) -> Iterator[bytes]:
    """The decoded bytes of the stream, in pieces. What follows its end mark is not looked at.

    Raises `FormatError`, or `UnsupportedError` without the package.
    """
    total = sum(block.raw for block in blocks(source))
    if total > LIMIT:
        message = f"LZFSE: claims {total:#x} decoded bytes, expected at most {LIMIT:#x}"
        raise FormatError(source.name, 0, message)
    window = b""
    for block in blocks(source):
        data = source.read_at(block.off, block.size)
        if data.startswith(STORED):
            piece = data[_STORED_HEADER.size :]
        else:
            if data.startswith(LZVN):
                _check_first_match(source, block, data)
            piece = _decode_block(source, block, data, window)
        yield piece
        window = (window + piece[-_WINDOW:])[-_WINDOW:]


def decode_lzvn(source: Source, off: int, packed: int, size: int) -> Iterator[bytes]:
    """The `size` bytes that the `packed` bytes of LZVN at `off` decode to.

    Raises `FormatError`, or `UnsupportedError` without the package.
    """
    if size:
        header = _LZVN_HEADER.pack(LZVN, size, packed)
        block = Block(off, packed, size, "LZVN data")
        data = header + source.read_at(off, packed)
        _check_first_match(source, block, data)
        yield _decode_block(source, block, data, b"")


def _check_first_match(source: Source, block: Block, data: bytes) -> None:
    """Raises `FormatError` if the first match of LZVN has the distance of one before it.

    The package believes it, and copies what its memory happens to hold.
    """
    at = _LZVN_HEADER.size
    while at < len(data):
        opcode = data[at]
        if opcode == _LITERALS and at + 1 < len(data):
            at += 2 + 16 + data[at + 1]
        elif _LITERALS < opcode < _MATCH:
            at += 1 + (opcode & 0x0F)
        elif opcode in _NOTHING:
            at += 1
        else:
            break
    if at < len(data) and data[at] >= _MATCH:
        message = f"{block.name}: is corrupt (a match without a distance)"
        raise FormatError(source.name, block.off, message)


def _decode_block(source: Source, block: Block, data: bytes, window: bytes) -> bytes:
    """The decoded bytes of `block`, whose packed ones are `data`, after those in `window`."""
    unpack, error = _library(source.name)
    wanted = len(window) + block.raw
    before = _STORED_HEADER.pack(STORED, len(window)) + window if window else b""
    try:
        decoded = unpack(b"".join((_room(wanted + 1), before, data, END)))
    except error:
        raise FormatError(source.name, block.off, f"{block.name}: is corrupt") from None
    except MemoryError:  # LZVN that leads nowhere looks to the package like a lack of room
        message = f"{block.name}: is corrupt, or there is no memory for {wanted:#x} bytes"
        raise FormatError(source.name, block.off, message) from None
    if len(decoded) != wanted:
        got = len(decoded) - len(window)
        raise FormatError(
            source.name, block.off, f"{block.name}: expected {block.raw:#x} bytes, got {got:#x}"
        )
    return decoded[len(window) :]


def _room(size: int) -> bytes:
    """An empty LZFSE block that claims `size` bytes.

    The package makes room for what the first block claims, and decodes everything again with twice
    the room as often as that is not more than enough.
    """
    no_bits = 7 << 60  # 0 bits left over, biased by 7
    lmd_payload = 8
    fields = no_bits, no_bits | lmd_payload << 40, _HEADER_2.size
    return _HEADER_2.pack(LZFSE_2, size, *fields) + bytes(lmd_payload)


def _library(file: str) -> tuple[Callable[[bytes], bytes], type[Exception]]:
    """The package's decoder and what it raises. Raises `UnsupportedError` if it is missing."""
    try:
        import lzfse  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise UnsupportedError(
            f"{file}: is packed with LZFSE or LZVN ({error}): pip install 'kvmtool[kernelcache]'"
        ) from error
    return lzfse.decompress, lzfse.error
