"""README's table of lines is what the command counts, and it counts as it says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from support.scripts import module_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return module_of(ROOT / "docs/plugin_lines.py")


def test_the_table_is_up_to_date(script: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.updated(text) == text, "run: python docs/plugin_lines.py --write"


def test_every_plugin_has_a_row(script: ModuleType) -> None:
    table = script.table()
    for path in (*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("docs/examples/*/pyproject.toml")):
        assert f"]({path.parent.relative_to(ROOT).as_posix()}) |" in table


def test_code_is_what_is_no_blank_comment_or_docstring(script: ModuleType, tmp_path: Path) -> None:
    head = '"""Doc\nstring."""\n\n# comment\nx = """a\n\nb"""  # text\n\n\n'
    source = head + 'def f():\n    """Doc."""\n    return (\n        1\n    )\n'
    path = tmp_path / "a.py"
    path.write_text(source)
    assert script.count(path) == (14, 3 + 1 + 3)
