"""`mm chat`: with an engine in the process, with a server, in a terminal, and with servers that misbehave."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server, running_server
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, SamplingParams
from mm_core.cli.chat import split_message
from mm_core.cli.chat_backends import RemoteBackend, Stats, Turn
from mm_core.errors import MediaError

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "zoo" / "qwen2vl-nano" / "samples"
TRIANGLE, SQUARES = SAMPLES / "03-colour.jpg", SAMPLES / "01-count.jpg"
TALK = [
    f"What color is the triangle? {TRIANGLE}", "Count the triangles.", "", "/reset", f"/image '{SQUARES}'",
    "Count the squares.",
]  # fmt: skip
KEY = "key-of-the-chat"


def chat(*arguments: str, lines: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mm_core.cli", "chat", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MM_", "OPENAI_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(
        command,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    """What the engine answers to the same conversations."""
    greedy = SamplingParams(max_tokens=1024, temperature=0.0)

    def turn(text: str, *images: Path) -> dict[str, Any]:
        pictures = [{"type": "image", "image": str(path)} for path in images]
        return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}

    kv = KvCacheConfig(num_blocks=256)
    with Engine.from_pretrained(SAMPLES.parent, kv_cache_config=kv, show_progress=False) as engine:
        first = [turn("What color is the triangle?", TRIANGLE)]
        said = [engine.chat(first, greedy)[0].text]
        second = {"role": "user", "content": "Count the triangles."}
        said.append(engine.chat([*first, {"role": "assistant", "content": said[0]}, second], greedy)[0].text)
        said.append(engine.chat([turn("Count the squares.", SQUARES)], greedy)[0].text)
    assert said[0] == "white"
    return said


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(in_process=True, decode_workers=0, keys=[KEY]) as running:
        yield running


STATS = re.compile(r"\[prompt (\d+) tokens \((\d+) cached.*\) · answer (\d+) tokens · first token [\d.]+ s.*\]")


def check_talk(done: subprocess.CompletedProcess[str], wanted: list[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == wanted
    assert "03-colour.jpg, 27,401 bytes" in done.stderr
    told = [tuple(map(int, found.groups())) for found in STATS.finditer(done.stderr)]
    assert len(told) == 3, done.stderr
    assert told[1][1] > 80, "the history is in the cache"
    assert told[2][0] < told[1][0], "it was not forgotten"
    assert ">" not in done.stdout, "nothing is prompted for in a pipe"


@pytest.mark.slow
def test_an_engine_in_the_process(wanted: list[str]) -> None:
    """The zoo's model, since none is named; the talk has more turns than one, and ends with its input."""
    check_talk(chat("--device", "cpu", lines=TALK), wanted)


def test_a_server(server: Server, wanted: list[str]) -> None:
    check_talk(chat(server.url, "--temperature", "0", lines=TALK, MM_API_KEY=KEY), wanted)
    named = chat(f"{server.url}/v1/", "--api-key", KEY, "--system", "Be brief.", lines=[*TALK[:1], "/quit", "Hello"])
    assert (named.returncode, len(named.stdout.splitlines())) == (0, 1), named.stderr


