"""One server for most tests, with two keys and an admin key, and one with narrow bounds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.openai_calls import Canary
from support.serving import ADMIN_KEY, Server, running_server

from mm_core import Engine, KvCacheConfig


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A server in the tests' own process sends its log to the stderr of that test: later tests have another."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


KEYS = ("key-of-one", "key-of-two")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the zoo's model that tests share: leave it as it was. Its keys come from everywhere they can."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\nkey-of-a-file\n\n", encoding="utf-8")
    env = {"MM_API_KEYS": "key-of-env, another-of-env", "MM_ADMIN_KEY": ADMIN_KEY}
    more = {"api_key_file": file, "allow_origin": "https://page.example", "log_format": "json"}
    with running_server(keys=KEYS, admin_key=None, env=env, **more) as running:
        running.admin_key = ADMIN_KEY
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Any:
    """The official client, under the first key."""
    with server.client() as made:
        yield made


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain client, under the first key."""
    with server.http() as made:
        yield made


@pytest.fixture(scope="session")
def model(client: Any) -> str:
    """The name of its only model."""
    (only,) = client.models.list().data
    name: str = only.id
    return name


@pytest.fixture(scope="module")
def canary(server: Server) -> Iterator[Canary]:
    """Of that server."""
    with closing(Canary(server)) as made:
        yield made


@pytest.fixture(scope="session")
def narrow() -> Iterator[Server]:
    """A server without keys whose every bound is soon met; in one process, so that it starts sooner."""
    with running_server(
        in_process=True,
        decode_workers=0,
        header_timeout_s=0.6,
        body_timeout_s=0.6,
        keep_alive_s=1,
        max_body_bytes=200_000,
        max_connections=32,
        max_running=2,
        max_waiting=4,
        max_waiting_per_key=4,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def whisper_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper."""
    from support.hearing import whisper_path

    return whisper_path(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def whisper(whisper_path: Path) -> Iterator[Server]:
    """A server of it, with keys of its own."""
    from support.hearing import whisper_server

    with whisper_server(whisper_path) as running:
        yield running


@pytest.fixture(scope="session")
def song(whisper: Server) -> str:
    """What that server hears in a recording that never changes."""
    from support.hearing import canary

    with whisper.client() as made:
        return canary(made)


@pytest.fixture(scope="session")
def offline(whisper_path: Path) -> Iterator[Engine]:
    """The same model in the tests' own process."""
    with Engine.from_pretrained(
        whisper_path, kv_cache_config=KvCacheConfig(num_blocks=256), show_progress=False
    ) as made:
        yield made
