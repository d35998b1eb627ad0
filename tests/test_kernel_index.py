"""Finding kernels by UUID: what is known, what is remembered, and what it costs."""

from __future__ import annotations

import os
import random
import struct
import uuid as uuids
from typing import TYPE_CHECKING

import pytest

from kvmtool import cache, kernel_index
from kvmtool.kernel_index import KnownFile, find, index, search_path, survey
from kvmtool.kernel_search import PeelOpener
from kvmtool.source import BytesSource
from tests import inputs
from tests.builders import macho as build

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtool.source import Source

BANNER = "Darwin Kernel Version 99.1.0: Mon Jan  1 00:00:00 PST 2040; root:xnu-1~1/RELEASE_X86_64"
LC_FILESET_ENTRY, MH_FILESET = 0x80000035, 12


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """Nothing remembered from another test."""
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path_factory.mktemp("index")))


def uuid(name):
    return uuids.uuid5(uuids.NAMESPACE_DNS, name).bytes


def kernel(name, arch="x86_64", banner=BANNER, text=0xFFFFFF8000200000):
    """A kernel without a symbol table, its UUID made of `name` (none without)."""
    file = build.MachO(arch, build.MH_EXECUTE)
    body = (bytes(0x900) + banner.encode() + b"\0").ljust(0x1000, b"\0")
    file.segment("__TEXT", text & (1 << 8 * file.machine.width) - 1, body, fileoff=0)
    file.segment("__KLD", 0x4000, bytes(16))
    if name:
        file.uuid(uuid(name))
    return file.build()


def simple(name, filetype, arch="x86_64", symbols=()):
    file = build.MachO(arch, filetype)
    file.segment("__TEXT", 0, bytes(64))
    file.symtab(symbols)
    file.uuid(uuid(name))
    return file.build()


def collection(name, inside):
    """A fileset with a kext and a kernel; the kernel's offsets count from the file's start."""
    inner = build.MachO("arm64", build.MH_EXECUTE)
    inner.segment("__TEXT", 0xFFFFFE0007004000, vmsize=0x4000, fileoff=0x4000, filesize=0x4000)
    inner.uuid(uuid(inside))
    text = inner.head().ljust(0x900, b"\0") + BANNER.encode() + b"\0"
    outer = build.MachO("arm64", MH_FILESET)
    outer.segment("__TEXT", 0xFFFFFE0007000000, bytes(0x4000), fileoff=0)
    outer.segment("__ALL", 0xFFFFFE0007004000, text.ljust(0x4000, b"\0"))
    for identifier in (b"com.example.kext\0", b"com.apple.kernel\0"):
        body = struct.pack("<2Q2I", 0xFFFFFE0007004000, 0x4000, 32, 0) + identifier
        outer.command(LC_FILESET_ENTRY, body)
    outer.uuid(uuid(name))
    return outer.build()


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def names(known):
    return sorted((os.path.basename(one.path), one.kind) for one in known)


# what is known


def test_each_kind_by_its_bytes(tmp_path, capsys):
    kmod = build.Sym("_kmod_info", 16)
    root = fill(
        tmp_path,
        readme=kernel("kernel"),
        deep__er__a=simple("bundle", build.MH_KEXT_BUNDLE),
        deep__b=simple("object", build.MH_OBJECT, "i386", [kmod]),
        deep__c=simple("dsym", build.MH_DSYM),
        deep__d=collection("collection", "inside"),
        mach_kernel=b"not a kernel at all",
        kernel_core=simple("core", build.MH_CORE),
        program=simple("program", build.MH_EXECUTE),
        plain_o=simple("plain", build.MH_OBJECT),
        undefined_o=simple("undefined", build.MH_OBJECT, "i386", [kmod._replace(n_type=1)]),
        nothing=b"",
        short=b"\xcf",
    )
    assert sorted(index([root]), key=lambda one: (one.path, one.kind)) == [
        KnownFile(f"{root}/deep/b", uuid("object"), "i386", "kext", None),
        KnownFile(f"{root}/deep/c", uuid("dsym"), "x86_64", "dSYM", None),
        KnownFile(f"{root}/deep/d", uuid("collection"), "arm64", "collection", None),
        KnownFile(f"{root}/deep/d", uuid("inside"), "arm64", "kernel", BANNER),
        KnownFile(f"{root}/deep/er/a", uuid("bundle"), "x86_64", "kext", None),
        KnownFile(f"{root}/readme", uuid("kernel"), "x86_64", "kernel", BANNER),
    ]
    assert survey([root]).unreadable == 0
    assert capsys.readouterr() == ("", "")


