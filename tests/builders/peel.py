"""Everything a kernel gets wrapped in, written from the published formats.

LZSS is encoded here; LZFSE and LZVN by the package `lzfse` (skips without it), whose blocks are
then taken apart to make the kinds it does not write: LZFSE with plain tables, LZVN without headers.
"""

from __future__ import annotations

import gzip as stdlib_gzip
import lzma
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# fat


def fat(parts: Sequence[tuple[int, int, bytes]], wide: bool = False, align: int = 12) -> bytes:
    """A fat file of (cputype, cpusubtype, content); `wide` is fat64."""
    layout = struct.Struct(">2I2Q2I" if wide else ">5I")
    table = struct.pack(">2I", 0xCAFEBABF if wide else 0xCAFEBABE, len(parts))
    body, start = b"", 8 + layout.size * len(parts)
    for cputype, cpusubtype, content in parts:
        body += bytes(-(start + len(body)) % (1 << align))
        fields = (cputype, cpusubtype, start + len(body), len(content), align)
        table += layout.pack(*fields, *((0,) if wide else ()))
        body += content
    return table + body


# DER, IM4P, IMG4


def der(tag: int, *content: bytes) -> bytes:
    """One element with the shortest length there is."""
    body = b"".join(content)
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(digits))) + digits + body


def der_text(text: str) -> bytes:
    """An IA5String."""
    return der(0x16, text.encode("ascii"))


def der_int(value: int) -> bytes:
    """An INTEGER."""
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def compression(algorithm: int, size: int) -> bytes:
    """The member that tells how the payload is packed: 0 is LZSS, 1 LZFSE."""
    return der(0x30, der_int(algorithm), der_int(size))


KEYBAG = der(
    0x04, der(0x30, der(0x30, der_int(1), der(0x04, bytes(16)), der(0x04, bytes(range(32)))))
)
PROPERTIES = der(0xA0, der(0x30, der_text("PAYP"), der(0x31)))


def im4p(payload: bytes, *members: bytes, kind: str = "krnl", text: str = "KernelCache") -> bytes:
    """An IM4P with optional members in the given order."""
    fixed = (der_text("IM4P"), der_text(kind), der_text(text), der(0x04, payload))
    return der(0x30, *fixed, *members)


def img4(payload: bytes, signed: bool = True) -> bytes:
    """An IMG4 around an IM4P."""
    manifest = der(0xA0, der(0x30, der_text("IM4M"), der_int(0), der(0x31)))
    return der(0x30, der_text("IMG4"), payload, *((manifest,) if signed else ()))


# comp


def comp(
    kind: str, packed: bytes, raw: bytes, adler: int | None = None, size: int | None = None
) -> bytes:
    """A comp image: `packed` behind a header that speaks of `raw`."""
    header = struct.pack(
        ">4s4s3I",
        b"comp",
        kind.encode("ascii"),
        zlib.adler32(raw) if adler is None else adler,
        len(raw) if size is None else size,
        len(packed),
    )
    return header.ljust(0x180, b"\0") + packed


# LZSS


def lzss(data: bytes) -> bytes:
    """LZSS with a ring of 4096 bytes that begins 18 before its end, full of spaces."""
    out = bytearray()
    items: list[bytes] = []
    flags = 0
    for item in _lzss_items(data):
        flags |= (len(item) == 1) << len(items)
        items.append(item)
        if len(items) == 8:
            out.append(flags)
            out += b"".join(items)
            items.clear()
            flags = 0
    if items:
        out.append(flags)
        out += b"".join(items)
    return bytes(out)


def _lzss_items(data: bytes) -> Iterator[bytes]:
    """Literals (1 byte) and matches (2 bytes), greedy; the last place of every three bytes."""
    last: dict[bytes, int] = {}
    at, end = 0, len(data)
    singles = [bytes((value,)) for value in range(256)]
    while at < end:
        key = data[at : at + 3]
        found = last.get(key)
        last[key] = at
        if found is None or at - found > 4096 or len(key) < 3:
            yield singles[data[at]]
            at += 1
            continue
        length, most = 3, min(18, end - at)
        while length < most and data[found + length] == data[at + length]:
            length += 1
        place = (found + 4078) % 4096
        yield bytes((place & 0xFF, place >> 4 & 0xF0 | length - 3))
        at += length


# LZFSE and LZVN


def package() -> Any:
    """The package `lzfse`, the reference implementation; skips without it."""
    return pytest.importorskip("lzfse", reason="extra kvmtool[kernelcache] is not installed")


def lzfse(data: bytes) -> bytes:
    """A stream as the reference encoder writes it: bvx2, bvxn when small, bvx- when random."""
    return package().compress(data)


