"""`mm bench serve` against a server whose delays and faults are known."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import picture

from mm_core.bench.serve_figures import percentiles, read_objectives
from mm_core.bench.serve_http import Reply, Target, ask
from mm_core.bench.serve_loads import LOADS, Load, arrivals, conversations, media_part, question, select_loads, sized
from mm_core.bench.serve_report import read_document
from mm_core.bench.serve_run import check
from mm_core.cli import main
from mm_core.errors import ConfigError, DatasetError, EngineError

FIRST_S, GAP_S = 0.06, 0.02


@dataclass
class Fake:
    """An OpenAI server with known delays. bodies: of the calls so far. How a call is answered is its model's name."""

    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = json.loads(await reader.readexactly(int(length[1]))) if length else None
            self.heads.append(head)
            path = head.split(" ")[1]
            if path == "/v1/models":
                await reply(writer, 200, {"data": [{"id": "plain"}]})
            elif path == "/health":
                await asyncio.sleep(0.01)
                await reply(writer, 200, {"status": "ok"})
            elif path == "/v1/chat/completions" and body is not None:
                self.bodies.append(body)
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    if body["model"] == "silent":
                        await reader.read()  # until the client has enough of it
                    else:
                        await self.chat(body, writer)
                finally:
                    self.running -= 1
            else:
                await reply(writer, 404, {"error": {"message": "no such route", "code": "not_found"}})
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def chat(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        model, tokens = body["model"], body["max_tokens"]
        if model == "busy" and len(self.bodies) % 3 == 0:
            await reply(writer, 429, {"error": {"message": "too many wait", "code": "overloaded"}})
            return
        if model == "proxy":
            await reply(writer, 502, "<html>bad gateway</html>")
            return
        text = body["messages"][-1]["content"]
        words = text if isinstance(text, str) else text[-1]["text"]
        usage = {"prompt_tokens": 20 + text_tokens(model, words), "completion_tokens": tokens,
                 "prompt_tokens_details": {"cached_tokens": 5}}  # fmt: skip
        await asyncio.sleep(FIRST_S)
        if not body.get("stream"):
            await reply(writer, 200, {"choices": [{"message": {"content": "hm " * tokens}}], "usage": usage})
            return
        await self.stream(model, tokens, usage, writer)

    async def stream(self, model: str, tokens: int, usage: Any, writer: asyncio.StreamWriter) -> None:
        chunked = model != "until-close"
        ends = "\r\n" if model == "crlf" else "\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Connection: close\r\n\r\n")

        async def send(data: Any) -> None:
            text = data if isinstance(data, str) else "data: " + json.dumps(data) + 2 * ends
            raw = text.encode()
            framed = b"%x\r\n%s\r\n" % (len(raw), raw) if chunked else raw
            if model == "torn":  # every byte for itself: nothing may hang on how bytes come
                for byte in framed:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0)
            else:
                writer.write(framed)
                await writer.drain()

        await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await send(": a comment" + 2 * ends)
        for token in range(tokens):
            if token:
                await asyncio.sleep(GAP_S)
            if token == 2 and model == "broken":
                writer.transport.abort()
                return
            if token == 2 and model == "fails":
                await send({"error": {"message": "the engine died", "code": "engine_died"}})
                break
            told = (
                {"delta": {"content": ""}, "token_ids": [7]} if model == "ids" else {"delta": {"content": f"t{token} "}}
            )
            await send({"choices": [told]})
        if model not in ("no-usage", "fails"):
            await send({"choices": [], "usage": usage})
        if model != "no-done":
            await send("data: [DONE]" + 2 * ends)
        if chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()


def text_tokens(model: str, text: str) -> int:
    """As tokenizers count: numbers stand apart from letters. In "pairs" two equal digits are one token."""
    if model not in ("digits", "pairs"):
        return len(text) // 2
    digits = r"(\d)\1|\d" if model == "pairs" else r"\d"
    return sum(1 for _ in re.finditer(digits + r"|[^\W\d]{1,4}|\W", text))