def test_a_kernel_of_10_4_has_no_uuid_and_is_known(tmp_path):
    root = fill(tmp_path, mach_kernel=kernel("", "ppc", text=0x11000))
    (known,) = index([root])
    assert known == KnownFile(f"{root}/mach_kernel", b"", "ppc", "kernel", BANNER)
    assert find(b"", [root]) is None


def test_the_real_kernels(tmp_path):
    real = {
        "machine/x86_64-xnu-2422.115.4.mach_kernel": "4c4c443255553144a1b27d55bf174df0",
        "kernels/arm64e-xnu-6153.11.26-release.macho": None,
    }
    for dump in inputs.DUMPS:
        real[f"dumps/{dump}/mach_kernel"] = inputs.truth(dump)["uuid"].replace("-", "").lower()
    for place, name in enumerate(real):
        (tmp_path / str(place)).symlink_to(inputs.real(name))
    known = index([str(tmp_path)])
    assert [one.kind for one in known] == ["kernel"] * 5
    assert [one.arch for one in known] == ["x86_64", "arm64e", "i386", "x86_64", "x86_64"]
    for one, wanted in zip(known, real.values(), strict=True):
        assert wanted in (None, one.uuid.hex())
        assert one.version.startswith("Darwin Kernel Version ")
    for one, dump in zip(known[2:], inputs.DUMPS, strict=True):
        assert one.version == inputs.truth(dump)["banner"].rstrip("\0\n ")


def test_the_slices_of_the_real_fat_kext_and_its_dsym(tmp_path):
    for name in ("fat-ppc-i386-zfs-102A", "fat-ppc-i386-zfs-102A.dSYM"):
        (tmp_path / name[-5:]).symlink_to(inputs.real(f"kexts/{name}"))
    known = index([str(tmp_path)], [PeelOpener()])
    wanted = {"ppc": "0e8b7da6f9b14254ad80fdf931113a8c", "i386": "4f36a533e2bd4e4389364531dc9ec4ea"}
    found = {(one.arch, one.kind): one.uuid.hex() for one in known}
    assert found == {(arch, kind): wanted[arch] for arch in wanted for kind in ("kext", "dSYM")}
    for kind in ("kext", "dSYM"):
        assert (
            find(bytes.fromhex(wanted["ppc"]), [str(tmp_path)], kind, [PeelOpener()]).kind == kind
        )


def test_packed_kernels(tmp_path):
    plain = kernel("packed")
    stored = b"bvx-" + struct.pack("<I", len(plain)) + plain + b"bvx$"
    root = fill(tmp_path, lzfse=stored, der=b"\x30\x82\x01\x00" + bytes(256))
    assert index([root]) == []
    assert names(index([root], [PeelOpener()])) == [("lzfse", "kernel")]
    assert find(uuid("packed"), [root], openers=[PeelOpener()]).path == f"{root}/lzfse"


class Backwards:
    """An opener of files that begin with ZYX4 and have two images behind it, byte for byte back."""

    name = "backwards"

    def wants(self, head: bytes) -> bool:
        return head == b"ZYX4"

    def images(self, source: Source) -> Iterable[Source]:
        content = source.read_at(4, source.size - 4)[::-1]
        half = len(content) // 2
        return [BytesSource(content[:half]), BytesSource(content[half:])]


def test_openers_see_what_is_inside_and_have_an_index_of_their_own(tmp_path):
    root = fill(tmp_path, back=b"ZYX4" + (kernel("one") + kernel("two"))[::-1])
    assert index([root]) == []
    known = index([root], [Backwards()])
    assert {one.uuid for one in known} == {uuid("one"), uuid("two")}
    assert index([root]) == []
    again = survey([root], [Backwards()])
    assert (again.known, again.opened) == (known, 0)
    assert find(uuid("two"), [root], openers=[Backwards()]).path == f"{root}/back"


# what it costs


class Calls:
    """How often os.open, os.stat and os.scandir were called for something below `root`, os.read."""

    def __init__(self, monkeypatch, root):
        self.root = str(root)
        self.count = dict.fromkeys(("open", "read", "stat", "scandir"), 0)
        self.sizes = set()
        for name in self.count:
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name, real):
        def call(*arguments, **named):
            self.count[name] += name == "read" or str(arguments[0]).startswith(self.root)
            if name == "read":
                self.sizes.add(arguments[1])
            return real(*arguments, **named)

        return call


