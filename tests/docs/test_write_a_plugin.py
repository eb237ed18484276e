"""The guide's code is the example's: its blocks, put together, are the files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mm_core.testing import RUNGS, Conformance

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/write-a-plugin.md"
EXAMPLE = ROOT / "docs/examples/mm-plugin-qwen2audio"
SHOWN = [path for path in sorted(EXAMPLE.rglob("*")) if path.suffix in (".py", ".toml") and "build" not in path.parts]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_the_pieces_of_a_file_are_the_file(path: Path) -> None:
    """All of it, in order, nothing else."""
    text = path.read_text(encoding="utf-8")
    pieces = [body for name, body in FENCE.findall(PAGE.read_text(encoding="utf-8")) if name in ("python", "toml")]
    own = [piece for piece in pieces if "\n".join(lines(piece)) in "\n".join(lines(text))]
    assert [line for piece in own for line in lines(piece)] == lines(text)


def test_every_piece_is_of_a_file() -> None:
    whole = ["\n".join(lines(path.read_text(encoding="utf-8"))) for path in SHOWN]
    pieces = [body for name, body in FENCE.findall(PAGE.read_text(encoding="utf-8")) if name in ("python", "toml")]
    assert len(pieces) > 10
    assert [piece for piece in pieces if not any("\n".join(lines(piece)) in text for text in whole)] == []


def test_every_rung_is_told() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| rung | what is true")[2].partition("\n\n")[0]
    told = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)
    assert told == [(rung.name, rung.shows) for rung in RUNGS.values()]


def test_every_attribute_of_the_kit_is_told() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [name for name in Conformance.__annotations__ if not name.startswith("_")]
    assert len(names) > 5
    assert [name for name in names if f"| `{name}` |" not in page and name != "cases"] == []
    for name, value in (("max_tokens", 12), ("distinct_tokens", 5), ("num_blocks", 256)):
        assert getattr(Conformance, name) == value
        assert re.search(rf"^\| `{name}` \| .*\({value}\b", page, re.MULTILINE)