def test_errors_are_a_line_and_the_talk_goes_on(server: Server, wanted: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    lines = [f"Look: {tmp_path / 'broken.png'}", "/image /nowhere.png", "/audio", "/smell x", *TALK]
    done = chat(server.url, "--temperature", "0", lines=lines, MM_API_KEY=KEY)
    assert done.stdout.splitlines() == wanted, "a question that failed is no part of the talk"
    faults = [line for line in done.stderr.splitlines() if line.startswith("mm: error: ")]
    assert len(faults) == 3
    assert "400" in faults[0]
    assert "/nowhere.png" in faults[1]
    assert "There is no /smell" in done.stderr
    assert done.returncode == 1, "nobody was there to see it"


@pytest.mark.parametrize(
    ("target", "text"),
    [("http://127.0.0.1:9", "cannot be asked"), ("http://", "no address"), ("http://localhost:99999", "no valid port"),
     ("/nowhere/model", "/nowhere/model")],
)  # fmt: skip
def test_nobody_to_talk_to(target: str, text: str) -> None:
    done = chat(target, lines=["Hello"])
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mm: error: ")]
    assert text in line


def test_a_wrong_key(server: Server) -> None:
    done = chat(server.url, "--api-key", "wrong", lines=["Hello"])
    assert done.returncode == 1
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr


# -- in a terminal -----------------------------------------------------------------------


class Terminal:
    """`mm chat` with a terminal of its own; what it writes is read as it comes."""

    def __init__(self, *arguments: str) -> None:
        self._fd, theirs = pty.openpty()
        command = [sys.executable, "-m", "mm_core.cli", "chat", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, timeout_s: float = 120.0) -> str:
        """What is written up to `text`, and since the last wait."""
        end = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < end, self.text[-2000:]
            self._read()
        found, _, self.text = self.text.partition(text)
        return found

    def _read(self) -> None:
        if select.select([self._fd], [], [], 0.2)[0]:
            try:
                self.text += self._decoder.decode(os.read(self._fd, 65536))  # reads end inside characters
            except OSError:  # its end
                raise AssertionError(self.text[-2000:]) from None

    def wait_for_more(self, count: int) -> None:
        """That many more characters."""
        end = time.monotonic() + 120
        while len(self.text) < count:
            assert time.monotonic() < end, self.text
            self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self._fd)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    """A model that never ends by itself."""
    terminal = Terminal(str(make_tiny_qwen2vl(tmp_path)), "--device", "cpu", "--max-tokens", "20000")
    try:
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.type("Tell me a story\\\n")
        terminal.wait_for("… ")
        terminal.type("without an end\n")
        terminal.wait_for("without an end")
        terminal.wait_for_more(20)  # of the answer
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(stopped) [prompt")
        terminal.wait_for("> ")
        time.sleep(1.0)  # the prompt is shown a moment before it is read from
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(Ctrl-D leaves)")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        assert "/reset" in terminal.wait_for("Ctrl-C stops an answer.")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()


# -- servers that misbehave --------------------------------------------------------------


@contextmanager
def stub(
    answer: bytes, *, status: int = 200, models: Any = None, length: int | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """A server whose every answer is these bytes; gives its URL and the bodies it was sent."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, json.dumps({"data": [{"id": "stub"}]} if models is None else models).encode())

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._reply(status, answer, length)

        def _reply(self, code: int, body: bytes, announced: int | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(announced or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}", asked
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


def events(*texts: str) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


DONE = b"data: [DONE]\n\n"


def test_what_a_server_is_sent(tmp_path: Path) -> None:
    for name in ("a b.jpg", "c.wav", "d.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    escaped = str(tmp_path / "a b.jpg").replace(" ", "\\ ")
    lines = [f"/audio {tmp_path}/c.wav", f'See {escaped}, and "{tmp_path}/d.mp4".', "Again"]
    with stub(events("Hi", " there") + DONE) as (url, asked):
        done = chat(url, "--system", "Be brief.", "--seed", "3", "--max-tokens", "7", lines=lines)
    assert done.stdout == "Hi there\nHi there\n", done.stderr
    first, second = asked
    assert {key: first[key] for key in ("model", "stream", "seed", "max_tokens")} == {
        "model": "stub", "stream": True, "seed": 3, "max_tokens": 7}  # fmt: skip
    assert "temperature" not in first, "that is the server's choice"
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "input_audio", "input_audio": {"data": "Yy53YXY=", "format": "wav"}},
            {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,YSBiLmpwZw=="}},
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,ZC5tcDQ="}},
            {"type": "text", "text": "See a b.jpg, and d.mp4."},
        ]},
    ]  # fmt: skip
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Hi there"}, {"role": "user", "content": "Again"}]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "status", "length", "text"),
    [
        (events("Hi"), 200, None, "broke off"),
        (events("Hi"), 200, 10_000, "broke off"),
        (events("Hi") + b'data: {"error": {"message": "out of luck"}}\n\n', 200, None, "out of luck"),
        (b"data: no json\n\n", 200, None, "no stream of events"),
        (b"data: [1]\n\n", 200, None, "no stream of events"),
        (b'{"error": {"message": "not that"}}', 422, None, "422"),
        (b"<html>", 502, None, "502"),
    ],
)
def test_servers_that_misbehave(answer: bytes, status: int, length: int | None, text: str) -> None:
    with stub(answer, status=status, length=length) as (url, asked):
        done = chat(url, lines=["Hello", "Hello again"])
    assert done.returncode == 1
    faults = [line for line in done.stderr.splitlines() if line.startswith("mm: error: ")]
    assert len(faults) == 2
    assert all(text in line for line in faults), faults
    assert [len(body["messages"]) for body in asked] == [1, 1], "what failed is no part of the talk"
    with stub(b"", models={"data": []}) as (url, _):
        assert "--model" in chat(url, lines=["Hello"]).stderr


def test_no_model_writes_to_the_terminal_what_it_likes() -> None:
    with stub(events("a\x1b]0;title\x07", "\x1b[2Jb\x9b31m\r\n\tc") + DONE) as (url, _):
        done = chat(url, lines=["Hello"])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout)
    assert "a" in done.stdout
    assert done.stdout.endswith("\n\tc\n")


# -- messages and numbers ----------------------------------------------------------------


def test_paths_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b c.wav", "it's.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    cases = {
        "What is a.png?": ("What is a.png?", ["a.png"]),
        f"{tmp_path}/a.png what is it": ("what is it", ["a.png"]),
        "'a.png' and \"b c.wav\"": ("and", ["a.png", "b c.wav"]),
        "hear b\\ c.wav!": ("hear b c.wav!", ["b c.wav"]),
        "~/a.png": ("", ["a.png"]),
        "a.png ~/a.png, what differs? a.png 'b c.wav' ": (
            "a.png, what differs?",
            ["a.png", "a.png", "a.png", "b c.wav"],
        ),
        "a.png 'a.png'": ("", ["a.png", "a.png"]),
        f"file://{tmp_path}/b%20c.wav": ("", ["b c.wav"]),
        "see it's.mp4": ("see", ["it's.mp4"]),
        "What's that? It's a.png, isn't it?": ("What's that? It's a.png, isn't it?", ["a.png"]),
        "no other.png, and a.txt": ("no other.png, and a.txt", []),
        "two\nlines  stay": ("two\nlines  stay", []),
    }
    for message, (text, names) in cases.items():
        found, media = split_message(message)
        assert (found, [medium.name for medium in media]) == (text, names), message
        assert all(medium.data.decode() == medium.name for medium in media)
    with pytest.raises(MediaError, match="nowhere"):
        split_message("look at /nowhere/a.png")
    (tmp_path / "pipe.png").mkdir()
    assert split_message("look at pipe.png")[1] == []


@pytest.mark.parametrize(("name", "text"), [("a.png", "image"), ("a.wav", "audio file"), ("a.mp4", "video")])
def test_an_empty_file_is_refused_before_it_is_sent(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(MediaError, match=rf"The {text} is empty \(0 bytes\)"):
        split_message(f"look at {tmp_path / name}")


def test_stats() -> None:
    assert Stats(100, 80, 50, 11, 0.5, 2.0).line() == (
        "[prompt 100 tokens (80 cached, 50 of media) · answer 11 tokens · first token 0.50 s · 5.0 tokens/s]"
    )
    assert Stats().line() == "[]"
    assert Stats(first=0.25, rest=0.0).line() == "[first token 0.25 s]"


def test_an_answer_that_is_left_hangs_up() -> None:
    """So that the server need not go on with it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        backend = RemoteBackend(f"http://127.0.0.1:{listening.getsockname()[1]}", model="m", key="k", options={})
        answer = backend.answer([Turn("user", "Hello")])
        told: list[bytes] = []

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                while b"Hello" not in b"".join(told):
                    told.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for text in ("Hi", " there"):
                    piece = events(text)
                    connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                connection.settimeout(10)
                told.append(connection.recv(1) or b"gone")

        thread = threading.Thread(target=serve)
        thread.start()
        assert [next(answer), next(answer)] == ["Hi", "Hi there"]
        assert backend.stats.first is not None
        answer.close()
        thread.join(15)
    assert told[-1] == b"gone"
    assert b"Authorization: Bearer k" in b"".join(told)
