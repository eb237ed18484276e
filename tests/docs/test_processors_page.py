"""The example of a logits processor runs, and does what it is there for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/logits-processors.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    space = {"__name__": "example"}
    exec(compile(code, "docs/logits-processors.md", "exec", dont_inherit=True), space)
    assert capsys.readouterr().out.strip() == "red"
