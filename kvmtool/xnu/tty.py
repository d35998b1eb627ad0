"""Terminals: the name of a session's tty.

Source: bsd/kern/tty_ptmx.c and tty_pty.c (majors), bsd/dev/i386/conf.c, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from kvmtool.target import Target

NODEV = -1
_CONSOLE, _PTY, _PTMX = 0, 4, 16  # majors of /dev/console, /dev/tty[p-w][0-f], /dev/ttys000
_BANKS = "pqrstuvw"


def major(dev: int) -> int:
    """Major number of a dev_t (bsd/sys/types.h)."""
    return dev >> 24 & 0xFF


def minor(dev: int) -> int:
    """Minor number of a dev_t (bsd/sys/types.h)."""
    return dev & 0xFFFFFF


def device_name(dev: int) -> str:
    """The path a terminal's dev_t has in /dev; its numbers where the major is no terminal's."""
    kind, unit = major(dev), minor(dev)
    if kind == _CONSOLE and unit == 0:
        return "/dev/console"
    if kind == _PTMX:
        return f"/dev/ttys{unit:03d}"
    if kind == _PTY and unit < len(_BANKS) * 16:
        return f"/dev/tty{_BANKS[unit >> 4]}{unit & 15:x}"
    return f"({kind},{unit})"


def tty_name(target: Target, ttyp: Any, ttyvp: Any) -> tuple[Any, Any]:
    """(path, dev_t) of a session's terminal: (None, None) without one.

    `ttyp` and `ttyvp` are s_ttyp and s_ttyvp. The name is the one its vnode has, else the one its
    device numbers say.
    """
    for pointer in (ttyp, ttyvp):
        if isinstance(pointer, Unreadable):
            return pointer, pointer
    if not ttyp:
        return None, None
    at = offset_of(target.types, "tty", "t_dev")
    if at is None:
        return None, None
    try:
        dev = target.integer(ttyp + at)
    except FaultError as fault:
        lost = Unreadable.of(fault)
        return lost, lost
    return _vnode_name(target, ttyvp) or device_name(dev), dev


def _vnode_name(target: Target, vnode: int | None) -> str | None:
    at = offset_of(target.types, "vnode", "v_name")
    if not vnode or at is None:
        return None
    try:
        name = target.pointer(vnode + at)
        return f"/dev/{target.text(name, 64)}" if name else None
    except FaultError:
        return None  # the device numbers say the same
