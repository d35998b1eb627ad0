"""Kernels, dSYMs, kexts and collections in the directories a person names, found by UUID.

What was seen is remembered in the user's cache, one entry per directory: while a file's size and
mtime are what they were, it is not opened again. Files are known by their first four bytes and
never by their names, so thousands of others cost one small read each, once. Only paths that the
user gave are walked; what a dump says of paths is never opened.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmtool import cache, macho, progress
from kvmtool.errors import FormatError, KvmError
from kvmtool.macho import MachO
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmtool.source import Source

ENVIRONMENT = "KVMTOOL_KERNEL_PATH"
KINDS = ("kernel", "dSYM", "kext", "collection")

KERNEL_ENTRY = "com.apple.kernel"

_DEPTH = 24  # folders; a kext's plug-in inside a debug kit has 12
_FILES = 100_000  # per directory named; a debug kit has some thousand
_IMAGES = 64  # in one file: slices of a fat one, or the kernel of a collection
_PROBLEMS = 20  # messages kept
_COMMANDS = 1 << 16  # load commands; a collection has some hundred
_VERSION_LIMIT = 512  # bytes of banner

# an entry of the cache: root and openers; then files, each followed by what is in it
_CACHE = "kernel-index-1"  # another number when other files are known
_LENGTH = struct.Struct("<I")
_FILE = struct.Struct("<qQHB")  # mtime in ns, size, bytes of path, images
_KNOWN = struct.Struct("<BBBH")  # bytes of UUID, kind, bytes of arch, bytes of version


class KnownFile(NamedTuple):
    """A file worth knowing: `kind` is one of KINDS, `arch` as Apple's tools name it.

    `uuid` is the 16 bytes of LC_UUID, or none where a kernel of 10.4 has none; `version` is a
    kernel's banner. A fat file is here once for each of its slices.
    """

    path: str
    uuid: bytes
    arch: str
    kind: str
    version: str | None


class Survey(NamedTuple):
    """What a look through directories found.

    `files` is how many were looked at, `opened` how many of them had to be opened because they
    were new or changed; `unreadable` how many files and folders could not be read, `problems` the
    first of the reasons; `stopped` says which limit ended the walk, if one did.
    """

    known: list[KnownFile]
    files: int
    opened: int
    unreadable: int
    problems: list[str]
    stopped: str | None


class Opener(Protocol):
    """Something that sees the Mach-O images in a file that is none itself: fat, compressed.

    `name` is part of what is remembered: another set of openers is another index.
    """

    name: str

    def wants(self, head: bytes) -> bool:
        """Whether a file that begins with these four bytes (or fewer) may be for it."""
        ...

    def images(self, source: Source) -> Iterable[Source]:
        """The thin Mach-O files inside; raises `KvmError`. The caller closes `source`."""
        ...


class _Seen(NamedTuple):
    """A file as it was when it was looked at."""

    mtime: int
    size: int
    known: tuple[KnownFile, ...]


def search_path(option: Sequence[str] | None) -> list[str]:
    """The directories to look in: those of the option, else of $KVMTOOL_KERNEL_PATH.

    Each may itself be a list as PATH is; empty and repeated ones are left out.
    """
    named = [os.environ.get(ENVIRONMENT, "")] if option is None else option
    parts = (os.path.expanduser(part) for text in named for part in text.split(os.pathsep) if part)
    return list(dict.fromkeys(parts))


def index(paths: Sequence[str], openers: Sequence[Opener] = ()) -> list[KnownFile]:
    """Everything known in `paths` (directories or files), as it stands now; see `survey`."""
    return survey(paths, openers).known


def find(
    uuid: bytes, paths: Sequence[str], kind: str = "kernel", openers: Sequence[Opener] = ()
) -> KnownFile | None:
    """The first file of that UUID and kind in `paths`, or None.

    One that is remembered and has not changed is given without looking any further.
    """
    if len(uuid) != 16:
        return None
    for root in map(os.path.abspath, paths):
        for path, seen in _recall(root, openers, uuid).items():
            for known in seen.known:
                if (known.uuid, known.kind) == (uuid, kind) and _is_as(path, seen):
                    return known
        for known in index([root], openers):
            if (known.uuid, known.kind) == (uuid, kind):
                return known
    return None


def survey(paths: Sequence[str], openers: Sequence[Opener] = ()) -> Survey:
    """Look through `paths`, opening what is new or changed; remembers all of it.

    Links are followed, but no folder and no file is visited twice. Never raises for what it finds
    there: what cannot be read or is damaged is counted, with the first reasons.
    """
    walk = _Walk(openers)
    for root in map(os.path.abspath, paths):
        walk.root(root)
    progress.end("looking for kernels")
    return Survey(walk.known, walk.files, walk.opened, walk.unreadable, walk.problems, walk.stopped)


class _Walk:
    def __init__(self, openers: Sequence[Opener]) -> None:
        self.openers = openers
        self.known: list[KnownFile] = []
        self.files = self.opened = self.unreadable = 0
        self.problems: list[str] = []
        self.stopped: str | None = None
        self._visited: set[tuple[int, int]] = set()  # st_dev, st_ino

    def root(self, root: str) -> None:
        """One directory, or file, that the user named."""
        before = _recall(root, self.openers)
        after: dict[str, _Seen] = {}
        for path, status in self._regular_files(root):
            self.files += 1
            progress.step("looking for kernels", self.files, 0, "files")
            found = before.get(path)
            if found is None or (found.mtime, found.size) != (status.st_mtime_ns, status.st_size):
                known = self._look(path)
                if known is None:  # perhaps it can be read the next time
                    continue
                found = _Seen(status.st_mtime_ns, status.st_size, known)
            after[path] = found
            self.known += found.known
        if after != before:
            _remember(root, self.openers, after)

    def _regular_files(self, root: str) -> Iterator[tuple[str, os.stat_result]]:
        """Every regular file at or below `root`, in the order of their names."""
        waiting = [(root, 0)]
        left = _FILES
        while waiting:
            path, depth = waiting.pop()
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in self._visited:
                    continue
                self._visited.add((status.st_dev, status.st_ino))
                if stat.S_ISDIR(status.st_mode):
                    below = self._entries(path, depth, left)
                    left -= len(below)
                    waiting += [(one, depth + 1) for one in below]
            except OSError as error:
                self._problem(error)
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status

    def _entries(self, folder: str, depth: int, left: int) -> list[str]:
        """Up to `left` of the paths in `folder`, the last first; none beyond the depth."""
        if depth >= _DEPTH:
            self.stopped = f"{folder} lies {depth} folders deep: not looked into"
            return []
        with os.scandir(folder) as entries:
            below = [entry.path for entry in itertools.islice(entries, left + 1)]
        if len(below) > left:
            self.stopped = f"more than {_FILES} files: some in {folder} were not looked at"
            below.pop()
        return sorted(below, reverse=True)

    def _look(self, path: str) -> tuple[KnownFile, ...] | None:
        """What the file is; None (and a problem noted) if it cannot be read or is damaged."""
        self.opened += 1
        try:
            head = _head(path)
            opener = next((one for one in self.openers if one.wants(head)), None)
            if head not in macho.MAGICS and opener is None:
                return ()
            source = FileSource(path)
            try:
                if head in macho.MAGICS or opener is None:
                    return tuple(_identify(source, path))
                images = opener.images(source)
                found = (known for image in images for known in _identify(image, path))
                return tuple(itertools.islice(found, _IMAGES))
            finally:
                source.close()
        except (OSError, KvmError) as error:
            self._problem(error)
            return None

    def _problem(self, error: Exception) -> None:
        self.unreadable += 1
        if len(self.problems) < _PROBLEMS:
            self.problems.append(str(error))


def _head(path: str) -> bytes:
    # O_NONBLOCK: should a FIFO have taken the file's place, it is not waited for
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = os.open(path, flags)
    try:
        return os.read(fd, 4)
    finally:
        os.close(fd)


# what a file is


def _identify(source: Source, path: str) -> Iterator[KnownFile]:
    """What a thin Mach-O is to us, if anything; of a collection also the kernel inside."""
    image = MachO(source)
    if image.ncmds > _COMMANDS:
        message = f"ncmds {image.ncmds:#x}, expected at most {_COMMANDS:#x}"
        raise FormatError(source.name, 16, message)
    kind = _kind(image)
    if kind in ("kernel", "kext") or (kind is not None and image.uuid is not None):
        yield _known(image, path, kind)
    if kind == "collection":
        from kvmtool.fileset import entry_image, fileset_entries

        for entry in fileset_entries(image):
            if entry.identifier == KERNEL_ENTRY:
                yield _known(entry_image(image, entry), path, "kernel")


def _kind(image: MachO) -> str | None:
    if image.filetype == macho.MH_EXECUTE:
        # lldb also asks for MH_DYLDLINK to be clear (ObjectFileMachO.cpp), but builds of Apple's
        # source by newer linkers have it set
        return "kernel" if image.segment("__KLD") is not None else None
    if image.filetype == macho.MH_OBJECT:
        found = image.symtab.find("_kmod_info") if image.symtab is not None else []
        return "kext" if any(entry.defined for entry in found) else None
    return {
        macho.MH_FILESET: "collection",
        macho.MH_DSYM: "dSYM",
        macho.MH_KEXT_BUNDLE: "kext",
    }.get(image.filetype)


def _known(image: MachO, path: str, kind: str) -> KnownFile:
    arch = macho.arch_name(image.cputype, image.cpusubtype)
    version = _banner(image) if kind == "kernel" else None
    return KnownFile(path, image.uuid or b"", arch, kind, version)


def _banner(image: MachO) -> str | None:
    """The text of `version`, searched in the segments: a stripped kernel has no such symbol."""
    from kvmtool.boot import BANNER

    source = image.source
    for segment in image.segments:
        end = min(segment.fileoff + segment.filesize, source.size)
        at = source.find(BANNER, segment.fileoff, end)
        if at >= 0:
            text = source.read_at(at, min(_VERSION_LIMIT, end - at)).split(b"\0", 1)[0]
            return text.decode("utf-8", "backslashreplace").rstrip()
    return None


# what is remembered


def _is_as(path: str, seen: _Seen) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    same = (status.st_mtime_ns, status.st_size) == (seen.mtime, seen.size)
    return same and stat.S_ISREG(status.st_mode)


def _key(root: str, openers: Sequence[Opener]) -> tuple[str, bytes]:
    """The entry's name in the cache, and what it must begin with: names may fall together."""
    about = b"\0".join([os.fsencode(root), *(one.name.encode() for one in openers)])
    return f"{zlib.crc32(about):08x}", _LENGTH.pack(len(about)) + about


