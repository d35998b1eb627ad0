"""The page of the benchmarks: what is missed is told, with by how much and why."""

from __future__ import annotations

from bench.sheet import Sheet


def filled() -> Sheet:
    sheet = Sheet()
    sheet.section = "Reads"
    sheet.faster("quick", "10 ms", 3.0, "theirs (30 ms)", 2)
    sheet.faster("slow", "10 ms", 1.6, "theirs (16 ms)", 2, "theirs keeps the answer")
    sheet.add("late", "75 ms", target="at most 60 ms", used=75 / 60)
    sheet.missing("absent", "theirs cannot be installed here")
    return sheet


def test_what_is_missed_is_told_by_how_much_and_why():
    sheet = filled()
    assert [row.what for row in sheet.missed] == ["slow", "late"]
    page = sheet.page()
    assert "| quick | 10 ms | 3 x | theirs (30 ms) | at least 2 x | met |" in page
    assert "| slow | 10 ms | 1.6 x | theirs (16 ms) | at least 2 x | **missed** |" in page
    assert "- **slow**, at least 2 x: by 25%: theirs keeps the answer." in page
    assert "- **late**, at most 60 ms: by 25%: no reason is known" in page
    assert "| absent | not measured |  | theirs cannot be installed here |  |  |" in page


def test_a_page_without_a_miss_has_no_such_heading():
    sheet = Sheet()
    sheet.section = "Reads"
    sheet.faster("quick", "10 ms", 3.0, "theirs (30 ms)", 2)
    assert "missed" not in sheet.page()
    assert "load average" in sheet.page()
