"""Whether escape sequences may be written: https://no-color.org and http://bixense.com/clicolors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO


def colored(out: TextIO) -> bool:
    """Whether `out` takes them: a terminal that is not dumb, unless the environment says other.

    NO_COLOR forbids; CLICOLOR_FORCE asks for them in pipes, too; CLICOLOR=0 turns them off.
    """
    environ = os.environ
    if environ.get("NO_COLOR"):
        return False
    if environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return out.isatty() and environ.get("CLICOLOR") != "0" and environ.get("TERM") != "dumb"


def bold(text: str, out: TextIO) -> str:
    """`text` in bold, where `out` takes that."""
    return f"\x1b[1m{text}\x1b[0m" if colored(out) else text
