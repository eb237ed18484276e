"""The support matrix is what the committed results make of it, and every test that it names exists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import support_matrix
from support_matrix import FEATURES, FP8, GRAPHS, KINDS, PAGE, Recorder, Results

from mm_core.plugins import PluginRegistry

ROOT = Path(__file__).resolve().parents[2]


def results(*tests: tuple[str, list[str], dict[str, str | None]], device: str = "CPU", **facts: object) -> Results:
    told = {"family": "f", "architecture": "A", "modalities": ["image"], "limits": {}, **facts}
    found = {name: {**told, "kinds": kinds, "findings": findings} for name, kinds, findings in tests}
    return Results([{"device": device, "torch": "2", "date": "-", "failed": [], "tests": found}])


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == support_matrix.page(support_matrix.load()), (
        "run: python tests/support_matrix.py --write"
    )


@pytest.mark.slow
def test_every_named_test_exists():
    named = support_matrix.load().tests
    assert named
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, *support_matrix.conformance_files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:]
    assert set(named) <= set(done.stdout.splitlines())


def test_every_family_of_the_workspace_has_its_rows():
    own = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    families = {family for info in PluginRegistry().describe() if info.name in own for family in info.families}
    assert set(support_matrix.load().facts) == families


def test_results_hold_passing_tests_only():
    for path in (ROOT / "docs/support").glob("*.json"):
        file = json.loads(path.read_text(encoding="utf-8"))
        assert file["failed"] == [], path.name
        assert file["tests"], path.name


def test_a_cell_is_a_proof_or_a_reason():
    one = results(("a::T::t[x]", ["image"], {"streaming": None, "chunked prefill": "one token"}))
    assert one.proofs("f", "image", "streaming") == ["a::T::t[x]"]
    assert one.proofs("f", "image", "chunked prefill") == []
    assert one.reason("f", "image", "chunked prefill") == "one token"
    assert one.reason("f", "image", "KV reuse") == "no test has shown it"
    assert one.reason("f", "image", GRAPHS) == "not run on a GPU yet"
    assert one.reason("f", "image", FP8) == "no test has shown it"
    assert "reads no video" in one.reason("f", "video", "streaming")
    assert "reads no audio" in one.reason("f", "audio", FP8)
    assert "one image" in results(("t", ["image"], {}), limits={"image": 1}).reason("f", "several images", "streaming")
    assert results(("t", ["image"], {}), device="H100").reason("f", "image", GRAPHS) == "no test has shown it"
    page = support_matrix.page(one)
    assert "| f | image | " in page
    assert "[✔](#f)" in page
    assert "| image | streaming | `T::t[x]` |" in page
    assert "One token." in page


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_a_cell_for_each_feature(kind: str):
    lines = support_matrix.page(results(("t", ["image"], {"streaming": None}))).splitlines()
    (row,) = [line for line in lines if line.startswith("| ") and line.split(" | ")[1].strip("| ") == kind
              and len(line.split("|")) == len(FEATURES) + 4]  # fmt: skip
    assert all(cell.strip() for cell in row.split("|")[3:-1])


def test_only_what_passed_is_recorded():
    class Report:
        def __init__(self, outcome: str, when: str) -> None:
            self.nodeid, self.when = f"{outcome} {when}", when
            self.passed, self.failed = outcome == "passed", outcome == "failed"
            self.user_properties = [("mm_core.testing", {"family": "f"}), ("other", 1)]

    recorder = Recorder()
    for outcome in ("passed", "failed", "skipped"):
        for when in ("setup", "call", "teardown"):
            recorder.pytest_runtest_logreport(Report(outcome, when))
    assert recorder.tests == {"passed call": {"family": "f"}}
    assert recorder.failed == ["failed setup", "failed call", "failed teardown"]
