"""docs/validation.md holds a row of each comparison that the tests make."""

from __future__ import annotations

import re
from pathlib import Path

from tools.tasks import ROOT, VALIDATED


def test_every_comparison_stands_in_the_table() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d+) \| (equal|\de-\d+) \|$",
                      (ROOT / "docs/validation.md").read_text(), re.M)
    text = "".join(Path(ROOT, name).read_text() for name in VALIDATED)
    compared = re.findall(r'\bagree\(\s*f?"([^"{]+)', text)
    assert len(rows) >= len(compared) > 10
    for what in compared:
        assert any(row[0].startswith(what) for row in rows), what
    assert all(int(row[2]) > 0 for row in rows)
