"""Loaded kexts, as kextstat(8) lists them: the kmod list, and from 10.7 on the kext summaries.

Source: osfmk/mach/kmod.h (kmod_info, kmod_reference), libkern/c++/OSKext.cpp and
libkern/libkern/OSKextLibPrivate.h (OSKextLoadedKextSummary, whose entry_size tells the era),
xnu-792..11417. kmod_info is packed to 4 bytes on LP64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import Record, record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import text_of
from kvmtool.xnu.queues import Difference, Report, walk_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

KMOD_MAX_NAME = 64
_LIMIT = 1 << 13  # kexts; a Mac loads some hundred
_SUMMARY = "OSKextLoadedKextSummary"
_HEADER = "OSKextLoadedKextSummaryHeader"
_STAGES = {1: "d", 3: "a", 5: "b", 7: "fc", 9: ""}  # OSKextVersionGetString()


@dataclass(frozen=True, slots=True)
class KextInfo:
    """One loaded kext. Any field may be `Unreadable`; None says its list does not keep it.

    `index` is the load tag; `address` that of its Mach-O header, `size` bytes, `wired` without the
    header's pages; `linked` the indices of the kexts it uses; `lists` where it stands: "kmod",
    "summaries". `kmod` is the address of its kmod_info. `text` is (address, size) of its code
    where that lies apart (from macOS 11 on).
    """

    index: Any
    refs: Any
    address: Any
    size: Any
    wired: Any
    name: Any
    version: Any
    uuid: Any
    linked: Any
    kmod: Any
    start: Any
    stop: Any
    flags: Any
    text: Any
    lists: tuple[str, ...]

    def holds(self, address: int) -> bool:
        """Whether `address` lies in the kext or in its code."""
        spans = [(self.address, self.size)]
        if isinstance(self.text, tuple):
            spans.append(self.text)
        return any(
            isinstance(start, int) and isinstance(size, int) and start <= address < start + size
            for start, size in spans
        )


def version_string(number: int) -> str:
    """The version that a summary keeps as a number: 301035001 is "3.1.3b1"."""
    major, rest = divmod(number, 100_000_000)
    minor, rest = divmod(rest, 1_000_000)
    revision, rest = divmod(rest, 10_000)
    stage, level = divmod(rest, 1000)
    text = f"{major}.{minor}" + (f".{revision}" if revision else "")
    letter = _STAGES.get(stage, f"?{stage}.")
    return f"{text}{letter}{level}" if letter else text


def kexts(target: Target, report: Report | None = None) -> list[KextInfo]:
    """Every loaded kext, last loaded first, then those only the summaries know.

    Where a walk stopped goes into the report's `stops`, where the lists differ into its `notes`. A
    list that was cut short misses nobody: what it would have said is `Unreadable` then.
    """
    report = report if report is not None else Report()
    chained = list(_kmods(target, report))
    cut = report.stops[0] if report.stops else None
    stops = len(report.stops)
    summed = list(_summaries(target, report))
    whole = len(report.stops) == stops
    if not summed and whole:
        return chained
    merged = []
    for kext in chained:
        summary = _same(kext, summed)
        if summary is None:
            if whole and isinstance(kext.name, str):
                report.differ(_alone(kext, "kmod list", "kext summaries"))
            merged.append(kext if whole else _lost(kext, _SUMMARY_FIELDS, report.stops[-1]))
            continue
        summed.remove(summary)
        for text in _differences(kext, summary):
            report.differ(Difference(str(kext.name), kext.kmod, ("kmod", "summaries"), (), text))
        merged.append(_merged(kext, summary))
    for summary in summed:
        if cut is None and isinstance(summary.name, str):
            report.differ(_alone(summary, "kext summaries", "kmod list"))
        merged.append(summary if cut is None else _lost(summary, _KMOD_FIELDS, cut))
    return merged


def _same(kext: KextInfo, summed: list[KextInfo]) -> KextInfo | None:
    """The summary of that kext: by its name, else by where its kmod_info lies."""
    if isinstance(kext.name, str):
        return next((summary for summary in summed if summary.name == kext.name), None)
    at = kext.kmod
    return next((summary for summary in summed if at is not None and summary.holds(at)), None)


_KMOD_FIELDS = ("refs", "wired", "linked", "kmod", "start", "stop")
_SUMMARY_FIELDS = ("uuid", "flags", "text")


def _lost(kext: KextInfo, fields: tuple[str, ...], why: str) -> KextInfo:
    """A kext whose other list was cut short: what that would have said of it is not known."""
    lost: dict[str, Any] = dict.fromkeys(fields, Unreadable(why))
    return replace(kext, **lost)


def _alone(kext: KextInfo, on: str, missing: str) -> Difference:
    """A kext that only one of the two lists has."""
    address = kext.address if isinstance(kext.address, int) else None
    text = f"{kext.name}: in the {on}, not in the {missing}"
    return Difference(str(kext.name), address, (on,), (missing,), text)


def _merged(kext: KextInfo, summary: KextInfo) -> KextInfo:
    both = {
        name: next((v for v in values if not isinstance(v, Unreadable)), values[0])
        for name in ("index", "address", "size", "name", "version")
        if (values := (getattr(kext, name), getattr(summary, name)))
    }
    return replace(
        kext,
        **both,
        uuid=summary.uuid,
        flags=summary.flags,
        text=summary.text,
        lists=(*kext.lists, *summary.lists),
    )


def _differences(kext: KextInfo, summary: KextInfo) -> Iterator[str]:
    for field in ("index", "address", "size"):
        one, other = getattr(kext, field), getattr(summary, field)
        if isinstance(one, int) and isinstance(other, int) and one != other:
            yield f"{kext.name}: {field} is {one:#x} in the kmod list, {other:#x} in the summaries"


def _kmods(target: Target, report: Report) -> Iterator[KextInfo]:
    head = target.symbols.get("_kmod")
    if head is None:
        return
    chars = f"{KMOD_MAX_NAME}s"
    word = "P"
    fields = record(
        target,
        "kmod_info",
        {
            "index": ("I", "id"),
            "name": (chars, "name"),
            "version": (chars, "version"),
            "refs": ("i", "reference_count"),
            "references": (word, "reference_list"),
            "address": (word, "address"),
            "size": (word, "size"),
            "hdr_size": (word, "hdr_size"),
            "start": (word, "start"),
            "stop": (word, "stop"),
        },
    )
    link = target.types.offset("kmod_info", "next")
    for at in walk_list(target, head.address, link, "kmod", report, _LIMIT):
        raw = fields.read(at)
        yield KextInfo(
            raw["index"],
            raw["refs"],
            raw["address"],
            raw["size"],
            _less(raw["size"], raw["hdr_size"]),
            text_of(raw["name"]),
            text_of(raw["version"]),
            None,
            _linked(target, raw["references"], raw["name"]),
            at,
            raw["start"],
            raw["stop"],
            None,
            None,
            ("kmod",),
        )


def _less(size: Any, header: Any) -> Any:
    for value in (size, header):
        if isinstance(value, Unreadable):
            return value
    return max(0, size - header)


def _linked(target: Target, first: Any, name: Any) -> Any:
    """The load tags of the kexts in a list of kmod_reference {next, info}."""
    if isinstance(first, Unreadable):
        return first
    tags: list[int] = []
    seen: set[int] = set()
    inside = target.types.offset("kmod_info", "id")
    while first:
        if first in seen or len(seen) > _LIMIT:
            return Unreadable(f"the references of {text_of(name)} run in a circle at {first:#x}")
        seen.add(first)
        try:
            info = target.pointer(first + target.arch.pointer_size)
            tags.append(target.unsigned(info + inside, "I"))
            first = target.pointer(first)
        except FaultError as fault:
            return Unreadable.of(fault)
    return sorted(tags)


def _summaries(target: Target, report: Report) -> Iterator[KextInfo]:
    types = target.types
    symbol = target.symbols.get("_gLoadedKextSummaries")
    if symbol is None or not types.has(_SUMMARY):
        return
    try:
        header = target.pointer(symbol.address)
        if not header:
            return
        head = [target.unsigned(header + at, "I") for at in (4, 8)]  # entry_size, numSummaries
    except FaultError as fault:
        report.stop("kext summaries", 0, f"{fault.reason} at {fault.address:#x}")
        return
    entry_size, count = head
    fields = _summary_fields(target, entry_size)
    if fields is None or count > _LIMIT:
        what = f"{count} entries of {entry_size:#x} bytes at {header:#x}"
        report.stop("kext summaries", 0, f"{what}: expected at most {_LIMIT} of at least 0x78")
        return
    for number in range(count):
        yield _summary(fields.read(header + 16 + number * entry_size))


def _summary_fields(target: Target, entry_size: int) -> Record | None:
    """What entries of that size hold; the code's own place came with macOS 11."""
    wanted = {
        "name": (f"{KMOD_MAX_NAME}s", "name"),
        "uuid": ("16s", "uuid"),
        "address": ("Q", "address"),
        "size": ("Q", "size"),
        "version": ("Q", "version"),
        "index": ("I", "loadTag"),
        "flags": ("I", "flags"),
        "text_address": ("Q", "text_exec_address"),
        "text_size": ("Q", "text_exec_size"),
    }
    fields: dict[str, tuple[int | None, str]] = {}
    for name, (code, member) in wanted.items():
        at = target.types.offset(_SUMMARY, member) if target.types.has(_SUMMARY, member) else None
        fits = at is not None and at + 8 <= entry_size
        fields[name] = (at if fits else None, code)
    least = target.types.offset(_SUMMARY, "flags") + 4
    return Record(target, fields) if least <= entry_size <= 0x1000 else None


def _summary(raw: dict[str, Any]) -> KextInfo:
    text = (raw["text_address"], raw["text_size"])
    apart = all(isinstance(value, int) for value in text) and text[1] > 0
    version = raw["version"]
    return KextInfo(
        raw["index"],
        None,
        raw["address"],
        raw["size"],
        None,
        text_of(raw["name"]),
        version_string(version) if isinstance(version, int) else version,
        raw["uuid"],
        None,
        None,
        None,
        None,
        raw["flags"],
        text if apart else None,
        ("summaries",),
    )
