"""VMware's .vmss and .vmsn, with the memory inside and beside, and damage."""

from __future__ import annotations

import contextlib

import pytest
from builders import vmware as build
from builders.vmware import Tag, number
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import formats
from kvmtool.errors import FaultError, FormatError, KvmError, UnsupportedError
from kvmtool.formats.vmware import Vmware, state_beside
from kvmtool.source import BytesSource, FileSource

PAGE = bytes(range(256)) * 16
BLOCK, COMPRESSED = 63, 62
MEMORY = b"".join(bytes([n]) * 4096 for n in range(1, 7))
# RAM with a hole for devices: pages 0 to 3 below it, 4 and 5 from 4 GiB on
HOLE = build.regions((0, 0, 4), (1 << 20, 4, 2))
CPUS = [
    number("cpu:numVCPUs", 2),
    *(number("CR", 0x1000 * n, 0, n) for n in range(5)),
    *(number("CR64", 0x100000000 + n, 1, n, size=8) for n in range(5)),
]


def opened(data: bytes, memory: bytes | None = None) -> Vmware:
    source = BytesSource(data, "dump")
    assert formats.identify(source).name == "vmware"
    return Vmware(source, None if memory is None else BytesSource(memory, "dump.vmem"))


def inside(memory: bytes, padding: int = 0) -> Tag:
    return Tag("Memory", memory, (0, 0), BLOCK, padding)


def regions(dump) -> list[tuple[int, int]]:
    return [(r.start, r.start + r.size) for r in dump.physical().regions()]


@pytest.mark.parametrize("magic", [0xBED0BED0, 0xBED2BED0, 0xBED2BED2, 0xBED3BED3, 0xBAD1BAD1])
@pytest.mark.parametrize("padding", [0, 1234])
def test_memory_inside(magic, padding):
    groups = {"cpu": CPUS, "memory": [number("align_mask", 0xFFFF), inside(MEMORY, padding), *HOLE]}
    dump = opened(build.state(groups, magic))
    assert dump.warnings == []
    assert regions(dump) == [(0, 0x4000), (1 << 32, (1 << 32) + 0x2000)]
    assert dump.physical().read(0x3FFE, 2) == b"\x04\x04"
    assert dump.physical().read((1 << 32) + 0xFFF, 2) == b"\x05\x06"
    with pytest.raises(FaultError, match="0x4000 is unmapped"):
        dump.physical().read(0x3FFF, 2)
    assert dump.virtual() is None


def test_memory_without_regions_begins_at_0():
    dump = opened(build.state({"memory": [number("regionsCount", 0), inside(MEMORY)]}))
    assert regions(dump) == [(0, len(MEMORY))]
    assert dump.physical().read(0, len(MEMORY)) == MEMORY
    assert dump.runs().__next__().offset == dump.memory_source._data.index(MEMORY)


@pytest.mark.parametrize("ending", ["vmss", "vmsn", "VMSN"])
def test_memory_beside(tmp_path, ending):
    (tmp_path / f"mac-1.{ending}").write_bytes(build.state({"memory": HOLE, "cpu": CPUS}))
    (tmp_path / "mac-1.vmem").write_bytes(MEMORY)
    dump = Vmware(FileSource(str(tmp_path / f"mac-1.{ending}")))
    assert dump.memory_source.name == str(tmp_path / "mac-1.vmem")
    assert dump.physical().read(1 << 32, 1) == b"\x05"
    dump.memory_source.close()


def test_no_memory_anywhere(tmp_path):
    path = tmp_path / "mac.vmss"
    path.write_bytes(build.state({"memory": HOLE}))
    with pytest.raises(UnsupportedError, match=r"there is no .*mac\.vmem"):
        Vmware(FileSource(str(path)))
    with pytest.raises(UnsupportedError, match=r"nothing says which \.vmem"):
        opened(build.state({"memory": HOLE}))


def test_the_state_that_goes_with_a_vmem(tmp_path):
    vmem = str(tmp_path / "mac.vmem")
    assert state_beside(vmem) is None
    (tmp_path / "mac.vmsn").touch()
    assert state_beside(vmem) == str(tmp_path / "mac.vmsn")
    (tmp_path / "mac.vmss").touch()
    assert state_beside(vmem) == str(tmp_path / "mac.vmss")
    assert state_beside(str(tmp_path / "mac.raw")) is None


