"""What works with what, from test results: docs/support-matrix.md.

`python tests/support_matrix.py --run` runs the conformance kit of every plugin and writes what it proved into
docs/support/cpu.json, or cuda.json on a machine with a GPU (there `--only batched` is enough: CUDA graphs are all
that it adds). `--write` makes the page of these files; `--check` exits with 1 where the page is out of date.
A cell without a passing test has no ✔.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "support"
PAGE = ROOT / "docs" / "support-matrix.md"
PROPERTY = "mm_core.testing"
KINDS = ("image", "several images", "video", "audio")
GRAPHS, FP8 = "CUDA graph", "fp8 KV"
FEATURES = (GRAPHS, "overlapped scheduling", "chunked prefill", "KV reuse", "encoder reuse", "logits processors",
            "streaming", FP8)  # fmt: skip

HEAD = """# Support matrix

Written by `python tests/support_matrix.py --write` from test results, not from what plugins declare. A ✔ means that a
test of the [conformance kit](write-a-plugin.md) passed in which a request with these media took that path, and gave
token for token what the same request gives alone, uncached, in one piece and step by step. A number says why there is
no ✔. Below the table is, for every ✔, the test that proved it.
"""


class Recorder:
    """A pytest plugin that keeps what passing tests say they have proved."""

    def __init__(self) -> None:
        self.tests: dict[str, Any] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of each test."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == PROPERTY:
                    self.tests[report.nodeid] = value


def conformance_files() -> list[str]:
    """The plugins' tests that use the kit."""
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("plugins/*/tests/test_conformance*.py"))


def run(only: str) -> int:
    """Run the kits and write what they proved; gives pytest's exit code. only: picks tests, as pytest's -k."""
    import pytest
    import torch

    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-k", only]
    code = int(pytest.main([*options, *conformance_files()], [recorder]))
    cuda = torch.cuda.is_available()
    results = {
        "written_by": "tests/support_matrix.py --run",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "failed": sorted(set(recorder.failed)),
        "tests": dict(sorted(recorder.tests.items())),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / ("cuda.json" if cuda else "cpu.json")
    path.write_text(_dumps(results), encoding="utf-8")
    print(f"{path}: {len(recorder.tests)} passed, {len(recorder.failed)} failed", file=sys.stderr)
    return code


def _dumps(results: dict[str, Any]) -> str:
    """JSON with a line a test."""
    tests = [f"  {json.dumps(name)}: {json.dumps(told)}" for name, told in results["tests"].items()]
    head = json.dumps({**results, "tests": None}, indent=1)
    return head.replace('"tests": null', '"tests": {\n' + ",\n".join(tests) + "\n }") + "\n"


@dataclass(frozen=True)
class Proof:
    """One finding of one passing test. reason: why it could not show the feature; None: it did."""

    test: str
    family: str
    kind: str
    feature: str
    reason: str | None


class Results:
    """All results files together."""

    def __init__(self, files: Iterable[Mapping[str, Any]]) -> None:
        self.files = list(files)
        self.facts: dict[str, dict[str, Any]] = {}
        self.architectures: dict[str, set[str]] = defaultdict(set)
        self._proofs: dict[tuple[str, str, str], list[Proof]] = defaultdict(list)
        for file in self.files:
            for test, told in file["tests"].items():
                family = told["family"]
                self.facts[family] = told
                self.architectures[family].add(told["architecture"])
                for kind in told["kinds"]:
                    for feature, reason in told["findings"].items():
                        self._proofs[family, kind, feature].append(Proof(test, family, kind, feature, reason))

    @property
    def tests(self) -> list[str]:
        """Every test that proved something."""
        return sorted({p.test for proofs in self._proofs.values() for p in proofs if p.reason is None})

    def proofs(self, family: str, kind: str, feature: str) -> list[str]:
        """Tests that showed it, each once."""
        return sorted({p.test for p in self._proofs[family, kind, feature] if p.reason is None})

    def reason(self, family: str, kind: str, feature: str) -> str:
        """Why nothing showed it."""
        told = self.facts[family]
        modality = kind.split()[-1].removesuffix("s")
        if modality not in told["modalities"]:
            return f"the family reads no {modality}: such a request ends in an error that says so"
        if kind.startswith("several") and told["limits"].get(modality, 2) < 2:
            return f"the family reads one {modality} a request: more end in an error that says so"
        given = sorted({p.reason for p in self._proofs[family, kind, feature] if p.reason is not None})
        if given:
            return "; ".join(given)
        on_gpu = any(file["device"] != "CPU" for file in self.files)
        return "not run on a GPU yet" if feature == GRAPHS and not on_gpu else "no test has shown it"


def load() -> Results:
    """The committed results."""
    return Results(json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json")))


def page(results: Results) -> str:
    """The whole page."""
    reasons: list[str] = []
    table = [f"| family | media | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 2) + "|"]
    for family in sorted(results.facts):
        for kind in KINDS:
            cells = [_cell(results, family, kind, feature, reasons) for feature in FEATURES]
            table.append(f"| {family if kind == KINDS[0] else ''} | {kind} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason[:1].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)]
    runs = [f"Run on: {f['device']}, torch {f['torch']}, {f['date']}: {len(f['tests'])} tests passed" + (
            f", {len(f['failed'])} failed" if f["failed"] else "") for f in results.files]  # fmt: skip
    parts = [HEAD, "\n".join(table), "\n".join(notes), "\n".join(runs), *_evidence(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(results: Results, family: str, kind: str, feature: str, reasons: list[str]) -> str:
    if results.proofs(family, kind, feature):
        return f"[✔](#{family})"
    reason = results.reason(family, kind, feature)
    if reason not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def _evidence(results: Results) -> Iterator[str]:
    """A section a family: its architectures, and the tests behind every ✔."""
    yield "## What proved it"
    for family in sorted(results.facts):
        names = ", ".join(f"`{name}`" for name in sorted(results.architectures[family]))
        rows = [f"### {family}\n", f"Architectures: {names}.\n", "| media | feature | tests |", "|---|---|---|"]
        for kind in KINDS:
            for feature in FEATURES:
                found = results.proofs(family, kind, feature)
                if found:
                    rows.append(f"| {kind} | {feature} | {', '.join(map(_short, found))} |")
        yield "\n".join(rows)


def _short(test: str) -> str:
    """A test's name without its folder: `TestQwen2VL::test_rung[chunked-image]`."""
    return f"`{test.partition('::')[2]}`"


def main() -> int:
    """Run, write or check; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--run", action="store_true", help="run the kits and write docs/support/*.json")
    action.add_argument("--write", action="store_true", help="write docs/support-matrix.md from these files")
    action.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="with --run: as pytest's -k")
    options = parser.parse_args()
    if options.run:
        return run(options.only)
    text = page(load())
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is out of date. Run: python tests/support_matrix.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