async def reply(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    raw = (content if isinstance(content, str) else json.dumps(content)).encode()
    writer.write(b"HTTP/1.1 %d Some Text\r\nContent-Length: %d\r\n\r\n%s" % (status, len(raw), raw))
    await writer.drain()


@pytest.fixture(scope="module")
def loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture
def fake(loop_thread: asyncio.AbstractEventLoop) -> Iterator[Fake]:
    made = Fake()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(made.serve, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop_thread).result(5)
    made.port = server.sockets[0].getsockname()[1]
    yield made

    async def stop() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    asyncio.run_coroutine_threadsafe(stop(), loop_thread).result(5)


SMALL = ["--image-size", "28", "--warmup", "0", "--seed", "3"]


def bench(fake: Fake, folder: Path, *argv: str, model: str = "plain") -> dict[str, Any]:
    """The figures of a run of the command."""
    file = folder / "out.json"
    command = ["bench", "serve", "--url", fake.url, "--model", model, *SMALL, *argv, "--json", str(file)]
    assert main(command) == 0
    (figures,) = json.loads(file.read_text())["results"]
    return figures


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=37).tolist()
    found = percentiles(values)
    assert found is not None
    for p in (50, 90, 95, 99):
        assert found[f"p{p}"] == pytest.approx(np.percentile(values, p))
    assert (found["count"], found["max"]) == (37, max(values))
    assert percentiles([]) is None


def test_times_of_a_stream(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = bench(fake, tmp_path, "--requests", "20", "--rate", "40", "--output-tokens", "6", "--health")
    assert (figures["requests"], figures["errors"]) == ({"sent": 20, "good": 20, "failed": 0}, {})
    # Timers are never early; how late they are depends on the machine, medians least.
    assert FIRST_S * 1e3 - 1 <= figures["ttft_ms"]["p50"] <= FIRST_S * 1e3 + 100
    assert GAP_S * 1e3 - 5 <= figures["inter_token_ms"]["p50"] <= GAP_S * 1e3 + 30
    assert figures["inter_token_ms"]["count"] == 20 * 5
    assert GAP_S * 1e3 - 1 <= figures["per_token_ms"]["p50"] <= GAP_S * 1e3 + 60
    whole = (FIRST_S + 5 * GAP_S) * 1e3
    assert whole - 1 <= figures["e2e_ms"]["p50"] <= whole + 250
    assert figures["tokens"]["output"] == 120
    assert (figures["tokens"]["an_event"], figures["tokens"]["cached"]) == (1.0, 100)
    assert figures["output_tokens_per_s"] == pytest.approx(120 / figures["seconds"])
    assert figures["health"]["statuses"].keys() == {"200"}
    assert figures["health"]["latency_ms"]["p50"] >= 9
    assert figures["client"]["lag_ms"]["count"] == 20
    told = capsys.readouterr().out
    assert "20 answered, 0 failed" in told
    assert "first token" in told
    assert "/health" in told


def test_requests_are_what_was_asked_for(fake: Fake, tmp_path: Path) -> None:
    bench(fake, tmp_path, "--requests", "5", "--rate", "inf", "--output-tokens", "1", "--images", "2",
          "--extra-body", '{"top_k": 1}', "--api-key", "secret")  # fmt: skip
    assert len(fake.bodies) == 5
    seen, texts = set(), set()
    for body in fake.bodies:
        assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["top_k"]) == (1, True, 0.0, 1)
        assert body["stream_options"] == {"include_usage": True}
        (message,) = body["messages"]
        *images, text = message["content"]
        texts.add(text["text"])
        for part in images:
            head, data = part["image_url"]["url"].split(",")
            assert (part["type"], head) == ("image_url", "data:image/jpeg;base64")
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (28, 28)
            seen.add(data)
    assert (len(seen), len(texts)) == (10, 5)
    assert all("authorization: bearer secret" in head.lower() for head in fake.heads)


def test_a_burst_that_is_not_streamed(fake: Fake, tmp_path: Path) -> None:
    figures = bench(fake, tmp_path, "--workload", "serve-burst", "--requests", "30", "--output-tokens", "7")
    assert fake.most == 30  # all at once, whatever became of those before
    assert figures["load"]["rate"] is None
    assert (figures["requests"]["good"], figures["tokens"]["output"]) == (30, 210)
    assert (figures["ttft_ms"], figures["inter_token_ms"]) == (None, None)
    assert "stream" not in fake.bodies[0]


