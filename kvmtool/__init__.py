"""kvmtool: libkvm for XNU. Read the kernel memory of Mac OS X, live or dead, on any host.

    >>> import kvmtool
    >>> with kvmtool.open("mach_kernel", "core") as kvm:
    ...     kvm.read(kvm.address("_cdevsw"), 4)

Importing this imports nothing else; each name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmtool.errors import (
        FaultError,
        FormatError,
        KvmError,
        KvmWarning,
        MismatchError,
        NotFoundError,
        TruncatedError,
        UnknownFormatError,
        UnsupportedError,
    )
    from kvmtool.kvm import Kvm, open  # noqa: A004
    from kvmtool.symbols import Symbol
    from kvmtool.unreadable import Unreadable

__version__ = "0.1.0"

_HOMES = {
    "FaultError": "errors",
    "FormatError": "errors",
    "KvmError": "errors",
    "KvmWarning": "errors",
    "MismatchError": "errors",
    "NotFoundError": "errors",
    "TruncatedError": "errors",
    "UnknownFormatError": "errors",
    "UnsupportedError": "errors",
    "Kvm": "kvm",
    "open": "kvm",
    "Symbol": "symbols",
    "Unreadable": "unreadable",
}

__all__ = [
    "FaultError",
    "FormatError",
    "Kvm",
    "KvmError",
    "KvmWarning",
    "MismatchError",
    "NotFoundError",
    "Symbol",
    "TruncatedError",
    "UnknownFormatError",
    "Unreadable",
    "UnsupportedError",
    "__version__",
    "open",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvmtool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kvmtool.{home}"), name)
