"""Exact types for a kernel: what file holds them, and whether that file is this kernel's.

A file is known by its bytes, never by its name: Mach-O (a kernel, an object file or a dSYM, thin or
fat) with DWARF or CTF in it, bare CTF, Volatility 3's ISF (JSON, also packed), a Volatility 2
profile (zip). Where both kernel and file have an LC_UUID the two must be equal.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnknownFormatError,
    UnsupportedError,
)
from kvmtool.macho import MAGICS, is_macho, uuid_text
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.macho import MachO
    from kvmtool.source import Source
    from kvmtool.types.model import TypeSource

ENVIRONMENT = "KVMTOOL_TYPES"

_CTF_MAGICS = {b"\xf1\xcf": "<", b"\xcf\xf1": ">"}  # 0xCFF1, sys/ctf.h
_ZIP, _GZIP, _XZ = b"PK\x03\x04", b"\x1f\x8b", b"\xfd7zXZ\x00"
_FAT = (b"\xca\xfe\xba\xbe", b"\xca\xfe\xba\xbf")
_PEEK = 1 << 12  # bytes decoded of a packed file to see what is in it
_XZ_MEMORY = 1 << 27
_INSIDE_DSYM = os.path.join("Contents", "Resources", "DWARF")
_BESIDE = (".ctfdata", ".ctf", ".json", ".json.xz", ".json.gz")  # after the kernel's file name


class KernelIdentity(NamedTuple):
    """What is known of the kernel that types are wanted for; `arch` as macho.arch_name says."""

    arch: str | None = None
    byteorder: str = "<"
    pointer_size: int = 8
    uuid: bytes | None = None
    banner: str | None = None


class Found(NamedTuple):
    """Types, and in one sentence where they are from; `held` must stay open while they are used."""

    source: TypeSource
    how: str
    held: tuple[Source, ...] = ()


def open_types(path: str, kernel: KernelIdentity | None = None, force: bool = False) -> Found:
    """The types in the file (or dSYM bundle) at `path`, for `kernel` where one is known.

    Raises OSError, `UnknownFormatError`, `FormatError`, NotFoundError("types") for a file that may
    hold types but does not, and `MismatchError` for another kernel's unless `force`.
    """
    identity = kernel or KernelIdentity()
    if os.path.isdir(path):
        path = _in_bundle(path, identity)
    source = FileSource(path)
    try:
        found = _read(source, identity, force)
    except BaseException:
        source.close()
        raise
    return Found(found, f"types of {found.name}: {found.origin}", (source,))


def find_types(
    image: MachO | None,
    path: str | None,
    kernel: KernelIdentity,
    kernel_path: Sequence[str] | None = None,
) -> Found | None:
    """The exact types of a kernel whose Mach-O is `image` and whose file is at `path`.

    Looked for in a dSYM beside that file, in the image (DWARF, then CTF), by UUID in the
    directories of `kernel_path` (KVMTOOL_KERNEL_PATH by default), and in CTF or ISF files beside
    the kernel. What is damaged or another kernel's is passed over with a warning.
    """
    for place in _places(image, path, kernel, kernel_path):
        try:
            found = _inside(place) if not isinstance(place, str) else open_types(place, kernel)
        except (FormatError, FaultError, MismatchError, NotFoundError, UnsupportedError) as error:
            if not isinstance(error, (NotFoundError, UnsupportedError)):
                warnings.warn(f"types passed over: {error}", KvmWarning, stacklevel=2)
            continue
        if found is not None:
            return found
    return None


def _places(
    image: MachO | None,
    path: str | None,
    kernel: KernelIdentity,
    kernel_path: Sequence[str] | None,
) -> Iterator[MachO | str]:
    """Where types may be, the fullest first; a string is a path."""
    beside = [] if path is None else [path, os.path.splitext(path)[0]]
    yield from (f"{stem}.dSYM" for stem in beside if os.path.isdir(f"{stem}.dSYM"))
    if image is not None:
        yield image
    yield from _known_dsym(kernel.uuid, kernel_path)
    files = (f"{stem}{suffix}" for stem in beside for suffix in _BESIDE)
    yield from (name for name in files if os.path.isfile(name))


def _known_dsym(uuid: bytes | None, kernel_path: Sequence[str] | None) -> Iterator[str]:
    from kvmtool import kernel_index

    if uuid is None or (kernel_path is None and not os.environ.get(kernel_index.ENVIRONMENT)):
        return
    from kvmtool.kernel_search import find_debug_file

    known = find_debug_file(uuid, kernel_path)
    if known is not None:
        yield known.path


def _inside(image: MachO) -> Found | None:
    """The types that a kernel carries itself."""
    found = types_in(image)
    return None if found is None else Found(found, f"types of {found.name}: {found.origin}")


def types_in(image: MachO) -> TypeSource | None:
    """DWARF if the Mach-O has it, else CTF, else None. Raises `FormatError`."""
    names = {section.segname for section in image.sections}
    found: TypeSource | None = None
    if "__DWARF" in names:
        found = _reader("dwarf", "open_dwarf")(image)
    if found is None and "__CTF" in names:
        found = _reader("ctf", "ctf_of")(image)
    return found


def _reader(module: str, name: str) -> Any:
    """A reader's function. Its module is loaded when its format is met."""
    try:
        return getattr(import_module(f"kvmtool.types.{module}"), name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"types in the form of {module} cannot be read yet") from error