def test_max_concurrency_is_told_apart_from_being_late(fake: Fake, tmp_path: Path) -> None:
    figures = bench(
        fake, tmp_path, "--requests", "6", "--rate", "inf", "--output-tokens", "1", "--max-concurrency", "2"
    )
    assert fake.most == 2
    client = figures["client"]
    assert client["held_ms"]["max"] >= 2 * FIRST_S * 1e3 - 1
    assert client["lag_ms"]["p50"] < FIRST_S * 1e3


@pytest.mark.parametrize(
    ("model", "kind", "failed", "told"),
    [
        ("busy", "HTTP 429 overloaded", 3, "too many wait"),
        ("broken", "broken stream", 9, None),
        ("no-done", "broken stream", 9, None),
        ("fails", "stream error engine_died", 9, "the engine died"),
        ("proxy", "HTTP 502", 9, "<html>bad gateway</html>"),
    ],
)
def test_faults_are_counted_by_kind(fake: Fake, tmp_path: Path, model: str, kind: str, failed: int, told: Any) -> None:
    figures = bench(fake, tmp_path, "--requests", "9", "--rate", "200", "--output-tokens", "4", model=model)
    assert figures["requests"] == {"sent": 9, "good": 9 - failed, "failed": failed}
    assert figures["errors"] == {kind: {"count": failed, "told": [] if told is None else [told]}}
    assert figures["tokens"]["output"] == 4 * (9 - failed)  # what failed is in no figure
    assert (figures["ttft_ms"] is None) == (failed == 9)


def test_no_answer_in_time_and_no_server(fake: Fake, tmp_path: Path) -> None:
    argv = ["--requests", "2", "--rate", "inf", "--output-tokens", "1"]
    figures = bench(fake, tmp_path, *argv, "--timeout-s", "0.2", model="silent")
    assert figures["errors"] == {"timeout": {"count": 2, "told": ["no whole answer within 0.2 s"]}}
    gone = Fake(port=1)  # nothing listens there
    figures = bench(gone, tmp_path, *argv)
    assert list(figures["errors"]) == ["cannot connect (ConnectionRefusedError)"]


@pytest.mark.parametrize("model", ["torn", "until-close", "crlf", "no-usage", "ids"])
def test_streams_of_other_servers(fake: Fake, tmp_path: Path, model: str) -> None:
    figures = bench(fake, tmp_path, "--requests", "3", "--rate", "inf", "--output-tokens", "4", model=model)
    assert figures["errors"] == {}
    assert figures["tokens"]["output"] == 12
    assert figures["inter_token_ms"]["count"] == 9
    assert figures["tokens"]["without_usage"] == (3 if model == "no-usage" else 0)


def test_goodput(fake: Fake, tmp_path: Path) -> None:
    argv = ["--requests", "6", "--rate", "inf", "--output-tokens", "3", "--slo"]
    found = bench(fake, tmp_path, *argv, "ttft=10000", "itl=10000", "tpot=9000", "e2e=9000")["goodput"]
    assert (found["met"], found["share"]) == (6, 1.0)
    found = bench(fake, tmp_path, *argv, "ttft=10000", f"e2e={FIRST_S * 1e3}")["goodput"]
    assert (found["met"], found["met_each"]) == (0, {"ttft": 6, "e2e": 0})
    found = bench(fake, tmp_path, *argv, "ttft=10000", model="busy")["goodput"]
    assert found["share"] == found["met"] / 6  # what was refused kept nothing
    assert found["met"] < 6