def test_other_files_cost_one_read_of_four_bytes_and_once(tmp_path, monkeypatch):
    chance = random.Random(1)
    for number in range(3000):
        (tmp_path / f"{number:04}").write_bytes(
            (b"#!" + bytes(98))[: chance.choice((0, 3, 4, 100))]
        )
    calls = Calls(monkeypatch, tmp_path)
    first = survey([str(tmp_path)])
    assert (first.files, first.opened, first.known, first.unreadable) == (3000, 3000, [], 0)
    assert calls.count["open"] == calls.count["read"] == 3000
    assert calls.sizes == {4}
    calls = Calls(monkeypatch, tmp_path)
    again = survey([str(tmp_path)])
    assert again == first._replace(opened=0)
    assert (calls.count["open"], calls.count["read"]) == (0, 0)
    assert calls.count["stat"] == 3000 + 1
    assert calls.count["scandir"] == 1


def test_find_of_a_known_one_asks_for_nothing_but_that_file(tmp_path, monkeypatch):
    root = fill(tmp_path, **{f"d{n}__f{n}": kernel(f"k{n}") for n in range(50)})
    index([root])
    calls = Calls(monkeypatch, tmp_path)
    assert find(uuid("k31"), [root]).path == f"{root}/d31/f31"
    assert (calls.count["stat"], calls.count["scandir"], calls.count["open"]) == (1, 0, 0)


def test_find_looks_again_when_the_file_changed_or_moved(tmp_path):
    root = fill(tmp_path, a=kernel("one"), b=kernel("two"))
    assert find(uuid("one"), [root]).path == f"{root}/a"
    (tmp_path / "a").rename(tmp_path / "c")
    assert find(uuid("one"), [root]).path == f"{root}/c"
    (tmp_path / "c").write_bytes(kernel("three"))
    os.utime(tmp_path / "c", ns=(1, 1))
    assert find(uuid("one"), [root]) is None
    assert find(uuid("three"), [root]).path == f"{root}/c"
    assert find(uuid("three"), [root], "dSYM") is None
    assert find(uuid("three")[:15], [root]) is None


def test_only_what_changed_is_opened(tmp_path):
    root = fill(tmp_path, a=kernel("one"), b=kernel("two"), c=b"text")
    assert survey([root]).opened == 3
    assert survey([root]).opened == 0
    (tmp_path / "b").write_bytes(kernel("two") + b"more")
    assert survey([root]).opened == 1
    os.utime(tmp_path / "a", ns=(5, 5))
    assert survey([root]).opened == 1
    (tmp_path / "a").write_bytes(kernel("three") + b"longer")
    os.utime(tmp_path / "a", ns=(5, 5))
    assert find(uuid("one"), [root]) is None
    assert find(uuid("three"), [root]).path == f"{root}/a"
    (tmp_path / "a").unlink()
    assert survey([root])[1:3] == (2, 0)
    assert names(index([root])) == [("b", "kernel")]


@pytest.mark.parametrize("damage", ["cut", "foreign", "none"])
def test_a_cache_that_cannot_be_trusted(tmp_path, monkeypatch, damage):
    root = fill(tmp_path, a=kernel("one"), b=b"text")
    wanted = index([root])
    (entry,) = os.scandir(os.environ["KVMTOOL_CACHE"])
    kind, key = entry.name.removesuffix(".kvmcache").rsplit("-", 1)
    payload = cache.load(kind, key)
    if damage == "none":
        monkeypatch.setenv("KVMTOOL_CACHE", "")
    elif damage == "foreign":  # two directories whose names have the same checksum
        cache.store(kind, key, payload.replace(os.fsencode(root), b"/" * len(root), 1))
    else:
        cache.store(kind, key, payload[:-1])
    assert survey([root])[:3] == (wanted, 2, 2)
    assert find(uuid("one"), [root]) == wanted[0]


def test_any_remembered_bytes_are_survived(tmp_path):
    root = fill(tmp_path, a=kernel("one"))
    wanted = index([root])
    (entry,) = os.scandir(os.environ["KVMTOOL_CACHE"])
    kind, key = entry.name.removesuffix(".kvmcache").rsplit("-", 1)
    payload = cache.load(kind, key)
    begin = payload.index(root.encode()) + len(root) + 5
    chance = random.Random(2)
    for _ in range(200):
        body = bytearray(payload)
        body[chance.randrange(begin, len(body))] = chance.randrange(256)
        cache.store(kind, key, bytes(body))
        found = index([root])  # a mtime or size that differs: looked at again
        assert [one.path for one in found][:1] in ([f"{root}/a"], [])
        cache.store(kind, key, b"")
        assert index([root]) == wanted


# where it goes