def _in_bundle(path: str, kernel: KernelIdentity) -> str:
    """The file in a dSYM bundle: the only one, else the one of the kernel's UUID."""
    folder = os.path.join(path, _INSIDE_DSYM)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise FormatError(path, None, f"is a directory without {_INSIDE_DSYM}") from error
    files = [os.path.join(folder, name) for name in names]
    if len(files) > 1 and kernel.uuid is not None:
        from kvmtool.kernel_search import find_debug_file

        known = find_debug_file(kernel.uuid, [folder])
        files = files if known is None else [known.path]
    if not files:
        raise NotFoundError("types", f"in {folder}", hint="the bundle is empty")
    return files[0]


def _read(source: FileSource, kernel: KernelIdentity, force: bool) -> TypeSource:
    head = source.read_at(0, min(16, source.size))
    inner = _packed_head(source, head) if head.startswith((_GZIP, _XZ)) else head
    found: TypeSource
    if inner[:4] in MAGICS or inner[:4] in _FAT:
        return _in_macho(source, kernel, force)
    if inner is head and head[:2] in _CTF_MAGICS:
        found = _reader("ctf", "open_ctf")(source, 0, source.size, pointer_size=kernel.pointer_size)
        return found
    if inner.lstrip()[:1] == b"{":
        found = _reader("isf", "open_isf")(source.name)
        return found
    if head.startswith(_ZIP):
        found = _reader("vtypes", "open_profile")(source.name)
        return found
    raise UnknownFormatError(
        source.name,
        0,
        f"expected a Mach-O, CTF, ISF or a Volatility profile, got {head[:4].hex() or 'nothing'}",
    )


def _packed_head(source: Source, head: bytes) -> bytes:
    """The first bytes that are in a gzip or xz file. Raises `FormatError`."""
    import lzma
    import zlib

    raw = source.read_at(0, min(_PEEK, source.size))
    try:
        if head.startswith(_GZIP):
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(raw, 64)
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(raw, 64)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(source.name, 0, f"cannot be decompressed: {error}") from error


def _in_macho(source: FileSource, kernel: KernelIdentity, force: bool) -> TypeSource:
    from kvmtool.kernel_file import open_kernel
    from kvmtool.macho import MachO

    image = MachO(source) if is_macho(source.read_at(0, 4)) else None
    if image is None:
        image = open_kernel(source.name, kernel.arch).kernel
    if image.uuid and kernel.uuid and image.uuid != kernel.uuid and not force:
        raise MismatchError(
            f"{source.name} has the types of {uuid_text(image.uuid)}, "
            f"the kernel is {uuid_text(kernel.uuid)}; --force uses them all the same"
        )
    found = types_in(image)
    if found is None:
        raise NotFoundError("types", f"in {source.name}", hint="it has neither DWARF nor CTF")
    return found
