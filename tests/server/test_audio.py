"""/v1/audio/transcriptions and /v1/audio/translations with the official client, against a real server process.

A tiny random Whisper hears tones: what it says is nonsense, but always the same, and the same as without a server.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from support.hearing import (
    GOOD,
    KEYS,
    LONG,
    MODEL,
    RATE,
    SAME,
    SAMPLES,
    SEEDED,
    SHORT,
    VERBOSE,
    canary,
    error_of,
    idle,
    post,
    sound,
    wav,
)
from support.serving import Server, running_server

from mm_core import Engine
from mm_core.server.subtitles import to_srt, to_vtt


@pytest.fixture(scope="module")
def client(whisper: Server) -> Iterator[Any]:
    with whisper.client() as made:
        yield made


@pytest.fixture(scope="module")
def wanted(offline: Engine) -> Any:
    heard = offline.transcribe((SAMPLES, RATE), **SAME)
    assert len(heard.segments) > 2
    assert len({segment.seek for segment in heard.segments}) > 1, "one window proves nothing"
    assert len(heard.text) > 5
    return heard


# -- the formats -------------------------------------------------------------------------


def test_json_and_text_are_what_the_engine_hears(client: Any, wanted: Any) -> None:
    reply = client.audio.transcriptions.create(file=("talk.wav", LONG), model=MODEL, **SEEDED)
    assert reply.text == wanted.text
    assert (reply.usage.type, reply.usage.seconds) == ("duration", 42.0)
    text = client.audio.transcriptions.create(file=LONG, model=MODEL, response_format="text", **SEEDED)
    assert text == wanted.text + "\n"


def test_verbose_json_has_every_segment(client: Any, wanted: Any) -> None:
    reply = client.audio.transcriptions.create(
        file=("talk.wav", LONG),
        model=MODEL,
        response_format="verbose_json",
        timestamp_granularities=["segment"],
        **SEEDED,
    )
    assert (reply.text, reply.language, reply.duration, reply.task) == (
        wanted.text,
        wanted.language,
        42.0,
        "transcribe",
    )
    assert [segment.id for segment in reply.segments] == list(range(len(wanted.segments)))
    for ours, theirs in zip(reply.segments, wanted.segments, strict=True):
        assert ours.tokens == list(theirs.tokens)
        assert (ours.start, ours.end, ours.text, ours.seek) == (theirs.start, theirs.end, theirs.text, theirs.seek)
        assert ours.temperature == 0.5
        for name in ("avg_logprob", "no_speech_prob", "compression_ratio"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-5), name


def test_subtitles(client: Any, wanted: Any) -> None:
    spans = [(s.start, s.end, s.text) for s in wanted.segments]
    ask = client.audio.transcriptions.create
    assert ask(file=LONG, model=MODEL, response_format="srt", **SEEDED) == to_srt(spans)
    assert ask(file=LONG, model=MODEL, response_format="vtt", **SEEDED) == to_vtt(spans)
    with_types = client.audio.transcriptions.with_raw_response.create
    kinds = {"srt": "application/x-subrip", "vtt": "text/vtt", "text": "text/plain", "json": "application/json"}
    for form, kind in kinds.items():
        found = with_types(file=SHORT, model=MODEL, response_format=form, **SEEDED).headers["content-type"]
        assert found.partition(";")[0] == kind


def test_translations_and_the_given_language(client: Any, offline: Engine, wanted: Any) -> None:
    said = offline.transcribe((SAMPLES, RATE), task="translate", **SAME)
    with warnings.catch_warnings():  # the client's own, from some version on
        warnings.simplefilter("ignore", DeprecationWarning)
        reply = client.audio.translations.create(
            file=("talk.wav", LONG), model=MODEL, response_format="verbose_json", **SEEDED
        )
    assert (reply.text, reply.task) == (said.text, "translate")
    assert said.text != wanted.text
    other = next(code for code in ("en", "de", "fr") if code != wanted.language)
    french = offline.transcribe((SAMPLES, RATE), language=other, initial_prompt="The cat sleeps.", **SAME)
    reply = client.audio.transcriptions.create(
        file=LONG, model=MODEL, language=other, prompt="The cat sleeps.", response_format="verbose_json", **SEEDED
    )
    assert (reply.text, reply.language) == (french.text, other)
    assert french.text != wanted.text


def test_without_a_temperature_poor_answers_are_asked_again(client: Any, offline: Engine) -> None:
    samples = sound(3.0, 8)
    heard = offline.transcribe((samples, RATE), seed=5)
    for extra in ({}, {"temperature": 0.0}):
        reply = client.audio.transcriptions.create(
            file=wav(samples), model=MODEL, response_format="verbose_json", extra_body={"seed": 5}, **extra
        )
        assert [s.tokens for s in reply.segments] == [list(s.tokens) for s in heard.segments]
    assert {s.temperature for s in heard.segments} == {1.0}, "a random model is never sure"


# -- streaming ---------------------------------------------------------------------------


def test_a_stream_tells_each_window_when_it_is_heard(client: Any, wanted: Any) -> None:
    deltas, when = [], []
    done = None
    begin = time.monotonic()
    for event in client.audio.transcriptions.create(file=("talk.wav", LONG), model=MODEL, stream=True, **SEEDED):
        assert done is None, "the last event is the last"
        if event.type == "transcript.text.delta":
            deltas.append(event.delta)
            when.append(time.monotonic() - begin)
        else:
            assert event.type == "transcript.text.done"
            done = event
    total = time.monotonic() - begin
    assert done is not None
    assert done.text == "".join(deltas) == wanted.text
    assert len(deltas) > 1
    assert when[0] < 0.9 * total, "told at the end only"
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0


def test_a_stream_on_the_wire(whisper: Server) -> None:
    with whisper.http() as http:
        form = {"model": MODEL, "stream": "true", "response_format": "text", "temperature": "0.5", "seed": "5"}
        reply = http.post("/v1/audio/translations", data=form, files={"file": SHORT})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[-3][6:])["type"] == "transcript.text.done"


@pytest.mark.parametrize("form", ["srt", "vtt", "verbose_json"])
def test_formats_that_are_known_at_the_end_are_no_streams(client: Any, form: str) -> None:
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.audio.transcriptions.create(file=SHORT, model=MODEL, stream=True, response_format=form)


# -- what is refused ---------------------------------------------------------------------


FILE = {"file": ("talk.wav", SHORT)}
BAD_FORMS: dict[str, tuple[Any, Any, int, str, str | None]] = {
    "no file": (GOOD, {"other": b"x"}, 400, "invalid_body", "other"),
    "no file at all": ({**GOOD, "a": "1"}, None, 400, "invalid_body", None),
    "the file as text": (GOOD, None, 400, "invalid_body", None),
    "two files": (GOOD, [("file", ("a", SHORT)), ("file", ("b", SHORT))], 400, "invalid_body", "file"),
    "no model": ({}, FILE, 400, "invalid_body", "model"),
    "another model": ({"model": "gpt-4o-transcribe"}, FILE, 404, "model_not_found", "model"),
    "an unknown field": ({**GOOD, "chunking_strategy": "auto"}, FILE, 400, "invalid_body", "chunking_strategy"),
    "a field twice": ({"model": [MODEL, MODEL]}, FILE, 400, "invalid_body", "model"),
    "an unknown format": ({**GOOD, "response_format": "xml"}, FILE, 400, "invalid_body", "response_format"),
    "words": ({**GOOD, "timestamp_granularities[]": ["word"], "response_format": "verbose_json"}, FILE, 400,
              "invalid_params", "timestamp_granularities"),
    "segments without verbose_json": ({**GOOD, "timestamp_granularities[]": ["segment"]}, FILE, 400, "invalid_params",
                                      "timestamp_granularities"),
    "temperature NaN": ({**GOOD, "temperature": "NaN"}, FILE, 400, "invalid_body", "temperature"),
    "temperature 1e400": ({**GOOD, "temperature": "1e400"}, FILE, 400, "invalid_body", "temperature"),
    "temperature -1": ({**GOOD, "temperature": "-1"}, FILE, 400, "invalid_body", "temperature"),
    "temperature 1.5": ({**GOOD, "temperature": "1.5"}, FILE, 400, "invalid_body", "temperature"),
    "stream=yes": ({**GOOD, "stream": "yes"}, FILE, 400, "invalid_body", "stream"),
    "seed 2^63": ({**GOOD, "seed": str(2**63)}, FILE, 400, "invalid_body", "seed"),
    "seed 1.5": ({**GOOD, "seed": "1.5"}, FILE, 400, "invalid_body", "seed"),
    "a language of no one": ({**GOOD, "language": "xx"}, FILE, 400, "invalid_params", "language"),
    "a long prompt": ({**GOOD, "prompt": "a" * 10_000}, FILE, 400, "invalid_body", "prompt"),
    "a longer prompt": ({**GOOD, "prompt": "a" * 100_000}, FILE, 413, "body_too_large", "prompt"),
    "special tokens in the prompt": ({**GOOD, "prompt": "a <|endoftext|> b"}, FILE, 400, "invalid_params", "prompt"),
    "a bad salt": ({**GOOD, "cache_salt": "../x"}, FILE, 400, "invalid_body", "cache_salt"),
    "many fields": ({**GOOD, **{f"f{i}": "1" for i in range(100)}}, FILE, 400, "invalid_body", None),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_FORMS)
def test_bad_forms(whisper: Server, row: str) -> None:
    data, files, status, code, param = BAD_FORMS[row]
    reply = post(whisper, data, files)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (status, code), error
    if param is not None:
        assert error["param"] == param


def test_broken_bodies(whisper: Server) -> None:
    kind = {"content-type": "multipart/form-data; boundary=XX"}
    part = b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + MODEL.encode() + b"\r\n"
    for headers, body in (
        (kind, part), (kind, b""), (kind, b"--XX--\r\n"), (kind, b'{"model": "x"}'),
        ({"content-type": "multipart/form-data"}, part), ({"content-type": "application/json"}, b'{"model": "x"}'),
        ({"content-type": "application/x-www-form-urlencoded"}, b"model=x"),
    ):  # fmt: skip
        reply = post(whisper, content=body, headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (400, "invalid_body")


def test_a_large_file_is_refused_before_it_is_there(whisper: Server) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(400):
            sent += 2**18
            yield b"\0" * 2**18

    try:
        reply = post(whisper, content=body(), headers={"content-type": "multipart/form-data; boundary=XX"})
    except httpx.WriteError:  # the server hung up, which is as good
        pass
    else:
        assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")
    assert sent < 2**26, "all of it was taken"


def test_the_client_cannot_name_files(whisper: Server, song: str) -> None:
    for name in ("../../etc/passwd", "/dev/zero", "a\0b", "x" * 3000, "name.png"):
        reply = post(whisper, {**GOOD, "temperature": "0.5", "seed": "5"}, {"file": (name, SHORT, "image/png")})
        if reply.status_code != 400:  # a head that is too long is no form
            assert reply.json()["text"] == song


def test_a_key_is_needed(whisper: Server) -> None:
    with httpx.Client(base_url=whisper.url, trust_env=False) as http:
        assert http.post("/v1/audio/transcriptions", data=GOOD, files=FILE).status_code == 401


# -- life of a call ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_leaves_frees_everything(whisper: Server, client: Any, song: str, stream: str) -> None:
    """In the middle of a long task: none of its requests stays, and no further one begins."""
    request = httpx.Request(
        "POST", f"{whisper.url}/v1/audio/transcriptions", data={**GOOD, "stream": stream},
        files={"file": wav(sound(80.0, 9))}, headers=whisper.headers(),
    )  # fmt: skip
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(whisper.address) as connection:
        connection.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        end = time.monotonic() + 10
        while not whisper.stats()["engine"]["running"]:
            assert time.monotonic() < end
    assert idle(whisper, 1.0)
    steps = whisper.stats()["engine"]["steps"]
    time.sleep(0.3)
    assert whisper.stats()["engine"]["steps"] == steps, "it went on"
    assert canary(client) == song


def place_is_free(server: Server) -> None:
    """A call keeps its place until the step of its task that runs in a thread has ended."""
    deadline = time.monotonic() + 20
    while server.stats()["gate"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_place_in_the_queue_for_all_requests_of_a_call(whisper_path: Path) -> None:
    """And its time is bounded, its stream's, too; and so is the memory that recordings of all calls take."""
    options = {"in_process": True, "served_model_name": MODEL, "max_running": 1, "max_waiting": 0,
               "request_timeout_s": 1.0, "max_pending_bytes": 2**26}  # fmt: skip
    with running_server(whisper_path, **options) as small, small.http() as http:
        reply = http.post("/v1/audio/transcriptions", data=GOOD, files={"file": wav(sound(80.0, 9))})
        assert (reply.status_code, error_of(reply)["code"]) == (504, "timeout")
        assert idle(small, 1.0)
        place_is_free(small)
        form = {**GOOD, "stream": "true", "temperature": "0.5"}
        reply = http.post("/v1/audio/transcriptions", data=form, files={"file": wav(sound(120.0, 9), subtype="PCM_16")})
        if reply.status_code == 200:  # it had begun
            assert json.loads(reply.text.split("\n\n")[-2][6:])["error"]["code"] == "timeout"
        else:
            assert (reply.status_code, error_of(reply)["code"]) == (504, "timeout")
        assert idle(small, 1.0)
        place_is_free(small)
        silence = wav(np.zeros(600 * RATE, np.int16), kind="FLAC", subtype="PCM_16")
        reply = http.post("/v1/audio/transcriptions", data=GOOD, files={"file": silence})
        assert (reply.status_code, error_of(reply)["code"]) == (429, "overloaded")
        assert len(silence) < 2**17
        reply = http.post("/v1/audio/transcriptions", data=VERBOSE, files=FILE)
        assert reply.status_code == 200