def test_turns_of_a_conversation(fake: Fake, tmp_path: Path) -> None:
    argv = ["--workload", "serve-chat", "--requests", "3", "--rate", "inf", "--turns", "3", "--think-s", "0.05"]
    figures = bench(fake, tmp_path, *argv, "--output-tokens", "2")
    assert figures["requests"]["sent"] == 9
    assert [turn["requests"] for turn in figures["turns"]] == [3, 3, 3]
    last = max(fake.bodies, key=lambda body: len(body["messages"]))["messages"]
    assert [message["role"] for message in last] == ["user", "assistant"] * 2 + ["user"]
    assert last[1]["content"] == "t0 t1 "
    assert isinstance(last[0]["content"], list)
    assert isinstance(last[2]["content"], str)
    records = [dict(zip(figures["record_fields"], row, strict=True)) for row in figures["records"]]
    for number in range(3):
        mine = sorted((r for r in records if r["number"] == number), key=lambda r: r["turn"])
        assert all(late["sent"] >= early["ended"] + 0.05 for early, late in pairwise(mine))


def test_prompt_tokens_are_met(fake: Fake, tmp_path: Path) -> None:
    for wanted in (100, 41):
        figures = bench(fake, tmp_path, "--requests", "12", "--rate", "inf", "--output-tokens", "1",
                        "--prompt-tokens", str(wanted))  # fmt: skip
        assert (figures["tokens"]["prompt_min"], figures["tokens"]["prompt_max"]) == (wanted, wanted)
    argv = ["bench", "serve", "--url", fake.url, *SMALL, "--prompt-tokens", "7"]
    assert main(argv) == 1  # a request has 20 tokens here before its text


@pytest.mark.parametrize(
    ("workload", "model"), [pytest.param("serve-text", "digits", marks=pytest.mark.slow), ("serve-burst", "pairs")]
)
def test_prompt_tokens_are_those_of_measured_requests(fake: Fake, tmp_path: Path, workload: str, model: str) -> None:
    argv = ["--workload", workload, "--requests", "12", "--rate", "inf", "--output-tokens", "1", "--prompt-tokens"]
    for wanted in (60, 61, 62, 200):
        fake.bodies.clear()
        tokens = bench(fake, tmp_path, *argv, str(wanted), model=model)["tokens"]
        assert (tokens["prompt_min"], tokens["prompt_max"]) == (wanted, wanted)
        asked = [body["messages"][0]["content"] for body in fake.bodies]
        fitting, own = asked[:-12], asked[-12:]
        assert not any(message in fitting for message in own), "no measured request was cached"
        if workload == "serve-burst":
            urls = [{message[0]["image_url"]["url"] for message in messages} for messages in (fitting, own)]
            assert not urls[0] & urls[1]


