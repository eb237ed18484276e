"""Engine processes that end, hang, cannot start or have too little room, and whose parents end. Each test starts some,
which takes seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import troubled_plugin
from support.e2e import GREEDY, ask
from support.families import FAMILIES
from support.pictures import picture
from support.processes import LONG, open_files, pid_of, same, settle, start, wait_for
from support.tiny_whisper import make_tiny_whisper, sound

from mm_core import Engine, KvCacheConfig, MMError, SamplingParams
from mm_core.engine.process import arena, supervisor
from mm_core.engine.process import parent as process_parent
from mm_core.errors import (
    CheckpointError,
    EngineClosedError,
    EngineDiedError,
    MediaTooLargeError,
)

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]


# -- every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_the_same(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    path, prompts = family.make(tmp_path), family.prompts(3)
    answers = []
    for engine_process in (False, True):
        kv = KvCacheConfig(num_blocks=512)
        options: dict[str, Any] = {"plugins": family.modules(), "show_progress": False, "kv_cache_config": kv}
        with Engine.from_pretrained(path, engine_process=engine_process, **options) as engine:
            answers.append([*engine.generate(prompts, GREEDY), *engine.generate(prompts, GREEDY)])
            if engine_process:
                settle(engine)
    for here, there in zip(*answers, strict=True):
        same(here, there)


def test_tasks_and_the_family_s_rules(tmp_path: Path) -> None:
    path, clip = make_tiny_whisper(tmp_path), (sound(2.0, 3), 16000)
    heard = []
    for engine_process in (False, True):
        with Engine.from_pretrained(path, show_progress=False, engine_process=engine_process) as engine:
            said = engine.transcribe(clip, seed=5)
            heard.append((said.text, said.language, [(s.start, s.end, s.tokens, s.temperature) for s in said.segments]))
    assert heard[0] == heard[1]
    assert heard[0][2]


def test_spans_of_both_processes(tiny_path: Path) -> None:
    with start(tiny_path, record_timeline=True) as engine:
        engine.generate(ask(picture(1, 56, 56)), GREEDY)
        spans = engine.timeline()
        assert {s.track.split()[0] for s in spans} >= {"preprocess", "engine"}
        now = time.perf_counter_ns()
        assert all(now - 60 * 10**9 < s.start_ns <= s.end_ns < now for s in spans)


# -- starts and ends -------------------------------------------------------------------------------


def test_a_start_that_fails_says_why(tiny_path: Path, tmp_path: Path) -> None:
    before, children = open_files(), set(psutil.Process().children())
    cases = ((tmp_path / "absent", {}), (tiny_path, {"device": "cuda:9"}), (tiny_path, {"max_model_len": 10**8}))
    for path, options in cases:
        errors = []
        for engine_process in (False, True):
            with pytest.raises(MMError) as caught:
                Engine.from_pretrained(path, show_progress=False, engine_process=engine_process, **options)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    weights = tiny_path / "model.safetensors"
    (tmp_path / "broken").mkdir()
    for file in tiny_path.iterdir():
        if file != weights:
            (tmp_path / "broken" / file.name).symlink_to(file)
    (tmp_path / "broken" / weights.name).write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        start(tmp_path / "broken")
    assert open_files() == before
    assert set(psutil.Process().children()) <= children


def test_close_ends_what_runs(tiny_path: Path) -> None:
    threads = threading.active_count()
    engine = start(tiny_path)
    stream = engine.stream("The quick brown fox", LONG)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError):
        engine.generate("a", GREEDY)
    assert engine._frontend.health().state == "closed"
    assert threading.active_count() <= threads


def test_a_listener_may_close_the_engine_when_it_died(tiny_path: Path) -> None:
    told: list[Any] = []
    engine = start(tiny_path)

    def listener(result: Any) -> None:
        told.append(result)
        engine.close()

    engine._frontend.add("The quick", LONG, listener)
    wait_for(lambda: engine.stats()["running"])
    os.kill(pid_of(engine), signal.SIGKILL)
    wait_for(lambda: told, 5)
    assert isinstance(told[0], EngineDiedError)
    wait_for(lambda: engine._frontend.health().state == "closed", 10)


def test_close_while_it_is_frozen_or_starting_again(tiny_path: Path) -> None:
    for trouble in (signal.SIGSTOP, signal.SIGKILL):
        engine = start(tiny_path)
        process = psutil.Process(pid_of(engine))
        process.send_signal(trouble)
        if trouble is signal.SIGKILL:
            wait_for(lambda engine=engine: engine._frontend.health().state == "starting")
        begun = time.monotonic()
        engine.close()
        assert time.monotonic() - begun < 8
        assert not process.is_running()


PARENT = """
import sys, time
sys.path[:0] = [{tests!r}]
from support import troubled_plugin
from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from support.e2e import ask
from support.pictures import picture
if __name__ == "__main__":
    made = Engine.from_pretrained({path!r}, kv_cache_config=KvCacheConfig(num_blocks=64), engine_process=True,
                                  plugins=[troubled_plugin], show_progress=False)
    with made as engine:
        for i in range(3):
            engine.generate([ask(picture(i, 56, 56)), "a"], SamplingParams(max_tokens=4))
        engine.cache.warm(picture(1, 56, 56), "u", pin=True)
        print(engine.stats()["engine_process"]["pid"], flush=True)
        {then}
