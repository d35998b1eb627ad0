"""Kext files beside the kernel's: whose symbols they are, told by UUID, else by what they say.

A kernel gives back a kext's symbols once it has started it, so a dump seldom has them. A file in
the kernel's own directory is that kext when both have the same UUID; when no UUID of the kext's is
known, when its identifier and version are the loaded kext's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import KvmError
from kvmtool.kernel_file import open_kernel
from kvmtool.kext_file import LoadedKext, load_kext
from kvmtool.kexts import from_file
from kvmtool.peel import fat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.kexts import Kext
    from kvmtool.macho import MachO

_FILES = 512  # of one directory that are looked at
_SIZE = 1 << 26  # bytes; no kext's executable comes near
_FAT = (fat.FAT_MAGIC, fat.FAT_MAGIC_64)


class KextFile(NamedTuple):
    """A kext's file: what it says it is."""

    image: MachO
    identifier: str
    version: str | None
    uuid: bytes | None

    def is_of(self, kext: Kext) -> bool:
        """Whether `kext`, which lies in memory, was loaded from this file."""
        if kext.uuid is not None:  # it comes from the file: one without is another build
            return self.uuid == kext.uuid
        return (self.identifier, self.version) == (kext.identifier, kext.version)


def files_in(directory: str, arch: str) -> Iterator[KextFile]:
    """The kexts for `arch` among the files of `directory`, its subdirectories left alone.

    What cannot be opened is no kext; a damaged file is passed over.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names[:_FILES]:
        path = os.path.join(directory, name)
        if not _may_be_one(path):
            continue
        try:
            image = open_kernel(path, arch).image
            if image.filetype not in (macho.MH_OBJECT, macho.MH_KEXT_BUNDLE):
                continue
            said = LoadedKext(image, 0, None).identity
        except (KvmError, OSError):
            continue
        yield KextFile(image, said.identifier, said.version, image.uuid)


def _may_be_one(path: str) -> bool:
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _SIZE:
            return False
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head in macho.MAGICS or head in _FAT


def with_files(
    loaded: Iterable[Kext], directory: str, arch: str, resolve: Callable[[str], int | None]
) -> Iterator[Kext]:
    """The `loaded` kexts, those without symbols with their own file's where it is in `directory`.

    Whoever takes them closes the sources of their images.
    """
    bare = []
    for kext in loaded:
        if len(kext.symbols):
            yield kext
        else:
            bare.append(kext)
    files = list(files_in(directory, arch)) if bare else []
    taken = set()
    for kext in bare:
        found = next((file for file in files if file.is_of(kext)), None)
        if found is None:
            yield kext
            continue
        taken.add(id(found))
        lying = from_file(load_kext(found.image, kext.address, resolve))
        yield lying._replace(identifier=kext.identifier, version=kext.version)
    for file in files:
        if id(file) not in taken:
            file.image.source.close()