def test_a_latency_that_cannot_be_measured_is_told(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--requests", "4", "--rate", "inf", "--slo", "itl=10000", "e2e=10000", "--output-tokens"]
    assert bench(fake, tmp_path, *argv, "1")["goodput"]["unmeasured"] == {"itl": 4, "e2e": 0}
    assert "itl could not be measured for 4 of 4 answers; they keep no bound" in capsys.readouterr().out
    bench(fake, tmp_path, *argv, "2")
    assert "could not be measured" not in capsys.readouterr().out


def test_faults_end_in_one_full_stop(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match=r"failed: HTTP 404: It is where it is\. Check --url"):
        check(Reply(error="HTTP 404", detail="It is where it is."), "The warm-up")
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 1
    assert ".." not in capsys.readouterr().err


def test_several_processes_share_a_load(fake: Fake, tmp_path: Path) -> None:
    argv = ["--requests", "11", "--rate", "40", "--output-tokens", "2", "--items", "4", "--exponent", "1"]
    several = bench(fake, tmp_path, *argv, "--processes", "2")
    mine = sorted(json.dumps(body, sort_keys=True) for body in fake.bodies)
    fake.bodies.clear()
    alone = bench(fake, tmp_path, *argv)
    assert several["requests"] == alone["requests"] == {"sent": 11, "good": 11, "failed": 0}
    assert mine == sorted(json.dumps(body, sort_keys=True) for body in fake.bodies)
    due = [[dict(zip(f["record_fields"], row, strict=True))["due"] for row in f["records"]] for f in (several, alone)]
    assert due[0] == sorted(due[1])


def test_warm_up_has_other_pictures(fake: Fake, tmp_path: Path) -> None:
    bench(fake, tmp_path, "--requests", "4", "--rate", "inf", "--output-tokens", "20", "--warmup", "3")
    warm, own = fake.bodies[:3], fake.bodies[3:]
    assert [body["max_tokens"] for body in warm + own] == [8] * 3 + [20] * 4
    seen = [{json.dumps(body["messages"]) for body in bodies} for bodies in (warm, own)]
    assert not seen[0] & seen[1]


def test_warm_up_tells_what_is_wrong(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", fake.url, "--model", "proxy", "--image-size", "28", "--requests", "2"]) == 1
    assert "The warm-up failed: HTTP 502" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", f"{fake.url}/elsewhere"]) == 1
    assert "lists no model (status 404)" in capsys.readouterr().err


def test_a_dataset(fake: Fake, tmp_path: Path) -> None:
    picture(0, 20, 20).save(tmp_path / "a.png")
    (tmp_path / "s.wav").write_bytes(b"RIFF0000WAVEfmt ")
    entries = [{"prompt": "one", "media": ["a.png", "s.wav"], "output_tokens": 2}, {"prompt": "two"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, entries)))
    argv = ["--dataset", str(tmp_path / "set.jsonl"), "--rate", "inf"]
    assert bench(fake, tmp_path, *argv)["requests"]["sent"] == 2
    assert bench(fake, tmp_path, *argv, "--requests", "5")["requests"]["sent"] == 5
    bodies = sorted(fake.bodies[:2], key=lambda body: body["max_tokens"])
    assert [body["max_tokens"] for body in bodies] == [2, 128]
    image, sound, text = bodies[0]["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].split(",")[1]) == (tmp_path / "a.png").read_bytes()
    assert image["image_url"]["url"].startswith("data:image/png;")
    assert sound["input_audio"] == {"format": "wav", "data": base64.b64encode(b"RIFF0000WAVEfmt ").decode()}
    assert (text["text"], bodies[1]["messages"][0]["content"]) == ("one", "two")


def test_arrivals_meet_the_rate_and_follow_their_law() -> None:
    load = Load("x", "text", 4000, rate=50.0, images=0)
    times = np.array(arrivals(load))
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert times[-1] < 80.0 < times[-1] + 1
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, abs=0.08)  # of a Poisson process
    bursty = np.diff(arrivals(replace(load, burstiness=0.25)))
    assert np.std(bursty) / np.mean(bursty) == pytest.approx(2.0, abs=0.25)  # shape^-1/2
    assert arrivals(load) == arrivals(load) != arrivals(replace(load, seed=1))
    assert arrivals(replace(load, rate=float("inf"), requests=3)) == [0.0] * 3


def test_shared_pictures_follow_zipfs_law() -> None:
    load = Load("x", "image", 600, items=10, exponent=1.0, image_size=8)
    shown = [talk.turns[0][2] for talk in conversations(load)]
    counts = sorted((shown.count(data) for data in set(shown)), reverse=True)
    assert len(counts) == 10
    assert counts[0] / 600 == pytest.approx(1 / sum(1 / k for k in range(1, 11)), abs=0.07)
    in_turns = [talk.turns[0][2] for talk in conversations(replace(load, exponent=0.0, requests=20))]
    assert in_turns[:10] == in_turns[10:]
    assert len(set(in_turns)) == 10


def test_questions_are_cut_and_keep_their_number() -> None:
    load = Load("x", "text", 1, images=0)
    for characters in (1, 10, 30, 500):
        texts = [question(replace(load, characters=characters), number) for number in (1, 2)]
        assert all(len(text) == characters for text in texts)
        assert characters == 1 or texts[0] != texts[1]


@pytest.mark.parametrize(
    ("modality", "data", "kind"),
    [("image", b"\xff\xd8\xff\xe0", "data:image/jpeg"), ("image", b"RIFFxxxxWEBP", "data:image/webp"),
     ("video", b"\x00\x00\x00 ftyp", "data:video/mp4"), ("video", b"\x1aE\xdf\xa3", "data:video/webm"),
     ("audio", b"fLaC", '"flac"'), ("audio", b"OggS", '"ogg"')],
)  # fmt: skip
def test_media_types(modality: str, data: bytes, kind: str) -> None:
    part = b"".join(media_part(modality, data))
    assert kind in part.decode()
    assert json.loads(part)["type"] == ("input_audio" if modality == "audio" else f"{modality}_url")


def test_named_loads_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--help"])
    told = capsys.readouterr().out
    for load in LOADS.values():
        assert re.search(rf"  {load.name} +{load.requests} ", told)
    assert sized(LOADS["serve-poisson-25"], {}, 2.0).requests == 50


def test_report_and_comparison(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "8", "--rate", "100", "--output-tokens", "3", "--slo", "ttft=500"]
    for name, model in (("ours", "plain"), ("<peer>", "busy")):
        argv = ["bench", "serve", "--url", fake.url, "--model", model, *SMALL, *load, "--label", name]
        assert main([*argv, "--json", str(tmp_path / f"{model}.json"), "--html", str(tmp_path / f"{model}.html")]) == 0
    capsys.readouterr()
    both = ["--compare", str(tmp_path / "plain.json"), "--compare", str(tmp_path / "busy.json")]
    assert main(["bench", "serve", *both, "--html", str(tmp_path / "both.html")]) == 0
    assert "<peer>" in capsys.readouterr().out
    text = (tmp_path / "both.html").read_text()
    assert "&lt;peer&gt;" in text
    assert "<peer>" not in text
    assert not re.search(r"(?:src|href)=|https?://(?!127)", text)  # one file, which loads nothing
    plots = re.findall(r"<svg.*?</svg>", text)
    assert len(plots) == 2 + 3 + 3 + 2
    for plot in plots:
        root = ET.fromstring(plot)
        numbers = [e.get(n) for e in root.iter() for n in ("x", "y", "width", "height", "points") if e.get(n)]
        assert "nan" not in " ".join(map(str, numbers))
    assert "HTTP 429 overloaded" in text
    assert read_document(tmp_path / "plain.json")["label"] == "ours"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DatasetError, match="was not written by"):
        read_document(tmp_path / "other.json")


