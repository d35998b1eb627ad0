"""Whole processes: what they cost in CPU time and memory."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from typing import NamedTuple

ROUNDS = 7
ENOUGH = 5000  # CPU milliseconds spent on a command: it does not get another turn
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class Cost(NamedTuple):
    """CPU milliseconds (user and system, children included) and the largest resident set in MB."""

    ms: float
    mb: float


def kvmtool(*arguments: str) -> list[str]:
    """The command line of ours."""
    return [sys.executable, "-m", "kvmtool", *arguments]


# A process's peak begins with that of whoever started it, so a small one starts them all.
_LAUNCHER = """
import json, os, sys
for line in sys.stdin:
    command, environment = json.loads(line)
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    pid = os.posix_spawnp(command[0], command, environment, file_actions=actions)
    os.close(null)
    _, status, usage = os.wait4(pid, 0)
    ms = 1000 * (usage.ru_utime + usage.ru_stime)
    ended = os.waitstatus_to_exitcode(status)
    print(json.dumps([ended, ms, usage.ru_maxrss / 1024]), flush=True)
"""


@functools.cache
def _launcher() -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def cost(command: list[str] | str) -> Cost:
    """One run of `command`; a string goes through the shell.

    Raises `RuntimeError` when it fails: what does not do its work is no contestant.
    """
    words = ["sh", "-c", command] if isinstance(command, str) else command
    launcher = _launcher()
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    launcher.stdin.write(json.dumps([words, ENVIRONMENT]) + "\n")
    launcher.stdin.flush()
    ended, ms, mb = json.loads(launcher.stdout.readline())
    if ended not in (0, 3):  # 3 is ours for a part that is missing
        raise RuntimeError(f"exit status {ended}: {' '.join(words)}")
    return Cost(ms, mb)


def medians(commands: dict[str, list[str] | str], rounds: int = ROUNDS) -> dict[str, Cost]:
    """The median of each command, the commands taking turns after one round that warms up.

    Of a slow one there are fewer rounds.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for command in commands.values():
        cost(command)
    for _ in range(rounds):
        for name, command in commands.items():
            if sum(each.ms for each in costs[name]) < ENOUGH:
                costs[name].append(cost(command))
    return {
        name: Cost(statistics.median(c.ms for c in each), statistics.median(c.mb for c in each))
        for name, each in costs.items()
    }