def lzfse_stored(data: bytes, block: int = 40_000) -> bytes:
    """A stream of stored blocks."""
    cuts = (data[at : at + block] for at in range(0, len(data), block))
    return b"".join(struct.pack("<4sI", b"bvx-", len(cut)) + cut for cut in cuts) + b"bvx$"


def lzfse_plain_tables(data: bytes) -> bytes:
    """A stream as `lzfse`'s, its bvx2 blocks turned into bvx1."""
    stream, at, out = lzfse(data), 0, b""
    while (magic := stream[at : at + 4]) != b"bvx$":
        if magic == b"bvx2":
            at, block = _plain_block(stream, at)
            out += block
            continue
        layout = "<4sI" if magic == b"bvx-" else "<4s2I"
        end = at + struct.calcsize(layout) + struct.unpack_from(layout, stream, at)[-1]
        at, out = end, out + stream[at:end]
    return out + b"bvx$"


def _plain_block(stream: bytes, at: int) -> tuple[int, bytes]:
    """Where the bvx2 block at `at` ends, and its content as bvx1."""
    raw, *words = struct.unpack_from("<I3Q", stream, at + 4)

    def field(word: int, shift: int, bits: int) -> int:
        return words[word] >> shift & ((1 << bits) - 1)

    literals, literal_bytes, matches = field(0, 0, 20), field(0, 20, 20), field(0, 40, 20)
    match_bytes, header = field(1, 40, 20), field(2, 0, 32)
    states = [field(1, shift, 10) for shift in (0, 10, 20, 30)]
    match_states = [field(2, shift, 10) for shift in (32, 42, 52)]
    sizes = (raw, literal_bytes + match_bytes, literals, matches, literal_bytes, match_bytes)
    block = struct.pack("<4s6I", b"bvx1", *sizes)
    block += struct.pack("<i4H", field(0, 60, 3) - 7, *states)
    block += struct.pack("<i3H", field(1, 60, 3) - 7, *match_states)
    block += struct.pack("<360H", *_frequencies(stream[at + 32 : at + header]))
    start = at + header
    end = start + literal_bytes + match_bytes
    return end, block.ljust(772, b"\0") + stream[start:end]


def _frequencies(packed: bytes) -> list[int]:
    """The 20 + 20 + 64 + 256 numbers of a bvx2 header, written with 2 to 14 bits each."""
    bits = int.from_bytes(packed, "little")
    numbers = []
    for _ in range(360):
        width, value = _frequency(bits & 0x3FFF)
        numbers.append(value)
        bits >>= width
    return numbers


def _frequency(bits: int) -> tuple[int, int]:
    """The width and the value of the number that `bits` begin with."""
    if not bits & 1:
        return 2, bits >> 1 & 1
    if not bits & 2:
        return 3, 2 + (bits >> 2 & 1)
    if not bits & 4:
        return 5, 4 + (bits >> 3 & 3)
    if not bits & 8:
        return 8, 8 + (bits >> 4 & 0xF)
    return 14, 24 + (bits >> 4 & 0x3FF)


def lzvn(data: bytes) -> bytes:
    """LZVN opcodes without any header, ended by their end mark.

    Made of the encoder's small blocks, each without its own end mark: what it does not compress
    stands as literals (opcode 0xE0: 16 to 271 of them, 0xE1 to 0xEF: 1 to 15).
    """
    out = b""
    pieces = []
    for at in range(0, len(data), 4000):
        cut = data[at : at + 4000]
        block = lzfse(cut)
        if block.startswith(b"bvxn"):
            size = struct.unpack_from("<I", block, 8)[0]
            assert block[12 : 12 + size].endswith(LZVN_END)
            pieces.append(block[12 : 12 + size - len(LZVN_END)])
        else:
            pieces.append(lzvn_literals(cut))
    return out.join(pieces) + LZVN_END


LZVN_END = b"\x06" + bytes(7)


def lzvn_literals(data: bytes) -> bytes:
    """Opcodes for literals alone."""
    out, at = b"", 0
    while at < len(data):
        size = min(271, len(data) - at)
        if size > 15:
            out += bytes((0xE0, size - 16))
        else:
            out += bytes((0xE0 | size,))
        out += data[at : at + size]
        at += size
    return out


# gzip, xz, zstd


def gzip(data: bytes) -> bytes:
    """One gzip member."""
    return stdlib_gzip.compress(data, 1, mtime=0)


def xz(data: bytes) -> bytes:
    """One xz stream."""
    return lzma.compress(data, preset=0)


def zstd(data: bytes) -> bytes:
    """One zstd frame with a checksum; skips where there is no library for it."""
    if sys.version_info >= (3, 14):
        from compression import zstd as library
    else:
        library = pytest.importorskip(
            "backports.zstd", reason="extra kvmtool[kernelcache] is not installed"
        )
    return library.compress(data, options={library.CompressionParameter.checksum_flag: 1})