def test_compressed_memory_is_said_to_be():
    state = build.state({"memory": [Tag("Memory", MEMORY, (0, 0), COMPRESSED)]})
    with pytest.raises(UnsupportedError, match="the memory is compressed"):
        opened(state)


def test_control_registers_of_every_cpu():
    dump = opened(build.state({"memory": HOLE, "cpu": CPUS}), MEMORY)
    assert [cpu["cr3"] for cpu in dump.facts.control] == [0x3000, 0x100000003]
    assert dump.facts.control[0]["cr0"] == 0
    assert dump.facts.cputype == formats.UNSAID


def test_control_registers_in_one_block():
    wide = b"".join(n.to_bytes(8, "little") for n in range(7, 12))
    cpu = [Tag("CR", bytes(20), (0,), BLOCK), Tag("CR64", wide, (0,), BLOCK)]
    dump = opened(build.state({"memory": HOLE, "cpu": cpu}), MEMORY)
    assert dump.facts.control == ({"cr0": 7, "cr1": 8, "cr2": 9, "cr3": 10, "cr4": 11},)


def test_a_vmem_that_is_cut_off():
    dump = opened(build.state({"memory": HOLE}), MEMORY[:-4097])
    assert "region 1 (0x100000000) ends past the end of dump.vmem: 0x1001" in dump.warnings[0]
    assert regions(dump) == [(0, 0x4000), (1 << 32, (1 << 32) + 0xFFF)]
    with pytest.raises(FaultError, match="0x100000fff is absent"):
        dump.physical().read((1 << 32) + 0xFFE, 2)


def test_memory_inside_that_is_cut_off():
    state = build.state({"memory": [*HOLE, inside(MEMORY)]})
    with pytest.raises(FormatError, match="cut off"):  # the tags go on behind it
        opened(state[:-4096])


def test_registers_that_cannot_be_read_cost_only_themselves():
    state = build.state({"memory": HOLE, "cpu": [Tag("CR", b"1234", (0, 3))]})
    dump = opened(state[:-3], MEMORY)
    assert "the registers cannot be read" in dump.warnings[0]
    assert dump.physical().read(0, 1) == b"\x01"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"cpu": CPUS}, "none of the groups is memory"),
        ({"memory": [number("regionsCount", 2), *HOLE[1:4]]}, "region 1 of 2 has no regionPPN"),
        ({"memory": [number("regionsCount", 1 << 20)]}, "regionsCount 0x100000 is too many"),
        (
            {
                "memory": [
                    number("regionsCount", 1),
                    number("regionPPN", 1 << 41, 0, size=8),
                    number("regionPageNum", 0, 0),
                    number("regionSize", 1, 0),
                ]
            },
            r"regionPPN\[0\] is 0x20000000000",
        ),
    ],
)
def test_errors(groups, message):
    with pytest.raises(FormatError, match=message):
        opened(build.state(groups), MEMORY)


def test_too_many_groups():
    state = bytearray(build.state({"memory": HOLE}))
    state[8:12] = (0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(FormatError, match="0xffffffff groups"):
        opened(bytes(state), MEMORY)


def test_tags_that_lead_back():
    """A block's size is added to where it is: no tag can lead back to itself."""
    state = build.state({"memory": [Tag("loop", b"", (), BLOCK)] * 3})
    at = state.index(b"\x3f\x04loop") + 6
    wild = state[:at] + (2**64 - 40).to_bytes(8, "little") + state[at + 8 :]
    with pytest.raises(FormatError, match="cut off"):
        opened(wild, MEMORY)


WHOLE = build.state({"cpu": CPUS, "memory": [*HOLE, inside(MEMORY, 5)]})


@given(
    st.lists(st.tuples(st.integers(0, 1400), st.integers(0, 255)), max_size=8),
    st.integers(0, 30000),
)
def test_damage_is_an_error_of_ours_or_none(changes, size):
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at % len(data)] = value
    data[:4] = WHOLE[:4]
    with contextlib.suppress(KvmError):
        memory = Vmware(BytesSource(bytes(data[:size]), "dump")).physical()
        for region in memory.regions():
            assert len(memory.read(region.start, min(region.size, 64))) == min(region.size, 64)
