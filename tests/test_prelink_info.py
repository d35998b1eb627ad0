"""The property list of kernel caches: plistlib where it reads the same, the dialect by hand."""

from __future__ import annotations

import plistlib
import random
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import prelink_info
from kvmtool.errors import FormatError
from kvmtool.prelink_info import CODELESS, parse_plist, parse_prelink_info
from tests import inputs
from tests.builders import kernelcache as build


def parse(text, offset=0):
    return parse_plist(text if isinstance(text, bytes) else text.encode(), "file", offset)


def value(text):
    """The one value in a list of one."""
    (found,) = parse(f"<array>{text}</array>")
    return found


# what plistlib reads too, it reads alike

TEXT = st.text(st.characters(min_codepoint=0x20, exclude_categories=("Cs",)), max_size=12)
LEAVES = st.booleans() | st.integers(0, 2**64 - 1) | TEXT | st.binary(max_size=40)
PLISTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)


@given(st.lists(PLISTS, max_size=4) | st.dictionaries(TEXT, PLISTS, max_size=4))
def test_plain_lists_are_read_as_plistlib_reads_them(root):
    text = plistlib.dumps(root)
    assert plistlib.loads(text) == root
    assert parse(text) == root


def test_a_real_info_plist_is_read_as_plistlib_reads_it():
    with open(inputs.real("kexts/i386-KernelMemoryAccess.Info.plist"), "rb") as file:
        text = file.read()
    assert parse(text) == plistlib.loads(text)
    assert parse(text)["CFBundleIdentifier"] == "com.osxbook.kext.KernelMemoryAccess"


# the dialect: libkern/c++/OSUnserializeXML.y


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<integer>12</integer>", 12),
        ('<integer size="64">0xffffff7f80a3c000</integer>', 0xFFFFFF7F80A3C000),
        ('<integer size="32">0x1ffffffff</integer>', 0xFFFFFFFF),
        ('<integer size="8">300</integer>', 44),
        ("<integer>-1</integer>", 0xFFFFFFFFFFFFFFFF),
        ('<integer size="16">-2</integer>', 0xFFFE),
        ("<integer/>", 0),
        ("<string/>", ""),
        ("<string> a &lt;b&gt; &amp; c\n</string>", " a <b> & c\n"),
        ("<string>&quot;</string>", '"'),
        ("<data>AQID\n\tBA==</data>", b"\1\2\3\4"),
        ('<data format="hex">01 ff\n7f</data>', b"\x01\xff\x7f"),
        ("<data/>", b""),
        ("<true/>", True),
        ("<false/>", False),
        ("<set><string>a</string><string>b</string></set>", ["a", "b"]),
        ("<dict/>", {}),
        ("<array/>", []),
        ("<!-- a note --><string>x</string>", "x"),
        ("<dict><key>k</key><true/><key>k</key><false/></dict>", {"k": False}),
    ],
)
def test_values(text, expected):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_an_idref_is_the_object_of_its_id():
    text = (
        '<dict><key ID="9">a</key><array ID="0"><integer ID="0x10" size="64">0x7</integer></array>'
        '<key>b</key><array IDREF="0"/><key>c</key><integer IDREF="16"/>'
        '<key>d</key><string IDREF="9"/></dict>'
    )
    found = parse(text)
    assert found == {"a": [7], "b": [7], "c": 7, "d": "a"}
    assert found["a"] is found["b"]
    assert {type(key) for key in found} == {str}
    assert type(found["d"]) is str


def test_an_id_may_be_used_again_later():
    assert parse('<array><true ID="1"/><false ID="1"/><true IDREF="1"/></array>')[2] is False


DOCTYPE = (
    '<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" '
    '"http://www.apple.com/DTDs/PropertyList-1.0.dtd">'
)


@pytest.mark.parametrize("root", ["<dict><key>a</key><true/></dict>", "<array><true/></array>"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("\n ", "\n"),
        ("<plist>", "</plist>"),
        ('<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0">', "</plist>"),
        (f'<?xml version="1.0"?>{DOCTYPE}<plist version="1.0">', "</plist>"),
    ],
)
@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 5000, b"\0rubbish <"])
def test_wrappings_of_the_root(root, before, after, padding):
    assert parse((before + root + after).encode() + padding) == parse(root)


def test_bytes_that_are_not_utf8_are_kept():
    found = parse(
        b'<?xml version="1.0" encoding="UTF-8"?><array><string>\xa9 \xc3\xa9</string></array>'
    )
    assert found == ["\udca9 é"]


