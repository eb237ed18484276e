"""`make demo`: it ends well with any weights, and what it shows of reuse is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import picture

ROOT = Path(__file__).resolve().parents[2]
REUSE = re.compile(r"(first|second): +prompt tokens (\d+), cached (\d+); encoder rows (\d+), encoded (\d+);")


def demo(*arguments: str, color: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    if color:
        environment["FORCE_COLOR"] = "1"
    command = [sys.executable, str(ROOT / "zoo/demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False)


def check_reuse(output: str) -> None:
    first, second = (tuple(map(int, found[1:])) for found in REUSE.findall(output))
    for prompt, cached, rows, encoded in (first, second):
        assert 0 <= cached < prompt
        assert 0 < rows < prompt
        assert encoded in (0, rows)
    assert first[1] == 0
    assert first[3] == first[2]
    assert second[1] > 0
    assert second[3] == 0


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Two pictures of our own, and questions as the evaluation sample has them."""
    rows = []
    for kind, names, question in (
        ("count", ["a.png"], "How many squares are there?"),
        ("count", ["a.png"], "How many circles are there?"),
        ("pair_more", ["a.png", "b.png"], "Where are there more stars?"),
    ):
        rows.append({"kind": kind, "images": names, "question": question, "answer": "2"})
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed, 168, 140).save(tmp_path / name)
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.slow
def test_the_demo_as_it_ships() -> None:
    done = demo()
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of \d+ answers are right\.", done.stdout)
    assert "\x1b" not in done.stdout
    check_reuse(done.stdout)


@pytest.mark.slow
def test_pictures_in_colour(samples: Path) -> None:
    done = demo("--samples", str(samples), color=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\x1b\[38;2;\d+;\d+;\d+;48;2;\d+;\d+;\d+m▀", done.stdout)
    check_reuse(done.stdout)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = demo("--samples", str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    done = demo("--model", str(tmp_path), "--samples", str(tmp_path))
    assert done.returncode == 1
