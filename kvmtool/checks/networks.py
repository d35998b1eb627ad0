"""The functions behind protocols, and the hooks of mandatory access control policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.checks.code import KERNEL
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.policies import policies as loaded
from kvmtool.xnu.protocols import protocols as registered

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case


def protocols(case: Case, outcome: Outcome) -> None:
    """Each function of domain, protosw and pr_usrreqs lies in the code of whose protocol it is.

    A kext's own protocol may use the kernel's functions; the kernel's may not use a kext's.
    """
    target = case.kvm.verified_target()
    judged: set[int] = set()  # protocols share their requests
    for protocol in registered(target, outcome.report):
        where = str(protocol.family)
        if protocol.number is not None:
            where += f" protocol {protocol.number}"
        _judge(case, outcome, where, protocol.functions, _owners(case, protocol.address))
        requests = {
            name: place for name, place in protocol.requests.items() if place[0] not in judged
        }
        judged.update(at for at, _ in requests.values())
        if requests:
            first = next(iter(requests.values()))[0]
            _judge(case, outcome, f"requests of {where}", requests, _owners(case, first))
    if not outcome.looked:
        outcome.absent.append("the kernel has no protocol families")


def _judge(
    case: Case,
    outcome: Outcome,
    where: str,
    functions: Mapping[str, tuple[int, Any]],
    owners: Collection[str] | None,
) -> None:
    for name, (at, pointer) in functions.items():
        case.pointer(outcome, "the protocols", f"{where}: {name}", at, pointer, owners)


def _owners(case: Case, address: int) -> Collection[str] | None:
    """Whose functions a structure may hold: in the heap, anybody's."""
    owner = case.code.owner(address)
    return None if owner is None else {KERNEL, owner}


def policies(case: Case, outcome: Outcome) -> None:
    """Each hook of each policy on mac_policy_list lies in the code of the policy's own kext."""
    found = list(loaded(case.target))
    for policy in found:
        name = policy.name if isinstance(policy.name, str) else f"at {policy.address:#x}"
        if isinstance(policy.operations, Unreadable):
            outcome.cannot_read("policies", policy.operations.reason)
        owner = case.code.owner(policy.address)
        owners = None if owner is None else {KERNEL, owner}
        for hook, (at, pointer) in policy.hooks.items():
            case.pointer(outcome, "the policies", f"policy {name}: {hook}", at, pointer, owners)
    outcome.count("policies", len(found))
    if not found:
        outcome.absent.append("no policy is loaded")
