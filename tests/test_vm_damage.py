"""Memory with pages absent at random: every reader of vm ends, and says what is missing."""

from __future__ import annotations

import random

import pytest

import kvmtool
from kvmtool.errors import FaultError, KvmError
from kvmtool.target import Target
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.cpu import cpus
from kvmtool.xnu.host import host
from kvmtool.xnu.load import load
from kvmtool.xnu.queues import Report
from kvmtool.xnu.vm import vm
from kvmtool.xnu.vmmap import Maps
from kvmtool.xnu.zone import zones
from tests.inputs import oracle, real

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
PAGE = 4096
SEEDS = range(25)


class Holed:
    """A memory without some of its pages, and which of them were asked for."""

    def __init__(self, memory, share, seed):
        self._memory, self._share, self._seed = memory, share, seed
        self.space = memory.space
        self.missed = set()

    def _absent(self, page):
        return random.Random(self._seed * 1_000_003 + page).random() < self._share

    def read(self, address, size):
        for page in range(address // PAGE, (address + max(size, 1) - 1) // PAGE + 1):
            if self._absent(page):
                self.missed.add(page)
                raise FaultError("kernel", max(address, page * PAGE), size, "absent")
        return self._memory.read(address, size)


@pytest.fixture(scope="module")
def kvm():
    with kvmtool.open(real(X86), real("machine/crash.kdp-core")) as opened:
        opened.verified_target()
        yield opened


def holed(kvm, share, seed):
    whole = kvm.verified_target()
    memory = Holed(kvm.memory, share, seed)
    return Target(whole.arch, memory, whole.symbols, whole.types, whole.va_bits)


def looks(target, report):
    """Every reader, each to its end or to its one error."""
    maps = Maps(target, report)
    yield lambda: [host(target)]
    yield lambda: [load(target)]
    yield lambda: [vm(target, report)]
    yield lambda: list(zones(target, report))
    yield lambda: list(cpus(target, report))
    for task in oracle("crash")["tasks"]:
        address = int(task["map"], 16)
        yield lambda address=address: list(
            maps.entries(maps.reader.at(address, "a task"), submaps=True)
        )


def gaps(records):
    """Every `Unreadable` in them."""
    for record in records:
        for name in record.__slots__:
            value = getattr(record, name)
            values = value.values() if isinstance(value, dict) else [value]
            yield from (one for one in values if isinstance(one, Unreadable))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_page_in_a_hundred_is_absent(kvm, seed):
    target, report = holed(kvm, 0.01, seed), Report()
    found, errors = [], []
    for look in looks(target, report):
        try:
            found += look()
        except KvmError as error:
            errors.append(error)
    told = len(list(gaps(found))) + len(report.stops) + len(errors)
    if target.memory.missed:
        assert told, f"{len(target.memory.missed)} pages were missed in silence"
    for gap in gaps(found):
        assert "absent" in gap.reason
    assert len(found) > 100


def test_nothing_is_absent(kvm):
    report = Report()
    found = [record for look in looks(holed(kvm, 0, 0), report) for record in look()]
    assert list(gaps(found)) == report.stops == []
    said = oracle("crash")
    entries = sum(len(entries) for entries in said["vm_maps"].values())
    assert len(found) >= 4 + len(said["zones"]) + entries


@pytest.mark.parametrize("seed", range(3))
def test_half_of_all_pages_are_absent(kvm, seed):
    target, report = holed(kvm, 0.5, seed), Report()
    told = report.stops
    for look in looks(target, report):
        try:
            look()
        except KvmError as error:
            told.append(str(error))
    assert target.memory.missed
    assert told
    assert all(told)
