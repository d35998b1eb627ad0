"""`Devices` as a mounted directory, through libfuse by mfusepy (the extra `kvmtool[mount]`).

What a reader is to know:

* Reads go to us as they are asked for (direct_io: no page cache, no rounding to pages, no read
  ahead), but the kernel hands over at most 256 pages of the reader's buffer at a time (libfuse 2:
  32), 1 MiB if the buffer begins on a page. Each such part is answered whole or not at all. A
  longer read that meets a hole in a later part ends before that part, and the next one is EFAULT.
* A mapping (mmap) of a file goes through the page cache: it sees whole pages, a hole is SIGBUS.
* Who may read is decided by the mode, 0440 and ours, also with `allow_other`.

The mount never outlives us. Signals end it; a shell that waits for our end takes the mount away
when we are killed; and a `PreadSource` makes the cutting of a mounted dump an EIO instead of a
SIGBUS. One request is served at a time: nothing below is made for more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from kvmtool.devices import DIRECTORY_MODE, FILE_MODE, Devices
from kvmtool.errors import KvmError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.devices import Exposed

_HINT = "pip install 'kvmtool[mount]', and the system's FUSE: apt-get install fuse3"
_HELPERS = {2: "fusermount", 3: "fusermount3"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_BUFFERS = 16 << 20
_LOOP_ENDED = 8  # fuse_main's status when a signal ends it (libfuse 3: lib/helper.c)


def mount(
    kernel: Exposed,
    directory: str,
    *,
    foreground: bool = True,
    allow_other: bool = False,
    ready: Callable[[], None] | None = None,
    on_error: Callable[[str], None] | None = None,
) -> None:
    """Serve `kernel` in `directory` until it is unmounted or a signal (INT, TERM, HUP) comes.

    In the foreground it returns then; otherwise the process goes on in the background and the
    caller's ends with status 0. `ready` is called when the files are there; `on_error` gets what
    lies behind an EIO, each kind once. `allow_other` lets other users try (root may always).

    Threads do not follow into the background, so there must be none (rapidgzip has some).

    Raises `UnsupportedError` when FUSE is missing, `KvmError` when the mount fails.
    """
    library = _library()
    take_away = _check(directory, library.fuse_version_major)
    if not foreground and _threads() > 1:
        raise UnsupportedError(
            "other threads are running, which a process in the background would lose: "
            "mount in the foreground (with & behind the command, or setsid before it)"
        )
    _keep_buffers()
    errors = _LibraryErrors(back=foreground)

    def begun() -> None:
        errors.restore()
        if ready is not None:
            ready()

    files = _Files(Devices(kernel, on_error), begun)
    path = os.path.realpath(directory)
    watch = _Watch([*take_away, path])
    try:
        errors.capture()
        library.FUSE(
            files,
            path,
            foreground=foreground,
            nothreads=True,
            direct_io=True,
            default_permissions=True,
            allow_other=allow_other,
            fsname="kvmtool",
        )
    except RuntimeError as error:
        # mounted and served: it was a signal that ended the loop
        if not (files.begun and error.args == (_LOOP_ENDED,)):
            why = errors.text() or f"libfuse ended with status {error}"
            raise KvmError(f"{directory}: cannot mount: {why}") from error
    finally:
        watch.end()
        errors.close()


def _library() -> Any:
    try:
        import mfusepy  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise UnsupportedError(f"mounting needs mfusepy: {_HINT}") from error
    except (OSError, AttributeError) as error:  # no libfuse, or none that mfusepy knows
        raise UnsupportedError(f"mounting needs libfuse ({error}): {_HINT}") from error
    return mfusepy


def _check(directory: str, version: int) -> list[str]:
    """What libfuse would say less clearly, or after the fact; returns the command to unmount."""
    try:
        is_directory = stat.S_ISDIR(os.stat(directory).st_mode)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise KvmError(f"{directory}: a dead mount is there: fusermount3 -u it") from error
        raise KvmError(f"{directory}: {error.strerror}, expected a directory") from error
    if not is_directory:
        raise KvmError(f"{directory}: is a file, expected a directory to mount on")
    if os.path.ismount(directory):
        raise KvmError(f"{directory}: something is mounted there already")
    if sys.platform != "linux":
        return ["umount", "-f"]
    if not os.path.exists("/dev/fuse"):
        raise UnsupportedError("there is no /dev/fuse: modprobe fuse; a container needs it passed")
    helper = _HELPERS.get(version, "fusermount3")
    if shutil.which(helper) is None:  # without it a kill -9 would leave a dead mount
        raise UnsupportedError(f"mounting needs {helper}: {_HINT}")
    return [helper, "-u", "-z", "-q", "--"]


class _Watch:
    """A shell that waits for our end, and takes the mount away unless that end was announced.

    libfuse's own auto_unmount does so only for root and with allow_other.
    """

    def __init__(self, command: list[str]) -> None:
        ours, self._pipe = os.pipe()
        script = 'trap "" HUP INT TERM; read -r word && exit; exec "$@"'
        self._shell = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", script, "sh", *command],
            stdin=ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours)

    def end(self) -> None:
        """Announce a clean end: the directory may be another's from now on."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the shell
            os.write(self._pipe, b"end\n")
        os.close(self._pipe)
        self._shell.wait()


def _threads() -> int:
    """Threads of this process, not only Python's, where the system shows them."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _keep_buffers() -> None:
    """Let glibc keep freed buffers of a read's size: to map and fault them anew costs 3/4 of it."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BUFFERS)
        mallopt(_M_TRIM_THRESHOLD, 4 * _BUFFERS)


class _Files:
    """What mfusepy calls; an operation that is not here is one the file system does not have."""

    use_ns = True

    def __init__(self, devices: Devices, begun: Callable[[], None]) -> None:
        self._devices, self._begun = devices, begun
        self._since = time.time_ns()
        self.begun = False

    def init(self, path: str) -> None:
        self.begun = True
        self._begun()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path == "/":
            shape = {"st_mode": DIRECTORY_MODE, "st_nlink": 2}
        else:
            size = self._devices.size(path[1:])
            shape = {"st_mode": FILE_MODE, "st_nlink": 1, "st_size": size}
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._since)
        return {**shape, **times, "st_uid": os.getuid(), "st_gid": os.getgid()}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *self._devices.names]

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._devices.read(path[1:], size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return self._devices.write(path[1:], data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        return self._devices.write(path[1:], b"", length)

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        return self._devices.xattr(path[1:], name)


class _LibraryErrors:
    """What libfuse and its helper print on stderr while mounting: for our own error message."""

    def __init__(self, back: bool) -> None:
        """`back`: whether `restore` gives the process its stderr back, or leaves it none."""
        self._back = back
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._saved: int | None = None

    def capture(self) -> None:
        sys.stderr.flush()
        self._saved = os.dup(2)
        os.dup2(self._file.fileno(), 2)

    def restore(self) -> None:
        if self._saved is not None:
            if self._back:
                os.dup2(self._saved, 2)
            os.close(self._saved)
            self._saved = None

    def close(self) -> None:
        self.restore()
        self._file.close()

    def text(self) -> str:
        self._file.seek(0)
        return self._file.read(4096).decode("utf-8", "replace").strip().replace("\n", "; ")