@pytest.mark.parametrize(
    "argv",
    [[], ["--url", "http://x", "--workload", "serve-text", "--dataset", "x"], ["--json", "x"],
     ["--url", "http://x", "--requests", "1", "--duration", "1"], ["--url", "http://x", "--rate", "0"],
     ["--url", "http://x", "--rate", "nan"], ["--url", "http://x", "--extra-body", "[]"],
     ["--url", "http://x", "--warmup", "-1"], ["--url", "http://x", "--dataset", "x", "--prompt-tokens", "3"]],
)  # fmt: skip
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *argv])
    assert caught.value.code == 2
    assert "usage: mm bench serve" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{bad", "[]", "3"])
def test_an_extra_body_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--url", "http://x", "--extra-body", text])
    assert "mm bench serve: error: --extra-body is a JSON object\n" in capsys.readouterr().err


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="'fly' is no workload"):
        select_loads("serve-text,fly")
    with pytest.raises(ConfigError, match="named twice"):
        select_loads("serve-text,serve-text")
    with pytest.raises(ConfigError, match="want NAME=MS"):
        read_objectives(["ttft=0"])
    with pytest.raises(ConfigError, match="want NAME=MS"):
        read_objectives(["speed=3"])
    with pytest.raises(ConfigError, match="needs a --rate"):
        sized(LOADS["serve-burst"], {}, 3.0)
    with pytest.raises(ConfigError, match="Share some with --items"):
        conversations(Load("x", "image", 10**6))
    for url in ("localhost:8000", "ftp://x", "http://x:notaport", "http://x/?a=1"):
        with pytest.raises(ConfigError, match="no address"):
            Target.of(url)
    assert Target.of("http://[::1]:80/v1/").base == "/v1"
    assert Target.of("https://host/api").base == "/api/v1"


def test_what_is_no_http_is_an_error(loop_thread: asyncio.AbstractEventLoop) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-nothing\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            target = Target.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return await ask(target, [target.head("GET", "/", 0)], 5)

    reply = asyncio.run_coroutine_threadsafe(run(), loop_thread).result(10)
    assert str(reply.error).startswith("no HTTP")
