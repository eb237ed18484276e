"""The comparison of policies and tiers on a small model: that it measures what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "reuse_zipf.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reuse_zipf", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["reuse_zipf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--json` would hold of two short runs, in this process."""
    setting = replace(script.TINY, requests=60, pictures=12)
    runs = {}
    for run in ("fcfs", "reuse"):
        bench = script.Bench(setting, run, tmp_path_factory.mktemp("zipf"))
        assert (bench.frontend.config.scheduling_policy, bench.host) == (run, run == "reuse")
        found = {"environment": {"device": "here"}, **bench.throughput()}
        if bench.host:
            scheduler = bench.frontend._core.scheduler
            scheduler.policy = replace(scheduler.policy, restores=lambda *_: True)
            found["first_token_ms"] = bench.first_tokens()
        bench.engine.close()
        runs[run] = found
    return {"setting": asdict(setting), "runs": json.loads(json.dumps(runs))}


def test_what_is_counted(script: ModuleType, kept: dict[str, Any]) -> None:
    for result in kept["runs"].values():
        assert (result["prompt_tokens"], result["media_tokens_each"]) == (60 * 54, 16)
        assert result["requests_per_s"] == pytest.approx(60 / result["seconds"])
        assert 0 < result["cached_tokens"] < result["prompt_tokens"]
        assert result["counters"]["encoded_items"] >= result["pictures_asked_for"] > 6
        assert result["counters"]["processor_cache"]["misses"] == 0, "pictures were prepared ahead"
    assert script.ratio(kept["runs"]) > 0
    assert "host_cache" not in kept["runs"]["fcfs"]["counters"]


def test_the_kinds_of_first_tokens(kept: dict[str, Any]) -> None:
    first = kept["runs"]["reuse"]["first_token_ms"]
    assert len(first["computed"]["all"]) >= 12
    assert len(first["restored"]["all"]) >= 4
    assert len(first["on the device"]["all"]) >= 4
    assert all(times["median"] > 0 for times in first.values())


def test_the_page(script: ModuleType, kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "benchmarks" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    (tmp_path / "found.json").write_text(json.dumps(kept))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    script.write_docs(tmp_path / "found.json")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    for words in ("| fcfs |", "| reuse |", "60 requests", "copy a picture back", "host memory"):
        assert words in text, words
    real = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "README.md"
    assert script.BEGIN in real.read_text(encoding="utf-8")


def test_settings_survive_the_way_to_a_child(script: ModuleType) -> None:
    setting = replace(script.Setting(), requests=7)
    assert script.Setting(**json.loads(json.dumps(asdict(setting)))) == setting
