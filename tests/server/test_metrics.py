"""/metrics: every family is there, and its numbers are what was sent."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import ROOT, Server, running_server

from mm_core.engine.health import EngineHealth
from mm_core.server.gate import Gate
from mm_core.server.histogram import Histogram
from mm_core.server.metrics import Metrics, TokenGaps, media_codes
from mm_core.server.snapshots import COUNTERS, Snapshots
from mm_core.types import CompletionOutput, RequestMetrics, RequestOutput, Usage

SCENE = ROOT / "zoo" / "qwen2vl-nano" / "samples" / "demo" / "scene.jpg"
DASHBOARD = ROOT / "deploy" / "grafana" / "mm-core.json"
PAGE = ROOT / "docs" / "metrics.md"
FAMILIES = {
    "engine_up", "engine_state", "engine_restarts", "engine_steps", "num_requests_running", "num_requests_waiting",
    "kv_cache_usage_perc", "kv_blocks", "kv_block_evictions", "leaked_blocks", "prefix_cache_queries",
    "prefix_cache_hits", "external_prefix_cache_queries", "external_prefix_cache_hits", "cached_tokens",
    "mm_cache_queries", "mm_cache_hits", "encoder_cache_queries", "encoder_cache_hits", "encoder_cache_used_tokens",
    "num_preemptions", "prompt_tokens", "generation_tokens", "computed_tokens", "encoded_tokens", "request_success",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_admit_time_seconds", "request_prepare_time_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "encoder_seconds", "media_decode_seconds",
    "media_fetch_seconds", "media_rejects", "request_errors", "request_aborts", "http_requests", "calls_in_flight",
    "calls_waiting", "calls_refused", "pending_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def counted() -> Iterator[Server]:
    """A server that nobody else asks, and that has no page."""
    with running_server(keys=("key-of-metrics",), no_playground=True) as running:
        yield running


class Scrape:
    """What one look at /metrics gave."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.names = {family.name for family in families}
        self.samples = [sample for family in families for sample in family.samples]
        assert all(family.documentation and family.type != "unknown" for family in families)
        assert len({(s.name, tuple(sorted(s.labels.items()))) for s in self.samples}) == len(self.samples)

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample with these labels; 0 where there is none."""
        found = [
            s.value for s in self.samples
            if s.name == f"mm:{name}" and all(s.labels.get(key) == value for key, value in labels.items())
        ]  # fmt: skip
        assert len(found) <= 1, (name, labels)
        return found[0] if found else 0.0


def scrape(server: Server) -> Scrape:
    time.sleep(0.25)  # the engine's counters are shared among scrapers for 0.2 s
    with server.http() as client:
        reply = client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(reply.text)


def ask(server: Server, question: str, *, stream: bool, picture: bytes = SCENE.read_bytes(), **options: Any) -> Any:
    """An answer's usage; of a stream that of its last chunk."""
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    with server.client() as client:
        asked = client.chat.completions.create(
            model="qwen2vl-nano", messages=[{"role": "user", "content": content}], max_tokens=24, temperature=0,
            stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}), **options,
        )  # fmt: skip
        return list(asked)[-1].usage if stream else asked.usage


