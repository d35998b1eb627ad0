"""A file that is there when all of it is, or not at all: not even SIGKILL leaves a part of it.

Until it is whole the file has no name at all (O_TMPFILE: Linux, on most of its file systems).
Elsewhere it is a ``.kvmtool-...`` beside the real one, which only SIGKILL leaves behind.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

_DESCRIPTORS = "/proc/self/fd"
# open(2): the kernel, the file system or a network's server has no files without a name
_HAS_NONE = frozenset((errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL))


@contextmanager
def new_file(out: str, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file that gets the name `out` at the end; whatever goes wrong before, nothing stays.

    Raises FileExistsError unless `overwrite`, and always for what is no regular file; OSErrors of
    writing have `out` as their file's name.
    """
    _check_free(out, overwrite)
    hidden = os.path.join(os.path.dirname(out), f".kvmtool-{os.urandom(8).hex()}")
    try:
        with _opened(hidden) as file:
            yield file
        _check_free(out, overwrite)
        os.replace(hidden, out)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(hidden)
        if isinstance(error, OSError) and error.filename == hidden:
            error.filename = out  # the name the user knows
        raise


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A new file, which has the name `path` at the end; OSErrors of ending it name `path`.

    Closing it may fail, but hides no error that came before.
    """
    file = open(path, "xb", opener=_nameless)  # noqa: SIM115  closed below, in two ways
    try:
        yield file
        try:
            file.flush()
            fd = file.fileno()
            if not os.fstat(fd).st_nlink:
                # given a folder's descriptor, Python asks linkat(2), which follows symbolic links
                os.link(f"{_DESCRIPTORS}/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
            file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error  # not what is read
    except BaseException:
        with suppress(OSError):
            file.close()
        raise


def _nameless(path: str, flags: int) -> int:
    """A descriptor of a file without a name beside `path`; of `path` where there are none such."""
    mode, nameless = 0o666, getattr(os, "O_TMPFILE", 0)
    if nameless and os.path.isdir(_DESCRIPTORS):
        access = flags & ~(os.O_CREAT | os.O_EXCL) | nameless
        try:
            return os.open(os.path.dirname(path) or os.curdir, access, mode)
        except OSError as error:
            if error.errno not in _HAS_NONE:
                raise
    return os.open(path, flags, mode)


def _check_free(out: str, overwrite: bool) -> None:
    try:
        status = os.lstat(out)
    except FileNotFoundError:
        return
    if not overwrite or not stat.S_ISREG(status.st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), out)