def _remember(root: str, openers: Sequence[Opener], files: dict[str, _Seen]) -> None:
    key, begin = _key(root, openers)
    parts = [begin]
    for path, seen in files.items():
        name = os.fsencode(path)
        parts += (_FILE.pack(seen.mtime, seen.size, len(name), len(seen.known)), name)
        for known in seen.known:
            arch, version = known.arch.encode(), (known.version or "").encode()
            kind = KINDS.index(known.kind)
            parts.append(_KNOWN.pack(len(known.uuid), kind, len(arch), len(version)))
            parts += (known.uuid, arch, version)
    cache.store(_CACHE, key, b"".join(parts))


def _recall(root: str, openers: Sequence[Opener], uuid: bytes = b"") -> dict[str, _Seen]:
    """The files below `root` as they were; none if nothing is remembered, or not that UUID."""
    key, begin = _key(root, openers)
    payload = cache.load(_CACHE, key)
    if payload is None or not payload.startswith(begin) or uuid not in payload:
        return {}
    try:
        return dict(_parse(payload, len(begin)))
    except (struct.error, IndexError, UnicodeDecodeError):
        return {}


def _parse(payload: bytes, at: int) -> Iterator[tuple[str, _Seen]]:
    while at < len(payload):
        mtime, size, length, count = _FILE.unpack_from(payload, at)
        at += _FILE.size + length
        path = os.fsdecode(payload[at - length : at])
        known = []
        for _ in range(count):
            uuid, kind, arch, version = _KNOWN.unpack_from(payload, at)
            at += _KNOWN.size
            ends = list(itertools.accumulate((uuid, arch, version), initial=at))
            first, second, third = (payload[i:j] for i, j in itertools.pairwise(ends))
            at = ends[-1]
            text = third.decode() or None
            known.append(KnownFile(path, first, second.decode(), KINDS[kind], text))
        if at > len(payload):
            raise IndexError("the index ends early")
        yield path, _Seen(mtime, size, tuple(known))
