"""The policies of the mandatory access control framework (TrustedBSD), each a table of hooks.

Source: security/mac_internal.h (mac_policy_list), security/mac_policy.h (mac_policy_conf,
mac_policy_ops), security/mac_base.c, xnu-1228..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.target import record
from kvmtool.unreadable import Unreadable, guarded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.target import Target

_LIMIT = 1 << 12  # mac_policy_list.max is 512
_NAME = 128  # bytes
_HOOKS = 300  # all of them pointers to functions: 314 in 10.5.8, 335 in 10.8.5 and 10.13.6


@dataclass(frozen=True, slots=True)
class Policy:
    """A loaded policy at `address` (its mac_policy_conf): mpc_name, mpc_fullname, mpc_ops.

    `hooks` maps "mpo_vnode_check_open" and so on to (where the pointer lies, the pointer); where
    the types do not have mac_policy_ops, only those that every release has, by number. Any may be
    `Unreadable`.
    """

    address: int
    name: Any
    full_name: Any
    operations: Any
    hooks: Mapping[str, tuple[int, Any]]


def policies(target: Target) -> Iterator[Policy]:
    """Every policy on mac_policy_list.

    Raises `NotFoundError` for a kernel without that symbol, `FaultError`, and `FormatError` for a
    list longer than any kernel's.
    """
    symbol = target.symbols.get("_mac_policy_list")
    if symbol is None:
        hint = target.symbols.hint or "it may be stripped"
        raise NotFoundError("symbol", "_mac_policy_list", hint=hint)
    types = target.types
    fields = {"loaded": ("I", "numloaded"), "max": ("I", "max"), "entries": ("P", "entries")}
    raw = record(target, "mac_policy_list", fields).read(symbol.address)
    for name in ("loaded", "max", "entries"):
        if isinstance(raw[name], Unreadable):
            raise FaultError("kernel", symbol.address, types.size("mac_policy_list"), "absent")
    if not raw["loaded"] or not raw["entries"]:
        return
    if raw["max"] > _LIMIT:
        what = f"max at {symbol.address:#x} is {raw['max']}, expected at most {_LIMIT}"
        raise FormatError("mac_policy_list", None, what)
    found = 0
    for number in range(raw["max"]):  # a policy that was unloaded leaves a hole
        policy = target.pointer(raw["entries"] + number * target.arch.pointer_size)
        if policy:
            yield _policy(target, policy)
            found += 1
            if found >= raw["loaded"]:
                return


def _policy(target: Target, at: int) -> Policy:
    types = target.types
    fields = record(
        target,
        "mac_policy_conf",
        {
            "name": ("P", "mpc_name"),
            "full": ("P", "mpc_fullname"),
            "operations": ("P", "mpc_ops"),
        },
    )
    raw = fields.read(at)
    operations = raw["operations"]
    known = types.find_struct("mac_policy_ops")
    if known is not None:
        places = {member.name: member.offset for member in known.members.values()}
    else:
        size = target.arch.pointer_size
        places = {f"mpc_ops[{number}]": number * size for number in range(_HOOKS)}
    hooks = {
        name: (operations + offset, _pointer(target, operations + offset))
        for name, offset in places.items()
        if isinstance(operations, int) and operations
    }
    return Policy(at, _text(target, raw["name"]), _text(target, raw["full"]), operations, hooks)


def _text(target: Target, pointer: Any) -> Any:
    if not isinstance(pointer, int):
        return pointer
    return guarded(lambda: target.text(pointer, _NAME)) if pointer else None


def _pointer(target: Target, at: int) -> Any:
    return guarded(lambda: target.pointer(at))
