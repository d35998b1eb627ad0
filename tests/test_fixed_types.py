"""Structures that no release changed, against two independent sources of the real ones."""

from __future__ import annotations

import gzip
import json

import pytest

from kvmtool.types.fixed import FixedTypes
from tests.inputs import real


@pytest.mark.parametrize("name", ["i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"])
def test_against_the_real_ones(name):
    with gzip.open(real(f"types/{name}.types.json.gz")) as file:
        isf = json.load(file)["user_types"]
    types = FixedTypes(4 if name.startswith("i386") else 8)
    compared = 0
    for tag in types.names("tag"):
        if tag not in isf:
            continue
        found = types.flat(tag)
        assert found is not None
        assert found.size <= isf[tag]["size"]
        for member in found.members.values():
            if "." in member.name or member.name == "oid_link":  # a structure of its own there
                continue
            if member.name == "v_resv" and "v_offset" in isf[tag]["fields"]:
                assert member.offset == isf[tag]["fields"]["v_offset"]["offset"]
                continue
            assert member.offset == isf[tag]["fields"][member.name]["offset"], f"{tag}.{member}"
            compared += 1
    assert compared >= 8
