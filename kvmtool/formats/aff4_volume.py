"""AFF4 volumes: a zip file of members named by URNs, and RDF that says what the URNs are.

The zip directory is read by the standard library, the RDF (Turtle) by pyoxigraph, which is in the
extra `kvmtool[aff4]`. Members are located here, not opened through zipfile: image data is read at
any offset of a member that is gigabytes long.

Source: AFF4 Standard 1.0a, sections 2 and 5 (github.com/aff4/Standard); APPNOTE.TXT 4.3.7.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from struct import Struct
from typing import TYPE_CHECKING
from urllib.parse import unquote

from kvmtool.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

SCHEMA = "http://aff4.org/Schema#"
_TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
TURTLE, _DESCRIPTION = "information.turtle", "container.description"
_URN = re.compile(r"aff4://[\w.:+-]+")
_LOCAL = Struct("<4s2xHH16xHH")  # signature, flags, method, bytes of name and of extra field
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x01  # of flags
_STORED, _DEFLATED = 0, 8  # methods
_DIRECTORY_LIMIT = 16 << 20  # bytes; a terabyte of memory has 65,536 members of some 100 bytes
_URN_LIMIT = 4096
_TURTLE_LIMIT = 8 << 20  # 50,000 streams

Properties = dict[str, list[str]]  # values by predicate, that without SCHEMA; types are "a"


class _BeforeStart(OSError):
    """zipfile looked for a record before the first byte of the file."""


# what zipfile raises for a directory that is none
_DAMAGED = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, _BeforeStart)


class _Reader:
    """A source as zipfile reads it: its end, and the directory at once."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise _BeforeStart(f"offset {base + offset} is before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._at)
        size = left if size < 0 else min(size, left)
        if size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size:#x} bytes")
        data = self._source.read_at(self._at, size) if size else b""
        self._at += size
        return data


