"""Process states and flags, and the marks ps makes of them.

Source: bsd/sys/proc.h and proc_internal.h, xnu-792..11417; adv_cmds ps, print.c.
"""

from __future__ import annotations

from typing import Any

from kvmtool.unreadable import Unreadable

# bsd/sys/proc.h
SIDL, SRUN, SSLEEP, SSTOP, SZOMB = 1, 2, 3, 4, 5
P_CONTROLT, P_LP64, P_SYSTEM, P_TRACED, P_WEXIT = 0x2, 0x4, 0x200, 0x800, 0x2000
P_PPWAIT = 0x10
# bsd/sys/proc_internal.h, 10.5 on: these moved from p_flag to p_lflag
P_LTRACED, P_LPPWAIT, P_LEXIT = 0x400, 0x2000, 0x8


def marks(address: int, raw: dict[str, Any], session: dict[str, Any]) -> Any:
    """What ps writes behind the state letter (adv_cmds ps, print.c).

    `Unreadable` where something of it is: a mark that is not there says something, too.
    """
    told = (raw["flag"], raw["lflag"], raw["nice"], session["leader"], session["ttypgrpid"])
    odd = next((value for value in told if isinstance(value, Unreadable)), None)
    if odd is not None:
        return odd
    flag, lflag, nice = (value or 0 for value in told[:3])
    if raw["listflag"] is None:  # 10.4 has a p_lflag of other bits, and no p_listflag
        lflag = 0
    marks = "<" if nice < 0 else "N" if nice > 0 else ""
    if flag & P_TRACED or lflag & P_LTRACED:
        marks += "X"
    if flag & P_WEXIT or lflag & P_LEXIT:
        marks += "E"
    if flag & P_PPWAIT or lflag & P_LPPWAIT:
        marks += "V"
    if session["leader"] == address:
        marks += "s"
    if flag & P_CONTROLT and session["ttypgrpid"] is not None:
        marks += "+" if session["ttypgrpid"] == raw["pgrpid"] else ""
    return marks