def test_keys_share_nothing(whisper: Server) -> None:
    """The caller's salt is that of every request of the task: another key's call encodes the sound anew."""

    def encoded(key: str, salt: str = "") -> int:
        before = whisper.stats()["engine"]["computed_sources"]
        with whisper.http(key) as http:
            reply = http.post("/v1/audio/transcriptions", data={**VERBOSE, "cache_salt": salt}, files=form)
        assert reply.status_code == 200
        replies.append(reply.json()["text"])
        return int(whisper.stats()["engine"]["computed_sources"] - before)

    form = {"file": wav(sound(2.0, 77))}
    replies: list[str] = []
    assert [encoded(KEYS[0]), encoded(KEYS[0])] == [1, 0]
    assert [encoded(KEYS[1]), encoded(KEYS[1])] == [1, 0]
    assert [encoded(KEYS[0], "mine"), encoded(KEYS[0], "mine")] == [1, 0]
    assert len(set(replies)) == 1


@pytest.mark.slow
def test_forms_of_every_shape(whisper: Server, client: Any, song: str, tmp_path: Path) -> None:
    """Schemathesis on the two routes, where a model takes their forms."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "schemathesis"), "run", f"{whisper.url}/openapi.json",
        "--include-path-regex", "^/v1/audio/", "--header", f"Authorization: Bearer {KEYS[0]}", "--mode", "all",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,negative_data_rejection",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "100", "--seed", "1", "--no-color",
        "--suppress-health-check", "all", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 2" in done.stdout
    assert canary(client) == song
    assert idle(whisper)


def test_many_at_once_hear_what_each_hears_alone(client: Any, whisper: Server, offline: Engine) -> None:
    clips = [sound(seconds, 50 + i) for i, seconds in enumerate((1.0, 33.0, 4.0, 8.0, 2.0, 40.0))]
    wanted = [offline.transcribe((clip, RATE), **SAME).text for clip in clips]
    with ThreadPoolExecutor(len(clips)) as pool:
        asked = [
            pool.submit(client.audio.transcriptions.create, file=wav(clip), model=MODEL, **SEEDED) for clip in clips
        ]
        assert [each.result().text for each in asked] == wanted
    assert len(set(wanted)) == len(wanted)
    assert idle(whisper)