def test_numbers_are_what_was_sent(counted: Server) -> None:
    before = scrape(counted)
    usages = [
        ask(counted, "Name every shape, from left to right.", stream=False),
        ask(counted, "Name every shape, from left to right.", stream=True),
        ask(counted, "What is below the blue heart?", stream=True, n=2),
    ]
    after = scrape(counted)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert {f"mm:{name}" for name in FAMILIES} <= after.names
    details = [usage.prompt_tokens_details for usage in usages]
    prompts = sum(usage.prompt_tokens for usage in usages)
    tokens = sum(usage.completion_tokens for usage in usages)
    media = sum(each.media_tokens for each in details)
    assert details[1].cached_tokens > 0  # the path under test ran
    assert grown("generation_tokens_total") == tokens
    # The second of two answers to one prompt is a sequence of its own; its prompt is looked for, too.
    assert grown("prompt_tokens_total") == prompts + usages[2].prompt_tokens
    assert grown("prefix_cache_queries_total") == grown("prompt_tokens_total")
    hits = grown("prefix_cache_hits_total")
    assert sum(each.cached_tokens for each in details) <= hits < grown("prefix_cache_queries_total")
    assert grown("cached_tokens_total", level="device") == hits
    assert grown("computed_tokens_total") >= prompts - hits
    assert grown("encoder_cache_queries_total") == media
    assert grown("encoder_cache_hits_total") == media - sum(each.encoded_media_tokens for each in details)
    assert grown("encoded_tokens_total") == details[0].encoded_media_tokens == details[0].media_tokens
    assert grown("mm_cache_queries_total") == 3
    assert grown("mm_cache_hits_total") == 2
    assert grown("request_success_total", finished_reason="stop") == 4
    assert grown("http_requests_total", route="/v1/chat/completions", status="200") == 3
    assert grown("encoder_seconds_count") == grown("media_decode_seconds_count", modality="image") == 1
    assert grown("encoder_seconds_sum") > 0
    assert grown("media_decode_seconds_sum", modality="image") > 0
    assert grown("inter_token_latency_seconds_count") == tokens - 4  # all but the first of each answer
    spans = {name: grown(f"{name}_seconds_sum") for name in (
        "e2e_request_latency", "time_to_first_token", "request_admit_time", "request_prepare_time",
        "request_queue_time", "request_prefill_time", "request_decode_time",
    )}  # fmt: skip
    for name, seconds in spans.items():
        assert grown(f"{name}_seconds_count") == grown(f"{name}_seconds_bucket", le="+Inf") == 3, name
        assert seconds > 0, name
    parts = spans["request_admit_time"] + spans["request_prepare_time"] + spans["request_queue_time"]
    assert parts + spans["request_prefill_time"] == pytest.approx(spans["time_to_first_token"], rel=1e-3)
    assert spans["time_to_first_token"] + spans["request_decode_time"] <= spans["e2e_request_latency"]
    assert after.value("engine_up") == after.value("engine_state", state="ready") == 1
    assert after.value("num_requests_running") == after.value("num_requests_waiting") == 0
    assert after.value("leaked_blocks") == after.value("kv_cache_usage_perc") == 0
    assert sum(s.value for s in after.samples if s.name == "mm:kv_blocks") == 512


def test_refusals_and_aborts_are_counted(counted: Server) -> None:
    before = scrape(counted)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(counted, "What is it?", stream=False, picture=b"\xff\xd8 no picture")
    with counted.http() as client:
        assert client.get("/absent").status_code == 404
        body = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": "hi"}], "stream": True,
                "max_tokens": 400, "ignore_eos": True}  # fmt: skip
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())
    for _ in range(40):
        after = scrape(counted)
        if any(s.name == "mm:request_aborts_total" for s in after.samples):
            break
    code = refused.value.code
    assert code in ("invalid_image", "unsupported_media")
    assert after.value("media_rejects_total", code=code) == 1
    assert before.value("media_rejects_total", code=code) == 0
    assert after.value("request_errors_total", code=code) == 1
    assert after.value("http_requests_total", route="(none)", status="404") == 1
    assert after.value("request_aborts_total", phase="decode", reason="disconnect") == 1
    assert after.value("leaked_blocks") == 0
    assert after.value("calls_in_flight") == 0


def test_who_may_read(counted: Server) -> None:
    with httpx.Client(base_url=counted.url, trust_env=False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=counted.headers(counted.admin_key)).status_code == 200


def test_there_need_be_no_page(counted: Server) -> None:
    with counted.http() as client:
        for path in ("/", "/playground/app.js", "/playground/info", "/playground/live"):
            assert client.get(path).status_code == 404, path


@pytest.mark.slow
def test_counters_survive_the_engines_end(counted: Server) -> None:
    ask(counted, "Where is the brown ring?", stream=True)
    before = scrape(counted)
    assert before.value("generation_tokens_total") > 0
    os.kill(counted.stats()["engine"]["engine_process"]["pid"], signal.SIGKILL)
    seen_down = False
    for _ in range(400):
        down = scrape(counted)
        seen_down = seen_down or down.value("engine_up") == 0
        assert down.value("generation_tokens_total") == before.value("generation_tokens_total")
        if seen_down and down.value("engine_up") == 1:
            break
    assert seen_down
    usage = ask(counted, "Where is the brown ring?", stream=True)
    after = scrape(counted)
    assert after.value("engine_restarts_total") == 1
    for name, more in (("generation", usage.completion_tokens), ("prompt", usage.prompt_tokens)):
        assert after.value(f"{name}_tokens_total") == before.value(f"{name}_tokens_total") + more
    fallen = [s for s in before.samples if s.name.endswith(("_total", "_count", "_sum", "_bucket"))
              and s.name.startswith("mm:") and after.value(s.name[3:], **s.labels) < s.value]  # fmt: skip
    assert fallen == []