@pytest.mark.parametrize(
    ("text", "offset", "message"),
    [
        ("", 0, "no element found"),
        ("<array>", 7, "no element found"),
        ("<array></dict>", 9, "mismatched tag"),
        ("<array><real>1.5</real></array>", 7, "unexpected <real>"),
        ("<array><string><true/></string></array>", 15, "unexpected <true>"),
        ("<array>x</array>", 8, "text in <array>"),
        ("<string>x</string>", 18, "expected one dictionary or array"),
        ("<plist><array/><array/></plist>", 31, "expected one dictionary or array"),
        ("<array><plist/></array>", 15, "<plist> inside another element"),
        ("<dict><key>a</key></dict>", 18, "expected <key> and value by turns"),
        ("<dict><true/><true/></dict>", 20, "expected <key> and value by turns"),
        ("<dict><key>a</key><key>b</key></dict>", 30, "expected <key> and value by turns"),
        ("<array><key>a</key></array>", 19, "<key> in <array>"),
        ('<array><true IDREF="3"/></array>', 24, "IDREF '3' has no ID before it"),
        ('<array ID="3"><true IDREF="3"/></array>', 31, "IDREF '3' has no ID before it"),
        ('<array><true ID="x"/></array>', 21, "expected a number, got 'x'"),
        ("<array><integer>12a</integer></array>", 19, "expected a number, got '12a'"),
        ("<array><integer>0x</integer></array>", 18, "expected a number, got '0x'"),
        ("<array><integer>1_0</integer></array>", 19, "expected a number, got '1_0'"),
        ("<array><integer>" + "9" * 99 + "</integer></array>", 115, "expected a number"),
        ('<array><integer size="65">1</integer></array>', 27, "integer of 65 bits"),
        ('<array><integer size="0">1</integer></array>', 26, "integer of 0 bits"),
        ("<array><data>AAA</data></array>", 16, "data: Incorrect padding"),
        ('<array><data format="hex">0</data></array>', 27, "data: Odd-length string"),
        ("<array><string>&nbsp;</string></array>", 15, "undefined entity"),
        ("<array><string>\1</string></array>", 15, "not well-formed"),
    ],
)
def test_errors_say_where(text, offset, message):
    with pytest.raises(FormatError) as caught:
        parse(text, 0x1000)
    assert message in str(caught.value)
    assert (caught.value.source, caught.value.offset) == ("file", 0x1000 + offset)


@pytest.mark.parametrize(
    "declaration",
    [
        '<!ENTITY a "b">',
        '<!ENTITY a SYSTEM "file:///etc/passwd">',
        '<!ENTITY % a SYSTEM "http://localhost/a.dtd"> %a;',
        '<!ENTITY a "' + "x" * 100 + '"><!ENTITY b "' + "&a;" * 100 + '">',
    ],
)
def test_entities_are_refused_where_they_are_declared(declaration):
    with pytest.raises(FormatError, match="entity"):
        parse(f"<!DOCTYPE plist [{declaration}]><array><string>&a;</string></array>")


def test_an_entity_of_an_outside_dtd_is_refused():
    with pytest.raises(FormatError, match="entity"):
        parse('<!DOCTYPE plist SYSTEM "x.dtd"><array><string>&a;</string></array>')


def test_depth_is_limited():
    depth = prelink_info.DEPTH_LIMIT
    deep = "<array>" * depth + "</array>" * depth
    assert parse(deep) is not None
    with pytest.raises(FormatError, match="nested deeper than 128"):
        parse(f"<array>{deep}</array>")


def test_the_number_of_objects_is_limited(monkeypatch):
    monkeypatch.setattr(prelink_info, "OBJECT_LIMIT", 100)
    assert len(parse("<array>" + "<true/>" * 99 + "</array>")) == 99
    with pytest.raises(FormatError, match="more than 0x64 objects"):
        parse("<array>" + "<true/>" * 100 + "</array>")


def test_the_text_is_limited(monkeypatch):
    monkeypatch.setattr(prelink_info, "SIZE_LIMIT", 20)
    assert parse(b"<array>     </array>" + b"\0" * 100) == []
    with pytest.raises(FormatError, match="0x15 bytes, expected at most 0x14"):
        parse("<array>      </array>")


def test_references_to_references_take_no_room():
    """Each level names the one before it ten times: 10 ** 30 values, if they were copied."""
    levels = ['<array ID="0"><string>x</string></array>']
    levels += [
        f'<array ID="{level}">' + f'<array IDREF="{level - 1}"/>' * 10 + "</array>"
        for level in range(1, 31)
    ]
    tracemalloc.start()
    found = parse("<array>" + "".join(levels) + "</array>")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 31
    assert peak < 1 << 20


def test_a_large_list_is_read_in_time():
    kext = build.plist([{"CFBundleIdentifier": "a", "Data": b"x" * 1000, "Names": ["n"] * 20}])
    entry = kext[len(b"<array>") : -len(b"</array>")]
    text = b"<array>" + entry * 3000 + b"</array>"
    start = time.process_time()
    assert len(parse(text)) == 3000
    assert time.process_time() - start < 3, f"{len(text)} bytes"


# what it says of kexts


def listed(root, arch="x86_64"):
    return parse_prelink_info(build.plist(root) + b"\0\0", "file", 0x40, arch)


