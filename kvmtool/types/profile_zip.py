"""The files in a Volatility 2 profile's zip, read within bounds."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from kvmtool.source import Source

_MAGIC = b"PK\x03\x04"
_END = b"PK\x05\x06"  # then from byte 12 the size of the directory
_END_64 = b"PK\x06\x07"
_TYPES, _SYMBOLS = (".vtypes", ".vtype"), (".dsymutil",)
_TAIL = 22 + 0xFFFF  # the directory's end record and the longest comment
_FILE_LIMIT = 64 << 20
_DIRECTORY_LIMIT = 1 << 16
_TEXT_LIMIT = 48 << 20


class ProfileText(NamedTuple):
    """The description of the types, the listing of the symbols ("" if there is none)."""

    vtypes: str
    symbols: str


def is_profile(source: Source) -> bool:
    """Whether this is a Volatility 2 profile of a Mac: a zip of vtypes or a dsymutil listing."""
    if source.size < 30 or source.read_at(0, 4) != _MAGIC:
        return False
    size = min(source.size, _TAIL)
    tail = source.read_at(source.size - size, size)
    return any(suffix.encode() in tail for suffix in (*_TYPES, *_SYMBOLS))


def read_profile(path: str) -> ProfileText:
    """The texts in the zip at `path`.

    Raises OSError; `FormatError` for what is damaged, is no profile, or is larger than any.
    """
    source = FileSource(path)
    try:
        if source.size > _FILE_LIMIT:
            raise FormatError(path, None, f"expected a profile of at most {_FILE_LIMIT:#x} bytes")
        data = source.read_at(0, source.size)
    finally:
        source.close()
    _check_directory(path, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            vtypes = _text(path, archive, _TYPES)
            symbols = _text(path, archive, _SYMBOLS)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        raise FormatError(path, None, f"the zip is damaged: {exc}") from exc
    except (ValueError, OverflowError, OSError) as exc:  # offsets beyond the file, names no text
        raise FormatError(path, None, f"the zip is damaged: {exc}") from exc
    if vtypes is None:
        raise FormatError(path, None, "expected a .vtypes file in the zip, there is none")
    return ProfileText(vtypes, symbols or "")


def _check_directory(path: str, data: bytes) -> None:
    """The directory is read as a whole: it must be small, as a profile's is."""
    at = data.rfind(_END, max(0, len(data) - _TAIL))
    if at < 0 or len(data) < at + 22:
        raise FormatError(path, None, "expected a zip, it has no directory (is it cut off?)")
    size = int.from_bytes(data[at + 12 : at + 16], "little")
    if size > _DIRECTORY_LIMIT or data[max(0, at - 20) : at].startswith(_END_64):
        raise FormatError(path, at, f"a directory of {size:#x} bytes is no profile's")


def _text(path: str, archive: zipfile.ZipFile, suffixes: tuple[str, ...]) -> str | None:
    """The file whose name ends so; El Capitan's profiles have .vtypes and .vtype, both alike."""
    for suffix in suffixes:
        for info in archive.infolist():
            if not info.filename.endswith(suffix):
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise FormatError(path, None, f"{info.filename}: packed in an unusual way")
            with archive.open(info) as member:
                text = member.read(_TEXT_LIMIT + 1)
            if len(text) > _TEXT_LIMIT:
                raise FormatError(path, None, f"{info.filename}: more than {_TEXT_LIMIT:#x} bytes")
            return text.decode("utf-8", "backslashreplace")
    return None