def test_a_second_life_adds_to_the_first() -> None:
    snapshots = Snapshots()
    assert snapshots.counters == {}
    snapshots.put({})  # an engine that told nothing yet
    snapshots.put({"steps": 7, "generated_tokens": 20, "prompt_hits": {"device": 5, "host": 1, "disk": 0}})
    snapshots.put({"steps": 2, "generated_tokens": 30, "prompt_hits": {"device": 0, "host": 2, "disk": 0}})
    found = snapshots.counters
    assert found["steps"] == 9
    assert found["generated_tokens"] == 50
    assert (found["device_hits"], found["host_hits"], found["disk_hits"]) == (5, 3, 0)
    assert set(found) == {*COUNTERS, "device_hits", "host_hits", "disk_hits"}


def test_tokens_from_host_and_disk_are_the_external_ones() -> None:
    counters = Metrics("m")
    counters.snapshots.put({
        "steps": 1, "queried_tokens": 100, "prompt_hits": {"device": 30, "host": 20, "disk": 10}, "host_cache": {},
        "blocks": {"free": 5, "cached": 2, "in_use": 3, "pending": 0}, "running": 0, "waiting": 0, "steps_in_flight": 0,
    })  # fmt: skip
    found = Scrape(counters.render(EngineHealth("stuck"), Gate(1, 1)).decode())
    assert found.value("prefix_cache_queries_total") == 100
    assert found.value("prefix_cache_hits_total") == 30
    assert found.value("external_prefix_cache_queries_total") == 70
    assert found.value("external_prefix_cache_hits_total") == 30
    assert found.value("kv_cache_usage_perc") == pytest.approx(0.3)
    assert found.value("leaked_blocks") == 3
    assert found.value("engine_up") == 0
    assert found.value("engine_state", state="stuck") == 1


def test_gaps_are_shared_out_among_the_tokens_of_an_update() -> None:
    gaps = Histogram((0.1, 1.0))
    one = TokenGaps(gaps)
    one.add(_output([1], 10.0, 10.0))
    assert gaps.count == 0
    one.add(_output([3], 10.0, 11.0))
    one.add(_output([3], 10.0, 11.0))  # no news
    assert (gaps.count, gaps.total) == (2, 1.0)
    two = TokenGaps(gaps)
    two.add(_output([1, 0], 0.0, 0.0))
    two.add(_output([1, 1], 0.0, 0.5))  # the second answer's first token: no gap
    two.add(_output([3, 3], 0.0, 4.5))  # two gaps of 2 s in each
    assert (gaps.count, gaps.total) == (6, 9.0)
    assert gaps.buckets() == [("0.1", 0.0), ("1.0", 2.0), ("+Inf", 6.0)]


def _output(tokens: list[int], first: float, last: float) -> RequestOutput:
    outputs = tuple(CompletionOutput(index, "", (0,) * count) for index, count in enumerate(tokens))
    times = RequestMetrics(0.0, 0.0, first, last)
    return RequestOutput("r", (), outputs, Usage(completion_tokens=sum(tokens)), False, times)


def test_every_code_of_media_is_among_the_rejects() -> None:
    package = ROOT / "core" / "src" / "mm_core"
    found = set()
    for path in [*package.glob("media/*.py"), *package.glob("inputs/f*.py"), package / "server" / "intake.py"]:
        found |= set(re.findall(r'code="([a-z_]+)"', path.read_text(encoding="utf-8")))
    assert found
    assert found <= media_codes()


def _metric_names(text: str) -> set[str]:
    names = set(re.findall(r"mm:[a-z0-9_]+", text))
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}


@pytest.mark.parametrize("path", [DASHBOARD, PAGE], ids=["dashboard", "page"])
def test_every_metric_that_is_named_exists(path: Path) -> None:
    wanted = {f"mm:{name}" for name in FAMILIES}
    found = _metric_names(path.read_text(encoding="utf-8"))
    assert found <= wanted, sorted(found - wanted)
    if path == PAGE:
        assert found == wanted, sorted(wanted - found)


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["targets"] and panel["title"] and panel["description"] for panel in panels)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert 'model_name=~"$model"' in expression
            for name, suffix in re.findall(r"mm:([a-z0-9_]+?)(_total|_bucket|_sum|_count)?(?=\{)", expression):
                assert (name in FAMILIES) is True, name
                assert suffix or "rate(" not in expression, expression
            used = set(re.findall(r"\$\{?([a-z_]+)", expression)) - {"__rate_interval"}
            assert {name for name in used if not name.startswith("__")} <= variables
