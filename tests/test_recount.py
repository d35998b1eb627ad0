"""Processor time of macOS 13 and later: by a compiler's types, and where memory holds no tracks."""

from __future__ import annotations

import struct
from contextlib import closing
from types import SimpleNamespace

import pytest

from kvmtool.source import FileSource
from kvmtool.type_readers import read_types
from kvmtool.types import layouts
from kvmtool.types.model import TypeTable
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.recount import Recount, Track
from tests.builders.dwarf import compiled
from tests.builders.sparse import Sparse

# osfmk/kern/recount.h, with the options that the sizes depend on
HEADER = """
struct recount_track {
    unsigned int rt_sync, rt_pad;
    struct recount_usage {
#if LEVELS
        struct recount_metrics {
            unsigned long long rm_time_mach;
#if CPI
            unsigned long long rm_instructions, rm_cycles;
#endif
        } ru_metrics[LEVELS];
#else
        unsigned long long ru_user_time_mach, ru_system_time_mach;
#if CPI
        unsigned long long ru_cycles, ru_instructions;
#endif
#endif
#if ENERGY
        unsigned long long ru_energy_nj;
#endif
    } rt_usage;
};
struct recount_track tracks;
"""
SHAPES = {
    "-DLEVELS=0": Track(24, 8, (16,)),
    "-DLEVELS=0 -DENERGY=1": Track(32, 8, (16,)),
    "-DLEVELS=0 -DCPI=1 -DENERGY=1": Track(48, 8, (16,)),
    "-DLEVELS=2 -DENERGY=1": Track(32, 16, (8,)),
    "-DLEVELS=2 -DCPI=1": Track(56, 32, (8,)),
    "-DLEVELS=2 -DCPI=1 -DENERGY=1": Track(64, 32, (8,)),
    "-DLEVELS=3 -DCPI=1 -DENERGY=1": Track(88, 32, (8, 56)),
}


def of_types(types, *symbols):
    """A reader for a kernel of nothing but types and names."""
    names = SimpleNamespace(get=lambda name: name in symbols or None)
    arch = SimpleNamespace(name="arm64", byteorder="<", pointer_size=8)
    return Recount(SimpleNamespace(types=types, symbols=names, arch=arch))


@pytest.mark.parametrize("options", SHAPES)
def test_tracks_of_a_compiler(options, tmp_path):
    flags = ("-g", "-target", "arm64-apple-darwin", *options.split())
    path = compiled(str(tmp_path), HEADER, *flags)
    with closing(FileSource(path)) as file:
        table = TypeTable(read_types([file], None, None).source)
        assert of_types(table).track == SHAPES[options]
        assert table.size("recount_track") == SHAPES[options].size


MAIN = [name for name in layouts.names() if name.startswith(("12.5", "13", "14", "15"))]


@pytest.mark.parametrize("name", MAIN)
def test_an_sptm_is_one_level_more(name):
    types = layouts.table(name)
    plain, secure = of_types(types).track, of_types(types, "_SPTMArgs").track
    if not types.has("processor", "pr_recount"):
        assert plain is secure is None
    elif types.has("thread", "th_recount.rth_interrupt_duration_mach"):
        assert secure == Track(plain.size + 24, 32, (8, 56))
    else:
        assert plain == secure


def made(*tracks):
    """A 14.6 x86_64 kernel with these words in its memory, and where they lie."""
    sparse = Sparse("14.6 x86_64")
    at = sparse.alloc(b"".join(struct.pack("<2I6Q", *words) for words in tracks))
    return sparse, at


ONE = (0, 2, 30, 1, 1, 4, 1, 1)  # kernel: 30, user: 4


def test_a_task_has_a_track_for_each_cpu():
    sparse, at = made(ONE, ONE, ONE)
    sparse.number("_processor_count", 3)
    recount = Recount(sparse.target())
    assert recount.task(at) == (12, 90)
    assert recount.thread(at) == (4, 30)
    assert recount.thread(0) == recount.task(0) == (None, None)
    lost = Unreadable("gone")
    assert recount.thread(lost) == (lost, lost)


def test_without_the_number_of_cpus_nothing_is_said():
    sparse, at = made(ONE)
    assert Recount(sparse.target()).task(at) == (None, None)
    sparse.number("_processor_count", 0x10000)
    user, system = Recount(sparse.target()).task(at)
    assert user == system
    assert user.reason == "processor_count is 65536, expected at most 256"


def test_what_is_no_track_is_not_counted():
    sparse, at = made(ONE, (7, 7, 0, 0, 0, 0, 0, 0))
    sparse.number("_processor_count", 2)
    found, _ = Recount(sparse.target()).task(at)
    assert found.reason == f"no recount_track at {at + 56:#x}: its padding is not zero"


def test_a_missing_page_is_named():
    sparse, _ = made(ONE)
    user, system = Recount(sparse.target()).thread(0xFFFFFF8099000000)
    assert user == system
    assert isinstance(user, Unreadable)
    assert "0xffffff8099000000" in user.reason
