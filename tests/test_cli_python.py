"""`kvmtool python`: a user's program with the kernel open."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

from kvmtool import sample


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    folder = tmp_path_factory.mktemp("article")
    sample.write(str(folder))
    return ["-N", str(folder / "mach_kernel"), "-M", str(folder / "core")]


def run(*arguments, **how):
    command = [sys.executable, "-m", "kvmtool", "python", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **how)


def test_code(article):
    done = run(*article, "-c", 'print(int(kvm.evaluate("cdevsw[11].d_read")), kvmtool.Kvm)')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{0x3BD0214F} <class 'kvmtool.handle.Kvm'>\n"


def test_a_script_has_its_arguments_and_its_neighbours(article, tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    script = tmp_path / "count.py"
    script.write_text(
        "import sys, beside\n"
        "if __name__ == '__main__':\n"
        "    print(beside.WORD, sys.argv[1:], sum(1 for _ in kvm.procs()))\n"
        "    sys.exit(7)\n"
    )
    done = run(*article, str(script), "--all", "-N", "x")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.startswith("beside ['--all', '-N', 'x'] ")
    assert int(done.stdout.split()[-1]) > 10


def test_a_script_on_stdin(article):
    assert run(*article, input="print(hex(kvm.address('_cdevsw')))").stdout == "0x441720\n"
    done = run(*article, "-", "one", input="import sys; print(sys.argv)")
    assert done.stdout == "['-', 'one']\n"


def test_errors_of_the_kernel_are_a_line_those_of_the_program_begin_in_it(article, tmp_path):
    done = run(*article, "-c", "kvm.read(1, 4)")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kvmtool: kernel address 0x1 is unmapped")
    assert done.stderr.count("\n") == 1
    script = tmp_path / "wrong.py"
    script.write_text("def f():\n    return 1 // 0\nf()\n")
    for done in (run(*article, str(script)), run(*article, input=script.read_text())):
        lines = done.stderr.splitlines()
        assert done.returncode == 1
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1].startswith("ZeroDivisionError")
        assert "kvmtool" not in done.stderr.replace(str(tmp_path), "")
        assert "in <module>" in lines[1]
    assert run(*article, "-c", "def").returncode == 1
    missing = run(*article, str(tmp_path / "none.py"))
    assert missing.stderr == f"kvmtool: {tmp_path}/none.py: No such file or directory\n"


def test_a_prompt(article):
    """Typed on a terminal line by line, each once the one before is answered."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "kvmtool", "python", *article]
    typed = [b"kvm.address('_cdevsw') + 1\n", b"kvm.address('_nope')\n", b"6 * 7\n", b"exit()\n"]
    seen, prompts = b"", 0
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=side) as process:
        os.close(side)
        timer = threading.Timer(60, process.kill)
        timer.start()
        while data := _read(main):
            seen += data
            if typed and seen.count(b">>> ") > prompts:
                prompts += 1
                os.write(main, typed.pop(0))
        process.wait()
        timer.cancel()
    os.close(main)
    text = seen.decode().replace("\r\n", "\n")
    assert process.returncode == 0, text
    assert "It is open as kvm" in text
    assert str(0x441721) in text
    assert "symbol _nope not found" in text
    assert "Traceback" not in text
    assert "42\n" in text


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # EIO: nobody is at the other side any more
        return b""
