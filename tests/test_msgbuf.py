"""The message buffer, against what was planted and what a running kernel's buffer held."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.errors import FormatError, NotFoundError
from kvmtool.xnu.msgbuf import message_buffer
from tests.inputs import DUMPS, oracle, plain_core, real, truth

MACHINES = {
    "live": ("x86_64-xnu-2422.115.4.mach_kernel", "live.elfcore"),
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core"),
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile"),
}


def run(*args):
    return CliRunner().invoke(cli, args)


@pytest.mark.parametrize("dump", DUMPS)
def test_text_is_what_was_planted(dump):
    args = ("dmesg", "-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    found = run(*args, "--format", "json")
    assert found.exit_code == 0, found.output
    answer, planted = json.loads(found.stdout), truth(dump)["msgbuf"]
    assert answer["text"] == planted["text"]
    for name in ("size", "bufx", "bufr"):
        assert answer[name] == planted[name]
    assert int(answer["bufc"], 16) == planted["bufc"]
    lines = run(*args).stdout.splitlines()
    assert lines == planted["text"].removesuffix("\n").split("\n")


@pytest.mark.parametrize("machine", MACHINES)
def test_text_of_a_machine_that_ran(machine):
    kernel, core = MACHINES[machine]
    said = oracle(machine)["msgbuf"]
    found = run(
        *("dmesg", "-N", real(f"machine/{kernel}"), "-M", real(f"machine/{core}")),
        *("--format", "json"),
    )
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    if machine == "armc":  # it printed on after it had written its core
        assert said["text"].startswith(answer["text"])
        assert answer["bufx"] > 7000
        return
    assert answer["text"] == said["text"]
    assert (answer["bufx"], answer["bufr"]) == (said["bufx"], said["bufr"])


def test_unread_is_what_follows_bufr():
    kernel, core = MACHINES["crash"]
    said = oracle("crash")["msgbuf"]
    with kvmtool.open(real(f"machine/{kernel}"), real(f"machine/{core}")) as kvm:
        unread = message_buffer(kvm.nearest_target(), unread=True).text()
    assert said["bufr"] < said["bufx"]
    assert said["text"].endswith(unread)
    assert len(unread.encode()) == said["bufx"] - said["bufr"]


def test_no_log_of_the_system_log_is_an_error():
    kernel, core = MACHINES["crash"]
    with (
        kvmtool.open(real(f"machine/{kernel}"), real(f"machine/{core}")) as kvm,
        pytest.raises(NotFoundError),
    ):
        message_buffer(kvm.nearest_target(), symbol="_aslbufp")


def test_what_is_no_buffer_is_refused():
    kernel, core = MACHINES["crash"]
    with kvmtool.open(real(f"machine/{kernel}"), real(f"machine/{core}")) as kvm:
        target = kvm.nearest_target()
        with pytest.raises(FormatError, match="magic"):
            message_buffer(target, symbol="_kernproc")
