"""AFF4 volumes: by the AFF4 Standard 1.0a, as pmem 3 has them, and as pmem 2 before the standard.

pmem's metadata is as its users show it (github.com/Velocidex/c-aff4, issues 46 and 134).
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

VOLUME = "aff4://4928ef44-6579-496c-a53e-2ad34d98b7ed"
STREAM = "aff4://dac3f96d-8f2c-4116-adc3-e870fd009242"
MAP = "aff4://7c808ddc-c9f7-4cd7-bf15-67d733dc43bc"
ZERO = "http://aff4.org/Schema#Zero"
UNREADABLE = "http://aff4.org/Schema#UnreadableData"
CHUNK, PER_BEVY = 32768, 1024
_PREFIXES = """@prefix rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#> .
@prefix aff4: <http://aff4.org/Schema#> .
@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
@prefix memory: <http://aff4.org/Schema#memory/> .
"""
_STANDARD = """
<aff4://9c80aac3-c9f7-4cd7-bf15-67d7338af000>
    a aff4:MemoryImage, aff4:DiscontiguousImage, aff4:Image ;
    aff4:dataStream <{map}> ;
    aff4:size "{end}"^^xsd:long .

<{map}> a aff4:Map ;
    aff4:size "{end}"^^xsd:long ;
    aff4:dependentStream <{stream}> ;
    aff4:stored <{volume}> .

<{stream}> a aff4:ImageStream ;
    aff4:size "{size}"^^xsd:long ;
    aff4:chunkSize "{chunk}"^^xsd:int ;
    aff4:chunksInSegment "{per_bevy}"^^xsd:int ;
    aff4:compressionMethod <{method}> ;
    aff4:stored <{volume}> .
"""
_PMEM = """@base <{volume}> .

</dev/pmem>
    aff4:category memory:physical ;
    aff4:stored <> ;
    a aff4:Map .

</dev/pmem/data>
    aff4:chunkSize {chunk} ;
    aff4:chunksInSegment {per_bevy} ;
    aff4:compressionMethod <{method}> ;
    aff4:size {size} ;
    aff4:stored <> ;
    a aff4:ImageStream .

</Library/Application Support/x y>
    aff4:original_filename "/Library/Application Support/x y"^^xsd:string ;
    aff4:size 5 ;
    a aff4:Image .
"""
_OLD_WORDS = {
    "chunkSize": "chunk_size",
    "chunksInSegment": "chunks_per_segment",
    "compressionMethod": "compression",
    "aff4:ImageStream": "aff4:image",
    "aff4:Map": "aff4:map",
}


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def _snappy(data: bytes) -> bytes:
    cramjam = pytest.importorskip("cramjam", reason="extra kvmtool[aff4] is not installed")
    return bytes(cramjam.snappy.compress_raw(data))


def _lz4(data: bytes, **size: bool) -> bytes:
    block = pytest.importorskip("lz4.block", reason="extra kvmtool[lz4] is not installed")
    return block.compress(data, **size)


METHODS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zlib": ("https://www.ietf.org/rfc/rfc1950.txt", lambda data: zlib.compress(data, 1)),
    "deflate": ("https://tools.ietf.org/html/rfc1951", _deflate),
    "snappy": ("http://code.google.com/p/snappy/", _snappy),
    "snappy-pmem2": ("https://github.com/google/snappy", _snappy),
    "lz4": ("https://code.google.com/p/lz4/", lambda data: _lz4(data, store_size=False)),
    "lz4-pyaff4": ("https://code.google.com/p/lz4/", _lz4),
    "stored": ("http://aff4.org/Schema#NullCompressor", lambda data: data),
    "stored-pmem2": ("http://aff4.org/Schema#compression/stored", lambda data: data),
}


def stream(
    name: str, data: bytes, method: str, chunk: int, per_bevy: int, old: bool
) -> dict[str, bytes]:
    """The members of an image stream. The standard's chunks lie in its bevies in no order."""
    pack = METHODS[method][1]
    chunks = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    out = {}
    for number, first in enumerate(range(0, len(chunks), per_bevy)):
        packed = [pack(plain) for plain in chunks[first : first + per_bevy]]
        if not old:
            plain = [part.ljust(chunk, b"\0") for part in chunks[first : first + per_bevy]]
            packed = [p if len(p) < chunk - 16 else q for p, q in zip(packed, plain, strict=True)]
        order = list(range(len(packed)))
        if not old:
            random.Random(number).shuffle(order)
        at, places = 0, {}
        for which in order:
            places[which] = at
            at += len(packed[which])
        bevy = f"{name}/{number:08d}"
        out[bevy] = b"".join(packed[which] for which in order)
        table = sorted(places.items())
        if old:
            out[f"{bevy}/index"] = b"".join(struct.pack("<I", at) for _, at in table)
        else:
            entries = (struct.pack("<QI", at, len(packed[which])) for which, at in table)
            out[f"{bevy}.index"] = b"".join(entries)
    return out


