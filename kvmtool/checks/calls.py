"""The system call table and the Mach trap table: every handler is the kernel's own, by its name.

Source: bsd/kern/syscalls.master, makesyscalls.sh (what syscallnames holds), osfmk/kern/syscall_sw.c
(mach_trap_table, mach_syscall_name_table), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.checks.finding import MEDIUM, OTHER
from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.target import Target
    from kvmtool.xnu.syscalls import Call

# what answers a number that this kernel does not implement, whatever its name
_NOTHING = ("_nosys", "_enosys", "_nullsys", "_kern_invalid")
# traps that have had the same name and number from 10.4 on, or none: osfmk/kern/syscall_sw.c of
# xnu-792, 1228, 2422, 4903 and 11417
_TRAPS = {
    14: "_kernelrpc_mach_vm_protect_trap",
    16: "_kernelrpc_mach_port_allocate_trap",
    18: "_kernelrpc_mach_port_deallocate_trap",
    19: "_kernelrpc_mach_port_mod_refs_trap",
    20: "_kernelrpc_mach_port_move_member_trap",
    21: "_kernelrpc_mach_port_insert_right_trap",
    26: "mach_reply_port",
    27: "thread_self_trap",
    28: "task_self_trap",
    29: "host_self_trap",
    31: "mach_msg_trap",
    32: "mach_msg_overwrite_trap",
    33: "semaphore_signal_trap",
    34: "semaphore_signal_all_trap",
    35: "semaphore_signal_thread_trap",
    36: "semaphore_wait_trap",
    37: "semaphore_wait_signal_trap",
    38: "semaphore_timedwait_trap",
    39: "semaphore_timedwait_signal_trap",
    45: "task_for_pid",
    46: "pid_for_task",
    48: "macx_swapon",
    49: "macx_swapoff",
    59: "swtch_pri",
    60: "swtch",
    61: "thread_switch",
    62: "clock_sleep_trap",
}


def syscalls(case: Case, outcome: Outcome) -> None:
    """Each handler and munger of sysent lies in the kernel, each handler is what its name says."""
    if not _there(case, outcome, "_nsysent"):
        return
    for call in case.kvm.syscalls():
        name = call.name if isinstance(call.name, str) else None
        where = f"sysent[{call.number}]" + (f" ({name})" if name else "")
        _judge(case, outcome, "sysent", where, call, name)


def traps(case: Case, outcome: Outcome) -> None:
    """Each handler and munger of mach_trap_table lies in the kernel, those of known name fit it."""
    if not _there(case, outcome, "_mach_trap_count"):
        return
    names = dict(_trap_names(case.target)) or _TRAPS
    for call in case.kvm.traps():
        name = names.get(call.number)
        where = f"mach_trap_table[{call.number}]" + (f" ({name})" if name else "")
        _judge(case, outcome, "mach_trap_table", where, call, name)


def _there(case: Case, outcome: Outcome, count: str) -> bool:
    """Whether the table has entries: a dump made for another purpose may hold zeros there."""
    symbol = case.target.symbols.get(count)
    if symbol is None or case.target.integer(symbol.address) != 0:
        return True
    outcome.absent.append(f"{count} at {symbol.address:#x} is 0")
    return False


def _judge(
    case: Case,
    outcome: Outcome,
    table: str,
    where: str,
    call: Call,
    name: str | None,
) -> None:
    fine = case.pointer(outcome, table, where, call.handler_at, call.handler)
    if fine and name is not None and isinstance(call.handler, int) and call.handler:
        _compare_name(case, outcome, where, call.handler_at, call.handler, name)
    case.pointer(outcome, table, f"{where} munger", call.munge_at, call.munge)


def _compare_name(
    case: Case, outcome: Outcome, where: str, at: int, handler: int, name: str
) -> None:
    found = case.kvm.code_at(handler)
    if found.offset or found.symbol is None or found.symbol in _NOTHING:
        return
    # number 0 is the indirect call, and "#8" one that is no more; xnu-7195 (11) on: sys_dup
    wanted = _NOTHING if name.startswith("#") or name == "syscall" else (f"_{name}", f"_sys_{name}")
    if found.symbol in wanted:
        return
    symbols = case.kvm.symbols
    known = [symbol for each in wanted if (symbol := symbols.get(each)) is not None]
    if any(symbol.address == handler for symbol in known):
        return  # one function with two names
    if known or wanted is _NOTHING:
        evidence = f"{where} leads to {found}, not to the function of its name"
        outcome.add(OTHER, MEDIUM, where, at, found, wanted[0], evidence)


def _trap_names(target: Target) -> Iterator[tuple[int, str]]:
    """The names the kernel itself keeps of its traps (xnu-3789, 10.12 on)."""
    table, count = (
        target.symbols.get(name) for name in ("_mach_syscall_name_table", "_mach_trap_count")
    )
    if table is None or count is None:
        return
    try:
        for number in range(min(max(target.integer(count.address), 0), 1 << 10)):
            at: Any = target.pointer(table.address + number * target.arch.pointer_size)
            if at and (name := target.text(at, 128)) and name != "kern_invalid":
                yield number, name
    except FaultError:
        return