class Volume:
    """The members of a volume by URN, and `objects`: what the volume says each URN is."""

    def __init__(self, source: Source) -> None:
        """Read directory and metadata. Raises `FormatError`, `UnsupportedError`."""
        self.source = source
        try:
            directory = zipfile.ZipFile(_Reader(source))
        except _DAMAGED as error:
            raise FormatError(
                source.name,
                None,
                f"the directory at the end of the zip file cannot be read ({error}): the volume is "
                "cut off, or was not finished",
            ) from error
        self._names = {info.filename: info for info in directory.infolist()}
        self.urn = self._own_urn(directory.comment)
        self._members = {self._urn_of(name): info for name, info in self._names.items()}
        self.objects = self._metadata()

    def _own_urn(self, comment: bytes) -> str:
        said = comment  # where both are there, the member has a checksum
        if _DESCRIPTION in self._names:
            said = self._content(self._names[_DESCRIPTION], _URN_LIMIT)
        urn = said.split(b"\0")[0].strip().decode("latin-1")
        if not _URN.fullmatch(urn):
            raise FormatError(
                self.source.name,
                None,
                f"neither the zip comment nor {_DESCRIPTION} says the volume's URN: {urn[:64]!r}",
            )
        return urn

    def _urn_of(self, name: str) -> str:
        path = unquote(name)
        return path if path.startswith("aff4://") else f"{self.urn}/{path.lstrip('/')}"

    def _metadata(self) -> dict[str, Properties]:
        try:
            from pyoxigraph import RdfFormat, parse
        except ImportError as error:
            raise UnsupportedError(
                f"{self.source.name}: is an AFF4 volume, whose metadata is read by a package "
                f"({error}): pip install 'kvmtool[aff4]'"
            ) from error
        info = self._names.get(TURTLE)
        if info is None:
            raise FormatError(self.source.name, None, f"the volume has no member {TURTLE}")
        text = self._content(info, _TURTLE_LIMIT)
        objects: dict[str, Properties] = {}
        try:
            # lenient: file names of the machine become URNs with spaces in them
            for quad in parse(text, RdfFormat.TURTLE, base_iri=self.urn, lenient=True):
                predicate = quad.predicate.value
                key = "a" if predicate == _TYPE else predicate.removeprefix(SCHEMA)
                subject = objects.setdefault(unquote(getattr(quad.subject, "value", "")), {})
                subject.setdefault(key, []).append(getattr(quad.object, "value", ""))
        except (SyntaxError, ValueError) as error:
            raise FormatError(
                self.source.name, None, f"{TURTLE} is damaged: {str(error)[:200]}"
            ) from error
        return objects

    def __contains__(self, urn: str) -> bool:
        return unquote(urn) in self._members

    def below(self, urn: str) -> Iterator[str]:
        """The rest of the URNs of all members that lie below `urn`."""
        prefix = unquote(urn) + "/"
        return (name.removeprefix(prefix) for name in self._members if name.startswith(prefix))

    def size(self, urn: str) -> int:
        """Bytes a member claims to have; raises `FormatError`."""
        return self._member(urn).file_size

    def read(self, urn: str, limit: int) -> bytes:
        """All bytes of a member that has at most `limit`; raises `FormatError`."""
        return self._content(self._member(urn), limit)

    def locate(self, urn: str) -> tuple[int, int]:
        """File offset and size of a member that is stored as it is; raises `FormatError`."""
        info = self._member(urn)
        offset, method = self._data(info)
        if method != _STORED:
            raise UnsupportedError(
                f"{self.source.name}: {info.filename} is compressed as a whole (method {method}), "
                "so that nothing in it can be found: expected a stored member"
            )
        return offset, info.file_size

    def _member(self, urn: str) -> zipfile.ZipInfo:
        info = self._members.get(unquote(urn))
        if info is None:
            raise FormatError(self.source.name, None, f"the volume has no member {urn}")
        return info

    def _data(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        """File offset of a member's bytes, which lie in the file, and their method."""
        source, at = self.source, info.header_offset
        if not 0 <= at <= source.size - _LOCAL.size:
            raise FormatError(
                source.name, None, f"{info.filename} lies at {at:#x}, past the end of the file"
            )
        magic, flags, method, name, extra = _LOCAL.unpack(source.read_at(at, _LOCAL.size))
        if magic != _LOCAL_MAGIC or method != info.compress_type:
            raise FormatError(
                source.name, at, f"expected the header of {info.filename}, got {magic.hex()}"
            )
        if flags & _ENCRYPTED:
            raise UnsupportedError(f"{source.name}: {info.filename} is encrypted")
        offset: int = at + _LOCAL.size + name + extra
        if offset + info.compress_size > source.size or (
            method == _STORED and info.compress_size != info.file_size
        ):
            raise FormatError(
                source.name,
                at,
                f"{info.filename} has {info.compress_size:#x} bytes stored of {info.file_size:#x}, "
                f"the file has {source.size:#x}",
            )
        return offset, method

    def _content(self, info: zipfile.ZipInfo, limit: int) -> bytes:
        offset, method = self._data(info)
        if max(info.file_size, info.compress_size) > limit:
            raise FormatError(
                self.source.name,
                offset,
                f"{info.filename} claims {info.file_size:#x} bytes, more than {limit:#x}",
            )
        content = self.source.read_at(offset, info.compress_size)
        if method == _DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, limit + 1)
            except zlib.error as error:
                raise FormatError(
                    self.source.name, offset, f"{info.filename} is damaged ({error})"
                ) from error
        elif method != _STORED:
            raise UnsupportedError(
                f"{self.source.name}: {info.filename} is compressed by method {method}"
            )
        crc = zlib.crc32(content)
        if len(content) != info.file_size or crc != info.CRC:
            raise FormatError(
                self.source.name,
                offset,
                f"{info.filename} is damaged: expected {info.file_size:#x} bytes of CRC "
                f"{info.CRC:#x}, got {len(content):#x} of {crc:#x}",
            )
        return content
