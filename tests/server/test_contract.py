"""Schemathesis against the server's own OpenAPI document: valid and invalid calls of every route, none left out.

A route gets 300 random cases in `make test`; in `make test-slow` 2,000, or MM_CONTRACT_CASES, and thousands that
try every field of the document at every bound.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from support.openai_calls import Canary
from support.serving import Server, running_server

# All that the document promises. Left out is "positive data acceptance": a document cannot say that a name was given
# a picture before, or that a prompt fits the context; such calls are valid by their shape and refused with a 400.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
# Which ask once more for every case; test_auth and test_http ask for every route in every run.
TWICE = ("missing_required_header", "unsupported_method", "ignored_auth")


@pytest.fixture(scope="module")
def contract() -> Iterator[Server]:
    """Answers are short: what is tested is the border, not the model."""
    with running_server(in_process=True, keys=("key-of-one",), max_completion_tokens=4, max_model_len=512) as running:
        yield running


SETTINGS = """
request-timeout = 30

# A body that is wrong and too large is refused as too large: its shape is not looked at.
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429]

# Streams that have no end of their own.
[[operations]]
include-path-regex = "/admin/cache/events|/playground/live"
request-timeout = 2
"""


def attack(server: Server, phases: str, cases: int, seed: int, folder: Path, checks: Sequence[str] = CHECKS) -> str:
    """Run it; what it printed. Fails where it found anything."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "schemathesis"), "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {server.admin_key}", "--mode", "all", "--checks", ",".join(checks),
        "--phases", phases, "--max-examples", str(cases), "--seed", str(seed),
        "--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--continue-on-failure",
    ]  # fmt: skip
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=7200, check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def count(report: str) -> int:
    found = re.search(r"([\d,]+) generated", report)
    assert found is not None, report[-2000:]
    return int(found[1].replace(",", ""))


@pytest.mark.timeout(600)
def test_no_call_of_any_shape_breaks_the_server(contract: Server, tmp_path: Path) -> None:
    with closing(Canary(contract)) as canary:
        report = attack(contract, "examples,fuzzing", 300, 1, tmp_path)
        assert count(report) > 1000
        canary.check()
    assert not [line for line in contract.lines if " ERROR " in line or "Traceback" in line]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thousands_of_calls_of_every_shape(contract: Server, tmp_path: Path) -> None:
    with closing(Canary(contract)) as canary:
        cases = int(os.environ.get("MM_CONTRACT_CASES", "2000"))
        report = attack(contract, "examples,coverage,fuzzing", cases, 2, tmp_path, (*CHECKS, *TWICE))
        assert count(report) > 10_000
        canary.check()
    assert not [line for line in contract.lines if " ERROR " in line or "Traceback" in line]
