"""What is recognised but cannot be read: hibernation images."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import formats
from kvmtool.errors import FormatError, UnknownFormatError, UnsupportedError
from kvmtool.formats.sleepimage import SleepImage
from kvmtool.source import BytesSource


def opened(data: bytes):
    source = BytesSource(data, "dump")
    return formats.load(formats.identify(source))(source)


def sleepimage(signature=0x73696D65, at=0x58, size=0x100000, **fields) -> bytes:
    out = bytearray(4096)
    struct.pack_into("<2Q", out, 0, size, size // 2)
    struct.pack_into("<I", out, at, signature)
    struct.pack_into("<I", out, 44, fields.get("pages", 0))
    struct.pack_into("<Q", out, 120, fields.get("encrypt", 0))
    struct.pack_into("<Q", out, 224, fields.get("slide", 0))
    return bytes(out)


def test_what_the_header_of_a_hibernation_image_says():
    data = sleepimage(pages=0x8000, encrypt=0x2000, slide=0x1C600000)
    with pytest.raises(UnsupportedError) as caught:
        opened(data)
    assert str(caught.value) == (
        "dump: is a hibernation image (whole, 0x100000 bytes, 0x8000 pages, encrypted from offset "
        "0x2000, kernel slide 0x1c600000), whose pages kvmtool cannot decode"
    )


@pytest.mark.parametrize(
    ("signature", "said"),
    [(0x7A7A7A7A, "used"), (0xF1E0BE9D, "not finished"), (0xFCDDFCDD, "of debug data")],
)
def test_images_in_other_states(signature, said):
    with pytest.raises(UnsupportedError, match=said):
        opened(sleepimage(signature))


def test_an_image_of_10_4():
    with pytest.raises(UnsupportedError, match=r"\(whole, 0x100000 bytes\)"):
        opened(sleepimage(at=0x4C))


def test_memory_that_holds_the_signature_is_no_image():
    with pytest.raises(UnknownFormatError):
        opened(sleepimage(size=0))
    with pytest.raises(UnknownFormatError):
        opened(sleepimage()[:511])
    with pytest.raises(FormatError, match="expected the header"):
        SleepImage(BytesSource(bytes(4096)))


@given(st.binary(max_size=700))
def test_any_bytes_may_be_looked_at(data):
    if SleepImage.probe(data):
        with pytest.raises(UnsupportedError):
            SleepImage(BytesSource(data))
