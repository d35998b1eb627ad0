"""Exact types for a kernel: what file holds them, and whether that file is this kernel's.

A file is known by its bytes, never by its name: Mach-O (a kernel, an object file or a dSYM, thin or
fat) with DWARF or CTF in it, bare CTF, Volatility 3's ISF (JSON, also packed), a Volatility 2
profile (zip). Where both kernel and file have an LC_UUID the two must be equal.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnknownFormatError,
    UnsupportedError,
)
from kvmtool.macho import MAGICS, MachO, uuid_text
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.source import Source
    from kvmtool.types.model import TypeSource

ENVIRONMENT = "KVMTOOL_TYPES"

_ENDIAN = {"<": "little-endian", ">": "big-endian"}
_ZIP = b"PK\x03\x04"
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


def open_types(
    path: str,
    kernel: KernelIdentity | None = None,
    force: bool = False,
    how: str = "named by the user",
) -> Found:
    """The types in the file (or dSYM bundle) at `path`, for `kernel` where one is known.

    `how` says why this file, for the user.

    Raises OSError, `UnknownFormatError`, `FormatError`, NotFoundError("types") for a file that may
    hold types but does not, and `MismatchError` for another kernel's unless `force`.
    """
    identity = kernel or KernelIdentity()
    if os.path.isdir(path):
        path = _in_bundle(path, identity)
    held: list[Source] = [FileSource(path)]
    try:
        found = _read(held, identity, force)
        _check_shape(found, kernel, force)
    except BaseException:
        for source in held:
            source.close()
        raise
    return Found(found, f"{found.origin}, {how}", tuple(held))


def _check_shape(found: TypeSource, kernel: KernelIdentity | None, force: bool) -> None:
    shape = found.byteorder, found.pointer_size
    if kernel is None or force or shape == (kernel.byteorder, kernel.pointer_size):
        return
    theirs = f"{8 * found.pointer_size}-bit {_ENDIAN[found.byteorder]}"
    ours = f"{8 * kernel.pointer_size}-bit {_ENDIAN[kernel.byteorder]}"
    raise MismatchError(
        f"{found.origin}: these types are of a {theirs} machine, the kernel is {ours}; "
        "--force uses them all the same"
    )


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
    for place, how in _places(image, path, kernel, kernel_path):
        try:
            if isinstance(place, str):
                return open_types(place, kernel, how=how)
            inside = types_in(place)
            if inside is not None:
                return Found(inside, f"{inside.origin}, {how}")
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
) -> Iterator[tuple[MachO | str, str]]:
    """Where types may be, the fullest first, and what to call that; a string is a path."""
    stems = [] if path is None else [path, os.path.splitext(path)[0]]
    for stem in stems:
        if os.path.isdir(f"{stem}.dSYM"):
            yield f"{stem}.dSYM", "beside the kernel"
    if image is not None:
        yield image, "in the kernel itself"
    for found in _known_dsym(kernel.uuid, kernel_path):
        yield found, "found by the kernel's UUID"
    for name in (f"{stem}{suffix}" for stem in stems for suffix in _BESIDE):
        if os.path.isfile(name):
            yield name, "beside the kernel"


def _known_dsym(uuid: bytes | None, kernel_path: Sequence[str] | None) -> Iterator[str]:
    from kvmtool import kernel_index

    if uuid is None or (kernel_path is None and not os.environ.get(kernel_index.ENVIRONMENT)):
        return
    from kvmtool.kernel_search import find_debug_file

    known = find_debug_file(uuid, kernel_path)
    if known is not None:
        yield known.path


def types_in(image: MachO) -> TypeSource | None:
    """DWARF if the Mach-O has it, else CTF, else None. Raises `FormatError`."""
    segments = {section.segname for section in image.sections}
    found: TypeSource | None = None
    if "__DWARF" in segments:
        from kvmtool.types.dwarf import open_dwarf

        found = open_dwarf(image)
    if found is None and ("__CTF" in segments or image.warnings):
        from kvmtool.types.ctf import ctf_of

        found = ctf_of(image)
    return found


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


def _read(held: list[Source], kernel: KernelIdentity, force: bool) -> TypeSource:
    """The types in the open file `held`, to which other open ones are added."""
    source = held[0]
    head = source.read_at(0, min(16, source.size))
    if head.startswith(_ZIP):
        from kvmtool.types.vtypes import open_profile

        return open_profile(source.name)
    if head[:4] in MAGICS:
        return _in_macho(MachO(source), kernel, force)
    from kvmtool.types.ctf import is_ctf

    if is_ctf(head):
        from kvmtool.types.ctf import open_ctf

        return open_ctf(source, pointer_size=kernel.pointer_size)
    from kvmtool.types.isf import is_isf

    if is_isf(source):
        return _in_isf(source, kernel, force)
    return _in_wrapping(held, kernel, force)


def _in_wrapping(held: list[Source], kernel: KernelIdentity, force: bool) -> TypeSource:
    """A Mach-O in a fat file, or in whatever else `peel` sees through."""
    from kvmtool.kernel_file import open_kernel

    source = held[0]
    try:
        image = open_kernel(source.name, kernel.arch).kernel
    except UnknownFormatError:
        raise
    except FormatError as error:
        if error.offset != 0 or error.source != source.name:
            raise
        head = source.read_at(0, min(4, source.size)).hex() or "nothing"
        what = f"expected a Mach-O, CTF, ISF or a Volatility 2 profile, got {head}"
        raise UnknownFormatError(source.name, 0, what) from error
    held.append(image.source)
    return _in_macho(image, kernel, force)


def _in_macho(image: MachO, kernel: KernelIdentity, force: bool) -> TypeSource:
    name = image.source.name
    if image.uuid and kernel.uuid and image.uuid != kernel.uuid and not force:
        raise MismatchError(
            f"{name} has the types of {uuid_text(image.uuid)}, the kernel is "
            f"{uuid_text(kernel.uuid)}; --force uses them all the same"
        )
    found = types_in(image)
    if found is None:
        raise NotFoundError("types", f"in {name}", hint="it has neither DWARF nor CTF")
    return found


def _in_isf(source: Source, kernel: KernelIdentity, force: bool) -> TypeSource:
    from kvmtool.types.isf import open_isf

    found = open_isf(source.name)
    said = (found.constant("version") or b"").partition(b"\0")[0].decode("utf-8", "replace")
    if said and kernel.banner and said.strip() != kernel.banner.strip() and not force:
        raise MismatchError(
            f"{source.name} has the types of {said.strip()!r}, the kernel is "
            f"{kernel.banner.strip()!r}; --force uses them all the same"
        )
    return found
