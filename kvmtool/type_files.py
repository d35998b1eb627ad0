"""Exact types for a kernel: what file holds them, and whether that file is this kernel's.

A file is known by its bytes, never by its name: Mach-O (a kernel, an object file or a dSYM, thin or
fat) with DWARF or CTF in it, bare CTF, Volatility 3's ISF (JSON, also packed), a Volatility 2
profile (zip). Where both kernel and file have an LC_UUID the two must be equal.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmtool import cache
from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.macho import uuid_text
from kvmtool.peel.decoded import file_identity
from kvmtool.source import FileSource
from kvmtool.type_readers import Read, ctf_in, dwarf_in, read_types
from kvmtool.types.packed import Identity
from kvmtool.types.remembered import Remembered, recall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmtool.macho import MachO
    from kvmtool.source import Source
    from kvmtool.types.model import TypeSource

ENVIRONMENT = "KVMTOOL_TYPES"
KERNEL_PATH = "KVMTOOL_KERNEL_PATH"  # as in kernel_index, which is not worth loading for it

_ENDIAN = {"<": "little-endian", ">": "big-endian"}
_INSIDE_DSYM = os.path.join("Contents", "Resources", "DWARF")
_BESIDE = (".ctfdata", ".ctf", ".json", ".json.xz", ".json.gz")  # after the kernel's file name


class KernelIdentity(NamedTuple):
    """What is known of the kernel that types are wanted for; `arch` as macho.arch_name says."""

    arch: str | None = None
    byteorder: str | None = None
    pointer_size: int | None = None
    uuid: bytes | None = None
    banner: str | None = None


class Closable(Protocol):
    """Something to close when it is not needed any more."""

    def close(self) -> None:
        """Give back what it holds."""


class Found(NamedTuple):
    """Types, and in one sentence where they are from; `held` must stay open while they are used."""

    source: TypeSource
    how: str
    held: tuple[Closable, ...] = ()


def open_types(
    path: str,
    kernel: KernelIdentity | None = None,
    force: bool = False,
    how: str = "named by the user",
) -> Found:
    """The types in the file (or dSYM bundle) at `path`, for `kernel` where one is known.

    `how` says why this file, for the user. What was asked of the file before is in the cache.

    Raises OSError, `UnknownFormatError`, `FormatError`, NotFoundError("types") for a file that may
    hold types but does not, and `MismatchError` for another kernel's unless `force`.
    """
    if os.path.isdir(path):
        path = _in_bundle(path, kernel or KernelIdentity())
    held: list[Source] = [FileSource(path)]
    arch, word = (kernel.arch, kernel.pointer_size) if kernel else (None, None)
    read = partial(read_types, held, arch, word)
    try:
        found = _remembered(_key(held[0], arch, word), read)
        if kernel is not None and not force:
            _check(found, kernel, path)
    except BaseException:
        for source in held:
            source.close()
        raise
    return Found(found.source, f"{found.source.origin}, {how}", (_Held(found.source, held),))


def _key(source: Source, arch: str | None, word: int | None) -> str | None:
    """What the cache knows the file by; None for what is no file."""
    identity = file_identity(source)
    return None if identity is None else f"{identity}-{arch or 'any'}-{word or 0}"


def _remembered(key: str | None, read: Callable[[], Read]) -> Read:
    """The types with what the cache knows of them, which may be all that is needed."""
    if key is None or cache.directory() is None:
        return read()
    known = recall(key)
    if known is not None:
        about = known.identity()
        source = Remembered(key, about, lambda: read().source, known)
        return Read(source, about.uuid, about.banner)
    found = read()
    inner = found.source
    about = Identity(
        inner.name, inner.origin, inner.byteorder, inner.pointer_size, found.uuid, found.banner
    )
    return found._replace(source=Remembered(key, about, lambda: inner))


class _Held:
    """What is closed with the kernel: what is to be remembered first, then the files."""

    def __init__(self, source: TypeSource, held: list[Source]) -> None:
        self._source, self._held = source, held

    def close(self) -> None:
        if isinstance(self._source, Remembered):
            self._source.close()
        for source in self._held:
            source.close()


def _check(found: Read, kernel: KernelIdentity, path: str) -> None:
    """Raises `MismatchError` for types of another kernel or machine."""
    source = found.source
    if found.uuid and kernel.uuid and found.uuid != kernel.uuid:
        theirs, ours = uuid_text(found.uuid), uuid_text(kernel.uuid)
    elif found.banner and kernel.banner and found.banner != kernel.banner.strip():
        theirs, ours = repr(found.banner), repr(kernel.banner.strip())
    elif kernel.byteorder and kernel.pointer_size:
        theirs = _machine(source.byteorder, source.pointer_size)
        ours = _machine(kernel.byteorder, kernel.pointer_size)
        if theirs == ours:
            return
    else:
        return
    raise MismatchError(
        f"{path} has the types of {theirs}, the kernel is {ours}; --force uses them all the same"
    )


def _machine(byteorder: str, pointer_size: int) -> str:
    return f"a {8 * pointer_size}-bit {_ENDIAN[byteorder]} machine"


def find_types(
    image: MachO | None,
    path: str | None,
    kernel: KernelIdentity,
    kernel_path: Sequence[str] | None = None,
) -> Found | None:
    """The exact types of a kernel whose Mach-O is `image` and whose file is at `path`.

    Looked for in a dSYM beside that file, in the image's DWARF, in dSYMs of the same UUID in the
    directories of `kernel_path` (KVMTOOL_KERNEL_PATH by default), in the image's CTF, and in CTF
    or ISF files beside the kernel. What is damaged or another kernel's is passed over with a
    warning.
    """
    for place, how in _places(image, path, kernel, kernel_path):
        try:
            if isinstance(place, str):
                return open_types(place, kernel, how=how)
            inside = place()
            if inside is not None:
                return Found(inside, f"{inside.origin}, {how}", (_Held(inside, []),))
        except NotFoundError:
            continue
        except (FormatError, FaultError, MismatchError, UnsupportedError) as error:
            warnings.warn(f"types passed over: {error}", KvmWarning, stacklevel=2)
    return None


def _places(
    image: MachO | None,
    path: str | None,
    kernel: KernelIdentity,
    kernel_path: Sequence[str] | None,
) -> Iterator[tuple[Callable[[], TypeSource | None] | str, str]]:
    """Where types may be, the fullest first, and what to call that; a string is a path.

    DWARF says more than CTF, which leaves out C++ and cuts long enumerations.
    """
    stems = [] if path is None else [path, os.path.splitext(path)[0]]
    for stem in stems:
        if os.path.exists(f"{stem}.dSYM"):  # a bundle, or the file alone
            yield f"{stem}.dSYM", "beside the kernel"
    if image is not None:
        yield partial(_inside, image, path, kernel, dwarf_in), "in the kernel itself"
    for found in _known_dsym(kernel.uuid, kernel_path):
        yield found, "found by the kernel's UUID"
    if image is not None:
        yield partial(_inside, image, path, kernel, ctf_in), "in the kernel itself"
    for name in (f"{stem}{suffix}" for stem in stems for suffix in _BESIDE):
        if os.path.isfile(name):
            yield name, "beside the kernel"


def _inside(
    image: MachO,
    path: str | None,
    kernel: KernelIdentity,
    reader: Callable[[MachO], TypeSource | None],
) -> TypeSource | None:
    """The types that the kernel's Mach-O carries; of a file remembered as those of others are."""
    segment = "__DWARF" if reader is dwarf_in else "__CTF"
    if path is None or all(section.segname != segment for section in image.sections):
        return reader(image)

    def read() -> Read:
        found = reader(image)
        if found is None:
            raise NotFoundError("types", f"in {image.source.name}")
        return Read(found, image.uuid)

    file = FileSource(path)
    try:
        key = _key(file, kernel.arch, kernel.pointer_size)
    finally:
        file.close()
    return _remembered(key and f"{key}{segment}", read).source


def _known_dsym(uuid: bytes | None, kernel_path: Sequence[str] | None) -> Iterator[str]:
    if uuid is None or (kernel_path is None and not os.environ.get(KERNEL_PATH)):
        return
    from kvmtool.kernel_search import find_debug_file

    known = find_debug_file(uuid, kernel_path)
    if known is not None:
        yield known.path


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
