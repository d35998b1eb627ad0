"""Builds the machine, boots it, dumps it in every form, and holds every form against its words.

    python -m tests.machine [--forms macho-core,elf] [--arch i386] [--slide 0]
                            [--sample PATH] [--hold]

Exit status 0 when the judges agree and every form in --forms passes; other forms are tried and
reported all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from tests.machine import build, checks, dumps, judges, mounted, running, toolchain
from tests.machine.vm import MachineError, Vm

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_FOLDER = os.path.join(_ROOT, "build", "machine")
_SHOWN = 6  # lines about one form


class Tools(NamedTuple):
    """What is run from where it may be unpacked only."""

    linker: toolchain.Tool
    makedumpfile: toolchain.Tool


def main() -> int:
    """The whole run; gives the exit status."""
    options = _options()
    try:
        toolchain.require_programs()
        tools = Tools(toolchain.linker(_FOLDER), toolchain.makedumpfile(_FOLDER))
    except toolchain.MissingToolsError as error:
        print(f"machine: {error}", file=sys.stderr)
        return 1
    held = True
    running.load()
    for arch in options.arch:
        try:
            held &= _run(arch, tools, options)
        except (MachineError, subprocess.SubprocessError) as error:
            print(f"machine: {arch}: {error}", file=sys.stderr)
            held = False
    return 0 if held else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="machine", description="A machine that really runs.")
    everything = [*checks.FORMS, "mount"]
    parser.add_argument(
        "--forms",
        type=lambda text: text.split(","),
        default=everything,
        help=f"the forms that must pass, with commas between: {','.join(everything)}",
    )
    parser.add_argument("--arch", action="append", choices=[*build.MACHINES])
    parser.add_argument(
        "--slide", type=lambda text: int(text, 16), help="hexadecimal, instead of a random one"
    )
    parser.add_argument("--sample", help="write the x86_64 machine's memory there as LiME in xz")
    parser.add_argument(
        "--hold", action="store_true", help="keep each machine until return is pressed"
    )
    options = parser.parse_args()
    unknown = sorted({*options.forms} - {*everything})
    if unknown:
        parser.error(f"unknown form {', '.join(unknown)}")
    options.arch = options.arch or [*build.MACHINES]
    return options


def _run(arch: str, tools: Tools, options: argparse.Namespace) -> bool:
    folder = os.path.join(_FOLDER, arch)
    images = build.build(arch, folder, tools.linker)
    slide = options.slide if arch == "x86_64" else None
    with Vm(arch, images, folder, slide) as vm:
        started = time.monotonic()
        vm.boot()
        machine = vm.said("machine")[0]
        print(
            f"{arch}: layout {machine['layout']}, slide {machine['slide']}, root {machine['root']}"
        )
        paths = dumps.dump_all(vm, images, folder, tools.makedumpfile)
        held = _judge(vm, images, paths, folder)
        held &= _check(vm, images, paths, folder, options.forms)
        if options.sample and arch == "x86_64":
            with open(paths["raw"], "rb") as raw:
                size = dumps.write_sample(vm, raw.read(), options.sample)
            print(f"  sample      {options.sample}, {size} bytes")
        print(f"  in {time.monotonic() - started:.0f} s; files in {os.path.relpath(folder, _ROOT)}")
        if options.hold:
            input(f"  gdb stub at 127.0.0.1:{vm.port}; return ends the machine ")
    return held


def _judge(vm: Vm, images: build.Images, paths: dict[str, str], folder: str) -> bool:
    held = True
    for name, found in (
        ("llvm-nm", judges.llvm_nm(vm, images)),
        ("kext", judges.kext(vm, images)),
        ("page walk", judges.page_walk(vm, paths)),
        ("elf = raw", judges.same_memory(paths)),
        ("gdb", judges.gdb(vm, images, folder)),
        ("lldb", judges.lldb(vm, images, paths["macho-core"])),
    ):
        failures = list(found)
        held &= not failures
        _report(name, "agrees" if not failures else "DISAGREES", failures)
    return held


def _check(
    vm: Vm, images: build.Images, paths: dict[str, str], folder: str, required: list[str]
) -> bool:
    held = True
    cores = {
        form: template.format(path=paths.get(form), port=vm.port)
        for form, template in checks.FORMS.items()
        if form == "gdb" or form in paths
    }
    tests = {form: list(checks.table(vm, images, form)) for form in cores}
    found = running.each(
        lambda form: [
            bad for test in tests[form] if (bad := checks.run(test, images.kernel, cores[form]))
        ],
        list(cores),
    )
    for form, failures in zip(cores, found, strict=True):
        lines = _by_reason(failures, len(tests[form]))
        held &= _verdict(form, lines, len(failures), len(tests[form]), required)
    for form in (form for form in checks.FORMS if form not in cores):
        _report(form, "not offered here", ())
    lines = list(mounted.failures(vm, images, paths["elf"], folder))
    return held & _verdict("mount", lines, len(lines), 2, required)


def _by_reason(failures: list[checks.Failure], count: int) -> list[str]:
    """A line for each reason, with what failed for it; `count` checks were made."""
    reasons: dict[str, list[str]] = {}
    for failure in failures:
        reasons.setdefault(failure.reason, []).append(failure.title)
    return [
        f"{', '.join(titles) if len(titles) < count else 'all'}: {reason}"
        for reason, titles in reasons.items()
    ]


def _verdict(form: str, lines: list[str], failed: int, count: int, required: list[str]) -> bool:
    """Prints it; False where a form failed that must not."""
    if not failed:
        _report(form, f"passed {count} checks", ())
        return True
    note = "" if form in required else " (not required)"
    _report(form, f"FAILED {failed} of {count} checks{note}", lines)
    return form not in required


def _report(name: str, verdict: str, failures: Iterable[str]) -> None:
    print(f"  {name:<19} {verdict}", flush=True)
    lines = list(failures)
    for line in lines[:_SHOWN]:
        print(f"      {line}")
    if len(lines) > _SHOWN:
        print(f"      and {len(lines) - _SHOWN} more")


if __name__ == "__main__":
    sys.exit(main())
