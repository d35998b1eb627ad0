"""dmesg: the kernel's message buffer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmtool.cli import PARTIAL
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import core_argument, format_option, kernel_options
from kvmtool.cli.render import Address, render_one, visible

if TYPE_CHECKING:
    from kvmtool.cli.params import Where


@click.command(cls=Sectioned)
@click.option("--unread", is_flag=True, help="Only what syslogd had not read yet.")
@click.option("--asl", is_flag=True, help="The buffer of the system log (10.13 to 10.15).")
@format_option
@kernel_options
@core_argument
def dmesg(where: Where, unread: bool, asl: bool, format: str) -> None:
    """Print the kernel's message buffer, oldest line first.

    Messages from 10.12 on mostly went to the unified log: here is what the kernel printed itself.

    \b
    Example:
      kvmtool dmesg -N mach_kernel -M core
    """
    from kvmtool.xnu.msgbuf import SYMBOLS, message_buffer

    kvm = opened(where)
    found = message_buffer(kvm.nearest_target(), unread, SYMBOLS[1] if asl else SYMBOLS[0])
    text = found.text()
    if format == "table":
        out = "\n".join(visible(line).replace("\\t", "\t") for line in text.split("\n"))
        sys.stdout.write(out if out.endswith("\n") or not out else out + "\n")
    else:
        record = {
            "address": Address(found.address),
            "size": found.size,
            "bufx": found.bufx,
            "bufr": found.bufr,
            "bufc": Address(found.bufc),
            "text": text,
        }
        render_one(record, format)
    if not found.whole:
        click.get_current_context().exit(PARTIAL)
