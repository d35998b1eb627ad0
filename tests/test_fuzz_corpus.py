"""What fuzzing found, once more; and half a minute of it, the same inputs every time."""

from __future__ import annotations

import os
import time

import pytest

from kvmtool.errors import FormatError, KvmError
from tests.fuzz import seeds
from tests.fuzz.judge import SECONDS, judge
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS
from tests.inputs import ROOT

BUDGET = float(os.environ.get("KVMTOOL_FUZZ_SECONDS", "30"))  # of CPU, for all targets together
FOUND = os.path.join(ROOT, "tests", "data", "fuzz")  # TARGET/what it was


def found() -> list[tuple[str, str]]:
    return [(t, name) for t in sorted(os.listdir(FOUND)) for name in os.listdir(f"{FOUND}/{t}")]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """An input is new each time: nothing about it is worth remembering."""
    monkeypatch.setenv("KVMTOOL_CACHE", "")


@pytest.mark.parametrize(("target", "name"), found())
def test_what_was_found_once(target, name) -> None:
    with open(os.path.join(FOUND, target, name), "rb") as file:
        assert judge(TARGETS[target].run, file.read()) is None


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_of_it(target) -> None:
    """The numbers of the inputs are their seeds: one that fails can be had again."""
    corpus = list(getattr(seeds, TARGETS[target].seeds)())
    assert corpus
    for data in corpus:
        assert judge(TARGETS[target].run, data) is None
    end = time.process_time() + BUDGET / len(TARGETS)
    number = 0
    while time.process_time() < end:
        data = mutated(corpus[number % len(corpus)], number)
        told = judge(TARGETS[target].run, data)
        assert told is None, f"input {number}: {told}"
        number += 1
    assert number > 1


def test_the_same_seed_is_the_same_input() -> None:
    data = bytes(range(256))
    assert mutated(data, 5) == mutated(data, 5)
    assert len({mutated(data, seed) for seed in range(100)}) > 90
    assert mutated(b"", 1) == b""


# the judge


def _raises(error: BaseException):
    def run(_data: bytes) -> None:
        raise error

    return run


class _TwoLines(KvmError):
    def __str__(self) -> str:
        return "one\ntwo"


def _spins(_data: bytes) -> None:
    end = time.process_time() + SECONDS + 0.2
    while time.process_time() < end:
        pass


def test_what_is_a_finding() -> None:
    assert judge(_raises(FormatError("file", 0, "expected 1, got 2")), b"") is None
    assert judge(lambda _data: None, b"") is None
    assert judge(_raises(KvmError("a name\nof two lines")), b"") is None  # it escapes them
    two = judge(_raises(_TwoLines()), b"")
    assert two is not None
    assert two.kind == "two lines"
    bare = judge(_raises(ValueError("x")), b"")
    assert bare is not None
    assert (bare.kind, bare.text.splitlines()[-1]) == ("ValueError", "ValueError: x")
    slow = judge(_spins, b"")
    assert slow is not None
    assert slow.kind == "slow"


def test_large_is_a_finding(monkeypatch) -> None:
    monkeypatch.setattr("tests.fuzz.judge._peak", iter((0, 800 << 20)).__next__)
    grown = judge(lambda _data: None, b"")
    assert grown is not None
    assert (grown.kind, grown.text) == ("memory", "800 MiB")
