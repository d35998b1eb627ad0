"""Numbers of a kernel's that cannot be: one line names each, and nothing is walked by it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.types import layouts
from tests.builders.eras import whole

NAMES = ("10.4.11 i386", "10.9.5 x86_64", "15.5 arm64")


def said(folder, built, command, at, data):
    """What `command` says where `data` lies at `at`; the exit status is 1."""
    (folder / "kernel").write_bytes(built.kernel)
    with built.patched(at, data):
        (folder / "core").write_bytes(built.dump())
    where = ["-N", str(folder / "kernel"), "-M", str(folder / "core")]
    found = CliRunner().invoke(cli, [command, *where])
    assert found.exit_code == 1, found.output
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    return found.stderr


@pytest.mark.parametrize("number", [1 << 20, 0xFFFFFFFF])
@pytest.mark.parametrize("name", NAMES)
def test_slots_of_the_device_switch(name, number, tmp_path):
    built = whole(name)
    at = built.address("_nchrdev")
    line = said(tmp_path, built, "devsw", at, number.to_bytes(4, "little"))
    shown = number if number < 1 << 31 else -1
    assert f"_nchrdev at {at:#x} is {shown}, expected at most 4096" in line


@pytest.mark.parametrize("field", ["msg_size", "msg_bufx", "msg_bufr"])
@pytest.mark.parametrize("name", NAMES[1:])  # the first's layout has no msgbuf
def test_positions_in_the_message_buffer(name, field, tmp_path):
    built = whole(name)
    at = built.truth["msgbuf"]["address"]
    place = at + layouts.table(name).offset("msgbuf", field)
    line = said(tmp_path, built, "dmesg", place, b"\xff" * 4)
    assert f"at {at:#x}: " in line
    assert "expected positions in the ring" in line


@pytest.mark.parametrize("name", NAMES)
def test_no_message_buffer(name, tmp_path):
    built = whole(name)
    line = said(tmp_path, built, "dmesg", built.address("_msgbufp"), bytes(built.memory.width))
    assert "message buffer _msgbufp not found; the pointer is null" in line