def test_links_are_followed_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, kept=kernel("one"))
    root = tmp_path / "root"
    fill(root, a__kernel=kernel("two"))
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "again").symlink_to(root / "a" / "kernel")
    (root / "out").symlink_to(elsewhere)
    (root / "gone").symlink_to(root / "nowhere")
    found = survey([str(root)])
    assert names(found.known) == [("kept", "kernel"), ("kernel", "kernel")]
    assert found.unreadable == 2
    assert any("gone" in problem for problem in found.problems)


def test_the_same_directory_named_twice_is_looked_at_once(tmp_path):
    root = fill(tmp_path, a=kernel("one"))
    assert len(index([root, root])) == 1


def test_a_file_may_be_named_itself(tmp_path):
    root = fill(tmp_path, a=kernel("one"), b=kernel("two"))
    assert names(index([f"{root}/a"])) == [("a", "kernel")]
    assert find(uuid("two"), [f"{root}/a"]) is None


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    fill(tmp_path, d__a=kernel("one"))
    monkeypatch.chdir(tmp_path)
    assert find(uuid("one"), ["d"]).path == str(tmp_path / "d" / "a")
    monkeypatch.chdir("/")
    assert find(uuid("one"), [str(tmp_path / "d")]).path == str(tmp_path / "d" / "a")


def test_names_that_are_no_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/k\xff\nx", "wb") as file:
        file.write(kernel("one"))
    first = index([str(tmp_path)])
    assert os.fsencode(first[0].path).endswith(b"/k\xff\nx")
    again = survey([str(tmp_path)])
    assert (again.known, again.opened) == (first, 0)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert survey([str(tmp_path)])[:4] == ([], 0, 0, 0)
    assert survey(["/dev/null"])[:4] == ([], 0, 0, 0)


def test_directories_that_are_not_there(tmp_path):
    found = survey([str(tmp_path / "gone"), fill(tmp_path, a=kernel("one"))])
    assert names(found.known) == [("a", "kernel")]
    assert found.unreadable == 1
    assert "gone" in found.problems[0]


def test_too_deep(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_index, "_DEPTH", 3)
    root = fill(tmp_path, a__b__c=kernel("in"), a__b__d__e=kernel("out"))
    found = survey([root])
    assert names(found.known) == [("c", "kernel")]
    assert found.stopped == f"{root}/a/b/d lies 3 folders deep: not looked into"


def test_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_index, "_FILES", 10)
    root = fill(tmp_path, **{f"f{n:02}": b"" for n in range(20)})
    found = survey([root])
    assert found.files == 10
    assert found.stopped.startswith("more than 10 files")
    assert survey([root]).stopped == found.stopped


def test_damaged_files_are_counted_and_the_rest_is_known(tmp_path):
    good = kernel("good")
    files = {"good": good, "cut": good[:40], "tiny": good[:6]}
    files["many"] = good[:16] + b"\xff\xff\xff\x7f" + good[20:]
    files["fat"] = struct.pack(">2I5I", 0xCAFEBABE, 1, 7, 3, 0x10000000, 16, 0)
    files["java"] = b"\xca\xfe\xba\xbe\0\0\0\x34" + bytes(100)
    root = fill(tmp_path, **files)
    found = survey([root], [PeelOpener()])
    assert names(found.known) == [("good", "kernel")]
    assert found.unreadable == 4
    assert all("offset" in problem for problem in found.problems)
    assert survey([root], [PeelOpener()]) == found._replace(opened=4)  # they are tried again


def test_any_damage_is_survived(tmp_path):
    good = collection("c", "k")
    chance = random.Random(4)
    for number in range(300):
        data = bytearray(good)
        for _ in range(chance.choice((1, 4))):
            place = chance.choice((chance.randrange(700), 0x4000 + chance.randrange(200)))
            data[place] = chance.choice((0, 0x7F, 0xFF, chance.randrange(256)))
        (tmp_path / f"{number:03}").write_bytes(data[: chance.choice((None, None, 0x4100))])
    found = survey([str(tmp_path)])
    assert found.unreadable > 20
    assert len(found.known) > 200
    assert len(found.problems) == 20


# the search path


def test_search_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("KVMTOOL_KERNEL_PATH", raising=False)
    assert search_path(None) == []
    monkeypatch.setenv("KVMTOOL_KERNEL_PATH", os.pathsep.join(["/a", "", "~/kits", "/a"]))
    assert search_path(None) == ["/a", "/home/me/kits"]
    assert search_path(["/b", f"/c{os.pathsep}/b"]) == ["/b", "/c"]
    assert search_path([]) == []