"""


def parent(path: Path, then: str, **environment: str) -> subprocess.Popen[str]:
    code = PARENT.format(tests=str(TESTS), path=str(path), then=then)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def test_it_ends_with_its_parent_and_not_by_ctrl_c(tiny_path: Path) -> None:
    with parent(tiny_path, "time.sleep(100)") as made:
        assert made.stdout is not None
        process = psutil.Process(int(made.stdout.readline()))
        os.killpg(made.pid, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        time.sleep(0.5)
        assert process.is_running()
        made.kill()
        made.wait()
        assert wait_for(lambda: not process.is_running(), 10) < 2


def test_ctrl_c_at_the_terminal_closes_in_order(tiny_path: Path) -> None:
    with parent(tiny_path, "time.sleep(100)") as made:
        assert made.stdout is not None
        process = psutil.Process(int(made.stdout.readline()))
        os.killpg(made.pid, signal.SIGINT)
        assert made.wait(30) != 0
        assert wait_for(lambda: not process.is_running(), 10) < 2


def test_nothing_is_unpickled(tiny_path: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with parent(tiny_path, "pass", **{troubled_plugin.WITNESS: str(seen)}) as made:
        assert made.wait(120) == 0
    assert not seen.exists(), seen.read_text()
    # The witness sees: the same with something unpickled.
    told = "import pickle, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))"
    with parent(tiny_path, told, **{troubled_plugin.WITNESS: str(seen)}) as made:
        assert made.wait(120) == 0
    assert "Fraction" in seen.read_text()


@pytest.mark.parametrize("said", [b"\xff" * 64, b"\x02\x00\x00\x00\x91\x01", b""])
def test_a_process_that_talks_nonsense(tiny_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    made = []

    def spawn(_: Any) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(said)
            made.append(subprocess.Popen(["sleep", "100"]))
            return made[0], ours

    monkeypatch.setattr(process_parent, "spawn", spawn)
    before = open_files()
    with pytest.raises(EngineDiedError, match="SIGKILL while it was starting"):
        start(tiny_path)
    assert made[0].poll() is not None
    assert open_files() == before


# -- troubles of plugins ---------------------------------------------------------------------------


def shown(size: tuple[int, int]) -> Any:
    return ask(picture(1, *size), "What is it?")


def test_an_encoder_that_ends_or_breaks_its_process(tiny_path: Path) -> None:
    with start(tiny_path, plugins=[troubled_plugin]) as engine:
        wanted = engine.generate(shown((56, 56)), GREEDY)[0]
        # What the family adds to every request is added there, where it cannot cross.
        assert not set(wanted.token_ids) & set(troubled_plugin.NEVER)
        with Engine.from_pretrained(tiny_path, plugins=[troubled_plugin], show_progress=False) as here:
            same(here.generate(shown((56, 56)), GREEDY)[0], wanted)
        for number, size in enumerate((troubled_plugin.EXITS, troubled_plugin.BREAKS), 1):
            begun = time.monotonic()
            with pytest.raises(EngineDiedError):
                engine.generate(shown(size), GREEDY)
            assert time.monotonic() - begun < 5
            wait_for(lambda: engine._frontend.health().ready)
            assert engine._frontend.health().restarts == number
            same(engine.generate(shown((56, 56)), GREEDY)[0], wanted)
        settle(engine)


def test_a_process_that_hangs_is_reported_and_started_again(
    tiny_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with start(tiny_path, plugins=[troubled_plugin], stall_timeout_s=1.5) as engine:
        begun = time.monotonic()
        with pytest.raises(EngineDiedError, match="hung"):
            engine.generate(shown(troubled_plugin.HANGS), GREEDY)
        assert 2.5 < time.monotonic() - begun < 10
        assert "took no step" in caplog.text
        stacks = capfd.readouterr().err
        assert "troubled_plugin.py" in stacks
        assert "mm-core-engine" in stacks or "Thread 0x" in stacks
        wait_for(lambda: engine._frontend.health().ready)
        assert engine.generate(shown((56, 56)), GREEDY)[0].token_ids


def test_health_of_a_hang(tiny_path: Path) -> None:
    with start(tiny_path, plugins=[troubled_plugin]) as engine:
        stream = engine.stream(shown(troubled_plugin.HANGS), GREEDY)
        wait_for(lambda: engine._frontend.health(1.0).state == "stuck", 10)
        assert engine._frontend.health(60.0).state == "ready"
        stream.close()


def test_it_gives_up_in_the_end(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_SHORT_LIVES", 2)
    with start(tiny_path) as engine:
        for _ in range(2):
            wait_for(lambda: engine._frontend.health().ready)
            os.kill(pid_of(engine), signal.SIGKILL)
            wait_for(lambda: not engine._frontend.health().ready)
        wait_for(lambda: "not started again" in str(engine._frontend._thread.refusal), 10)  # type: ignore[union-attr]
        assert engine._frontend.health().state == "dead"
        with pytest.raises(EngineDiedError, match="restart the server"):
            engine.generate("a", GREEDY)
        time.sleep(0.5)
        assert engine._frontend.health().state == "dead"


# -- room ------------------------------------------------------------------------------------------


def test_media_wait_for_room(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arena of three pictures: all requests are answered, an aborted one that waits lets go, none is mixed up."""
    one = 56 * 56 * 3 // arena.PAGE + 1
    monkeypatch.setattr(arena, "_LEAST", 3 * one * arena.PAGE)
    monkeypatch.setattr(arena, "_BYTES_PER_SEQUENCE", 0)
    with start(tiny_path, processor_cache_size=0) as engine:
        assert engine.stats()["engine_process"]["arena"]["bytes"] == 3 * one * arena.PAGE
        wanted = [engine.generate(ask(picture(i, 56, 56)), GREEDY)[0] for i in range(5)]
        slow = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        prompts = [ask(picture(i % 5, 56, 56)) for i in range(20)]
        found = engine.generate(prompts, [GREEDY if i % 3 else slow for i in range(20)])
        for i, output in enumerate(found):
            assert output.token_ids[: len(wanted[i % 5].token_ids)] == wanted[i % 5].token_ids
        streams = [engine.stream(ask(picture(i, 56, 56)), LONG) for i in range(3)]
        for stream in streams:
            next(stream)
        waits = engine.stream(ask(picture(4, 56, 56)), GREEDY)
        wait_for(lambda: engine.stats()["engine_process"]["arena"]["waiting"] == 1, 10)
        assert engine.generate("The cat", GREEDY)[0].token_ids, "what needs no room passes"
        waits.close()
        wait_for(lambda: engine.stats()["engine_process"]["arena"]["waiting"] == 0, 10)
        for stream in streams:
            stream.close()
        with pytest.raises(MediaTooLargeError, match="processor_cache_size"):
            engine.generate(ask(picture(1, 336, 336)), GREEDY)
        same(engine.generate(ask(picture(4, 56, 56)), GREEDY)[0], wanted[4])
        settle(engine)
