"""The quickstart's steps with a server say what the page shows, and the README's client example is one of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.scripts import module_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/quickstart.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return module_of(ROOT / "docs/quickstart_outputs.py")


@pytest.mark.slow
def test_a_run_of_the_steps_gives_what_the_page_shows(script: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = script.fresh(text, Path(sys.executable).parent)
    assert script.differences(text, found) == [], "run: python docs/quickstart_outputs.py --write"
    shown = [part["shown"] for part in script._PART.finditer(text.split(script.STEPS)[1]) if not part["kind"]]
    assert len(shown) >= 8
    assert all(len(output.splitlines()) > 2 for output in shown)  # a fence, and something in it


def test_times_and_ids_may_differ_and_nothing_else(script: ModuleType) -> None:
    one = """2026-11-22T12:19:41.787Z INFO call request_id=req-00cd status=200 ms=195.8 prompt_tokens=138
"id": "chatcmpl-00cd", "created": 1795349981, "ttft_ms": 165.52, "tokens_per_second": 278.8, "cached_tokens": 4
ready after 2.84 s (imports 2.19) KV cache: 419424 tokens in 26214 blocks; first token 0.07 s"""
    other = """2027-01-02T02:09:01.007Z INFO call request_id=req-ffff status=200 ms=5.1 prompt_tokens=138
"id": "chatcmpl-ffff", "created": 1800000000, "ttft_ms": 5.5, "tokens_per_second": 8.0, "cached_tokens": 4
ready after 12.1 s (device 3.00) KV cache: 1600 tokens in 100 blocks; first token 1.20 s"""
    assert script.differences(one, other) == []
    for given, wrong in (("status=200", "status=500"), ("tokens=138", "tokens=139"), (": 4", ": 0"), ("id", "di")):
        assert len(script.differences(one, other.replace(given, wrong))) >= 2


def test_progress_bars_of_a_slow_machine_are_not_shown(script: ModuleType) -> None:
    drawn = "import sys, tqdm\nfor _ in tqdm.trange(3, desc='Loading weights', mininterval=0, file=sys.stdout): pass\n"
    steps = script.Steps(Path(sys.executable).parent)
    try:
        assert steps.run("bash", f"echo 55% | cat\npython - <<'END'\n{drawn}END\necho '| a | b |'\n") == (
            "55%\n| a | b |\n"
        )
    finally:
        steps.close()


def test_a_step_that_fails_is_told(script: ModuleType, tmp_path: Path) -> None:
    steps = script.Steps(Path(sys.executable).parent)
    with pytest.raises(SystemExit, match="no such file"):
        steps.run("bash", f"echo no such file; cat {tmp_path}/none | cat\n")
    try:
        assert steps.run("py", "x = 1\n") == ""
        assert steps.run("py", "print(x + 1)\n") == "2\n"
        with pytest.raises(SystemExit, match="ZeroDivisionError"):
            steps.run("py", "1 / 0\n")
    finally:
        steps.close()


def test_the_client_example_of_the_readme_is_short_and_runs_here() -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert f"```py\n{code}```\n" in PAGE.read_text(encoding="utf-8")
