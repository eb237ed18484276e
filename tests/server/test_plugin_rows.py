"""Plugins that break their contract, behind a server: their request, or the start, fails; others do not."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import faulty_plugin
from support.openai_calls import QUESTIONS, Canary, check_error, image, question, user
from support.serving import ROOT, Server, running_server, started_server

from mm_core.zoo import default_model

pytestmark = pytest.mark.slow  # the engine ends, and starts again, many times
TESTS = {"PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The zoo's model, its encoder failing by the size of the picture."""
    plugin = {"plugin": faulty_plugin.__name__, "stall_timeout_s": 1.5}
    with running_server(keys=("key-of-one",), env=TESTS, **plugin) as running:
        yield running


def picture(height: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (faulty_plugin.WIDTH, height), "red").save(buffer, "PNG")
    return image("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


def ask(server: Server, messages: list[dict[str, Any]], **more: Any) -> Any:
    with server.http() as http:
        body = {"model": "qwen2vl-nano", "messages": messages, "temperature": 0, "max_tokens": 12, **more}
        return http.post("/v1/chat/completions", json=body)


def back(server: Server) -> None:
    deadline = time.monotonic() + 60
    with server.http() as http:
        while http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("height", [faulty_plugin.EXITS, faulty_plugin.BREAKS], ids=["exits", "breaks the loop"])
def test_an_encoder_that_ends_the_engine(server: Server, height: int) -> None:
    back(server)
    with closing(Canary(server)) as canary:
        check_error(ask(server, user(picture(height), "What is it?")), 503, "engine_died")
        back(server)
        canary.check()


def test_an_encoder_that_hangs_is_told_of_and_ended(server: Server) -> None:
    back(server)
    got: list[Any] = []
    asking = threading.Thread(target=lambda: got.append(ask(server, user(picture(faulty_plugin.HANGS), "What is it?"))))
    asking.start()
    deadline = time.monotonic() + 20
    with server.http() as http:
        while http.get("/health").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    asking.join(30)
    check_error(got[0], 503, "engine_died")
    back(server)
    assert ask(server, question(QUESTIONS[0])).status_code == 200


FAULTS = {
    "too few rows": (faulty_plugin.SHORT, "plugin_error"),
    "no rows": (faulty_plugin.NOTHING, "plugin_error"),
    "no numbers": (faulty_plugin.NO_NUMBERS, "engine_error"),
    "raises": (faulty_plugin.RAISES, "plugin_error"),
}


@pytest.mark.parametrize(("height", "code"), FAULTS.values(), ids=FAULTS)
def test_what_a_hook_gives_wrong_fails_its_request_alone(server: Server, height: int, code: str) -> None:
    back(server)
    victim: list[Any] = []
    beside = threading.Thread(target=lambda: victim.append(ask(server, question(QUESTIONS[0]), cache_salt="victim")))
    with closing(Canary(server)) as canary:
        beside.start()
        reply = ask(server, user(picture(height), "What is it?"))
        beside.join(30)
        check_error(reply, 500, code)
        assert "secret" not in reply.text
        assert victim[0].status_code == 200
        canary.check()


def family(name: str, architecture: str, more: str = "") -> str:
    """A plugin that claims an architecture under a name."""
    return (
        "from mm_core.hookspecs import hookimpl\nfrom mm_core.types import ModelFamily\n@hookimpl\n"
        f"def mm_families():\n    return [ModelFamily({name!r}, ({architecture!r},), ('image',){more})]"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ImportError('no such thing')", "ImportError"),
        ("import a_package_that_nobody_has", "a_package_that_nobody_has"),
        ("from mm_core.hookspecs import hookimpl\n@hookimpl\ndef mm_procesor(family): ...", "mm_procesor"),
        ("from mm_core.hookspecs import hookimpl\n@hookimpl\ndef mm_families(colour): ...", "mm_families"),
        (family("other", "Qwen2VLForConditionalGeneration", ", api_version=99"), "99"),
    ],
    ids=["raises", "missing", "misspelt", "signature", "version"],
)
def test_plugins_that_cannot_be_used_are_named_at_the_start(
    tmp_path: Path, source: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_core.cli import main

    name = f"odd_plugin_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["serve", str(default_model()), "--port", "0", "--in-process", "--decode-workers", "0"]
    code = main([*arguments, "--plugin", name])
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert line.startswith("mm: error: ")
    assert says in line


def test_two_plugins_for_one_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_core.cli import main

    options = []
    for name in ("first", "second"):
        (tmp_path / f"claims_{name}.py").write_text(family(name, "Qwen2VLForConditionalGeneration"))
        options += ["--plugin", f"claims_{name}"]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["serve", str(default_model()), "--port", "0", "--in-process", "--decode-workers", "0", *options]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "'claims_first'" in line
    assert "'claims_second'" in line


def test_a_name_that_is_no_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    with started_server(plugin="nobody_s_plugin") as running:
        assert running.wait(60) == 1
    assert any("nobody_s_plugin" in line for line in running.lines), running.lines