EVERYTHING = {
    "CFBundleIdentifier": "com.test.one",
    "CFBundleVersion": "1.2.3",
    "CFBundleExecutable": "one",
    "OSBundleRequired": "Root",
    "OSBundleLibraries": {"com.apple.kpi.bsd": "8.0", "com.apple.kpi.mach": "8.0"},
    "_PrelinkBundlePath": "/System/Library/Extensions/one.kext",
    "_PrelinkExecutableRelativePath": "Contents/MacOS/one",
    "_PrelinkExecutableLoadAddr": build.Hex(0xFFFFFF7F80A00000),
    "_PrelinkExecutableSourceAddr": build.Hex(0xFFFFFF8000900000),
    "_PrelinkExecutableSize": build.Hex(0x5000),
    "_PrelinkKmodInfo": build.Hex(0xFFFFFF7F80A01000),
    "_PrelinkInterfaceUUID": b"u" * 16,
    "_PrelinkKCID": b"k" * 16,
    "_PrelinkLinkState": build.Hex(0xFFFFFF8000990000),
    "_PrelinkLinkStateSize": build.Hex(0x30),
    "ModuleIndex": 3,
}


def test_every_key_is_read():
    info = listed(
        {
            "_PrelinkInfoDictionary": [EVERYTHING],
            "_PrelinkKCID": b"1" * 16,
            "_BootKCID": b"2" * 16,
            "_PageableKCID": b"3" * 16,
            "_PrelinkLinkKASLROffsets": bytes.fromhex("02000000 10000000 18000000"),
        }
    )
    assert info == (
        (
            (
                "com.test.one",
                "1.2.3",
                "one",
                "Root",
                "/System/Library/Extensions/one.kext",
                "Contents/MacOS/one",
                0xFFFFFF7F80A00000,
                0xFFFFFF8000900000,
                0x5000,
                0xFFFFFF7F80A01000,
                b"u" * 16,
                b"k" * 16,
                0xFFFFFF8000990000,
                0x30,
                3,
                ("com.apple.kpi.bsd", "com.apple.kpi.mach"),
            ),
        ),
        b"1" * 16,
        b"2" * 16,
        b"3" * 16,
        bytes.fromhex("10000000 18000000"),
    )


def test_a_bare_array_is_the_list_of_kexts():
    info = listed([EVERYTHING, {"CFBundleIdentifier": "b"}, {"no": "identifier"}])
    assert [kext.identifier for kext in info.kexts] == ["com.test.one", "b"]
    assert info[1:] == (None, None, None, None)


def test_what_is_absent_or_of_another_type_is_none():
    (kext,) = listed([{"CFBundleIdentifier": "a", "_PrelinkExecutableSize": "0x5000"}]).kexts
    assert kext._replace(dependencies=None) == ("a", *[None] * 15)
    assert kext.dependencies == ()


def test_a_codeless_kext_has_no_address():
    entry = {"CFBundleIdentifier": "a", "_PrelinkExecutableLoadAddr": build.Hex(CODELESS)}
    assert listed([entry]).kexts[0].load_address is None


def test_libraries_of_the_machine_come_first():
    """OSKext::getPropertyForHostArch."""
    entry = {
        "CFBundleIdentifier": "a",
        "OSBundleLibraries": {"both": "1"},
        "OSBundleLibraries_x86_64": {"intel": "1"},
    }
    assert listed([entry]).kexts[0].dependencies == ("intel",)
    assert listed([entry], "arm64").kexts[0].dependencies == ("both",)


@pytest.mark.parametrize("entries", ["x", ["x"], {"a": 1}])
def test_kexts_that_are_no_dictionaries_are_an_error(entries):
    with pytest.raises(FormatError, match="expected an array of dictionaries") as caught:
        listed({"_PrelinkInfoDictionary": entries})
    assert caught.value.offset == 0x40


def test_kaslr_offsets_that_are_not_there_are_an_error():
    with pytest.raises(FormatError, match="_PrelinkLinkKASLROffsets: 0x3 offsets in 0x8 bytes"):
        listed({"_PrelinkLinkKASLROffsets": bytes.fromhex("03000000 10000000")})


def test_mutated_lists_give_an_error_or_a_list():
    shared = build.Shared(build.Hex(0x4000))
    root = {"_PrelinkInfoDictionary": [EVERYTHING, EVERYTHING | {"_PrelinkExecutableSize": shared}]}
    root["more"] = [shared, shared]
    text = build.plist(root)
    parts = (b"", b"<", b"</dict>", b"&", b"\0", b"IDREF", b"9")
    chance = random.Random(1)
    errors = []
    start = time.process_time()
    for _ in range(1000):
        data = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            at, size = chance.randrange(len(data)), chance.choice((0, 0, 1, 7))
            data[at : at + size] = chance.choice(parts)
        try:
            parse_prelink_info(bytes(data), "file", 0, "x86_64")
        except FormatError as error:
            errors.append((error, len(data)))
    assert time.process_time() - start < 5
    assert 200 < len(errors) < 1000
    assert all(0 <= error.offset <= size for error, size in errors)
    assert not any("\n" in str(error) for error, _ in errors)