def entry(address: int, length: int, offset: int, target: int, old: bool = False) -> bytes:
    """An entry of a map."""
    middle = (offset, length) if old else (length, offset)
    return struct.pack("<QQQI", address, *middle, target)


def members(
    *ranges: tuple[int, bytes],
    style: str = "standard",
    method: str = "zlib",
    chunk: int = CHUNK,
    per_bevy: int = PER_BEVY,
    more: tuple[tuple[int, int, str], ...] = (),
) -> dict[str, bytes]:
    """The members of a volume with these ranges of memory, by their names in the zip file.

    `style` is "standard", "pmem3" or "pmem2"; `more` are (address, bytes, URN) of symbolic streams.
    """
    old = style == "pmem2"
    where, data_at = (MAP, STREAM) if style == "standard" else ("dev/pmem", "dev/pmem/data")
    folder, data_folder = (name.replace("://", "%3A%2F%2F") for name in (where, data_at))
    data = b"".join(content for _, content in ranges)
    targets = [STREAM if style == "standard" else f"{VOLUME}/{data_at}"]
    targets += sorted({urn for _, _, urn in more})
    table, at = b"", 0
    for address, content in ranges:
        table += entry(address, len(content), at, 0, old)
        at += len(content)
    table += b"".join(entry(a, size, 0, targets.index(urn), old) for a, size, urn in more)
    said = (_STANDARD if style == "standard" else _PMEM).format(
        volume=VOLUME,
        map=MAP,
        stream=STREAM,
        size=len(data),
        end=max((address + len(content) for address, content in ranges), default=0),
        chunk=chunk,
        per_bevy=per_bevy,
        method=METHODS[method][0],
    )
    for word, before in _OLD_WORDS.items() if old else ():
        said = said.replace(word, before)
    out = stream(data_folder, data, method, chunk, per_bevy, old)
    out[f"{folder}/map"], out[f"{folder}/idx"] = table, "\n".join(targets).encode()
    if style != "standard":
        out["Library/Application Support/x y"] = b"bytes"
    out["information.turtle"] = (_PREFIXES + said).encode()
    if old:
        return out
    first = {"container.description": VOLUME.encode(), "version.txt": b"major=1\nminor=0\ntool=x\n"}
    return first | out


def zipped(content: dict[str, bytes], comment: str = VOLUME) -> bytes:
    """A zip file of `content`; the metadata deflated, all else stored, as writers do."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", allowZip64=True) as volume:
        for name, data in content.items():
            packed = zipfile.ZIP_DEFLATED if name == "information.turtle" else zipfile.ZIP_STORED
            volume.writestr(zipfile.ZipInfo(name), data, packed)
        volume.comment = comment.encode()
    return out.getvalue()


def aff4(*ranges: tuple[int, bytes], **how) -> bytes:
    """A volume with these ranges of memory; `how` as for `members`."""
    return zipped(members(*ranges, **how))
