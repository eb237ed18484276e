"""`mm serve`: its arguments, and what becomes of them."""

from __future__ import annotations

import argparse
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli import main
from mm_core.cli.serve import add_serve_arguments, engine_options, server_config
from mm_core.config import EngineConfig, KvCacheConfig
from mm_core.errors import ConfigError
from mm_core.server.config import MediaConfig, ServerConfig
from mm_core.server.run import bind, engine_options_of, url_of, within_limits


def parse(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_serve_arguments(parser)
    return vars(parser.parse_args(words))


def config(*words: str, **environ: str) -> ServerConfig:
    return server_config(parse(*words), environ)


def test_nothing_given_is_the_default():
    assert config() == ServerConfig()
    assert engine_options(parse()) == {"kv_cache_config": KvCacheConfig()}
    assert parse("some/model")["model"] == "some/model"


def options_of(model: type[Any]) -> set[str]:
    """Fields of a settings class that nobody can set from the command line."""
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    known = {action.dest for action in parser._actions}
    return {name for name in model.model_fields if name not in known and f"media_{name}" not in known}


def test_every_setting_of_the_server_has_an_option():
    assert options_of(ServerConfig) == {"api_keys", "media"}  # --api-key, and the options of its own
    assert options_of(MediaConfig) == set()


def test_what_is_given_arrives():
    made = config(
        "--host", "::1", "--port", "0", "--max-waiting", "7", "--drain-timeout-s", "1.5", "--no-playground",
        "--allowed-domain", "a.example", "--allowed-domain", "*.b.example", "--allowed-path", "/srv",
        "--max-image-pixels", "100", "--allow-origin", "https://x.example", "--log-format", "json", "--in-process",
    )  # fmt: skip
    assert (made.host, made.port, made.max_waiting, made.drain_timeout_s, made.playground) == ("::1", 0, 7, 1.5, False)
    assert made.media.allowed_domains == ("a.example", "*.b.example")
    assert (made.media.allowed_path, made.media.max_image_pixels) == (Path("/srv"), 100)
    assert (made.allowed_origins, made.log_format, made.in_process) == (("https://x.example",), "json", True)


def test_engine_options_arrive():
    options = engine_options(parse(
        "--device", "cpu", "--dtype", "float32", "--kv-cache-dtype", "fp8", "--host-cache-gib", "0.5",
        "--disk-cache-path", "/tmp/kv", "--num-kv-blocks", "9", "--gpu-memory-fraction", "0.4", "--max-num-seqs", "3",
        "--limit-mm-per-prompt", "image=8", "--limit-mm-per-prompt", "video=0", "--no-cuda-graphs",
        "--processor-cache-bytes", "5", "--seed", "3", "--record-timeline",
    ))  # fmt: skip
    made = EngineConfig(**options)
    kv = made.kv_cache_config
    assert (kv.dtype, kv.host_cache_size, kv.disk_cache_path, kv.num_blocks) == ("fp8", 2**29, "/tmp/kv", 9)
    assert (kv.free_gpu_memory_fraction, made.max_num_seqs, made.cuda_graphs) == (0.4, 3, False)
    assert dict(made.limit_mm_per_prompt) == {"image": 8, "video": 0}
    assert (made.device, made.dtype, made.processor_cache_size, made.seed) == ("cpu", "float32", 5, 3)
    assert made.record_timeline
    assert engine_options(parse("--disable-kv-cache-reuse"))["kv_cache_config"].enable_block_reuse is False


def test_a_server_sets_what_its_callers_make_necessary():
    made = ServerConfig(media=MediaConfig(max_image_pixels=99, max_video_frames=7))
    options = engine_options_of(made, {})
    assert options["hash_algorithm"] == "sha256"
    assert (options["max_image_pixels"], options["max_video_frames"]) == (99, 7)
    assert options["engine_process"] is True
    assert EngineConfig(**options)
    assert engine_options_of(ServerConfig(in_process=True), {})["engine_process"] is False
    assert engine_options_of(made, {"hash_algorithm": "xxh3_128"})["hash_algorithm"] == "xxh3_128"


def test_keys_of_everywhere(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nd\n\n e \n")
    made = config("--api-key", "a", "--api-key-file", str(file), MM_API_KEYS="b,, c ", MM_ADMIN_KEY="z")
    assert [key.get_secret_value() for key in made.api_keys] == ["a", "b", "c", "d", "e"]
    assert made.admin_key is not None
    assert made.admin_key.get_secret_value() == "z"
    assert "a" not in repr(made.api_keys).replace("SecretStr", "")
    given = config("--admin-key", "y", MM_ADMIN_KEY="z").admin_key
    assert given is not None
    assert given.get_secret_value() == "y"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--port", "70000"], "port"),
        (["--max-waiting", "-1"], "max_waiting"),
        (["--request-timeout-s", "0"], "request_timeout_s"),
        (["--max-redirects", "99"], "max_redirects"),
        (["--api-key", ""], "api_keys"),
        (["--api-key-file", "/nowhere/keys"], "cannot be read"),
        (["--api-key", "same", "--admin-key", "same"], "admin_key"),
        (["--allow-origin", "page.example"], "allowed_origins"),
        (["--allowed-host", "box.example:8000"], "allowed_hosts"),
    ],
)
def test_what_cannot_be(words, text):
    with pytest.raises(ConfigError, match=text):
        config(*words)


@pytest.mark.parametrize("text", ["image", "image=", "image=x", "image=-1", "=1", "picture=1"])
def test_limits_that_are_none(text):
    with pytest.raises(ConfigError, match="limit"):
        EngineConfig(**engine_options(parse("--limit-mm-per-prompt", text)))


def test_a_file_without_keys_is_not_an_open_server(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="open to everybody"):
        config("--api-key-file", str(file))


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"Cannot listen on 127\.0\.0\.1"):
            bind(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="Cannot listen"):
        bind(ServerConfig(host="no-such-host.invalid", port=0))


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "given"), [(1024, 65536, 4096, 4096), (300, 1024, 4096, 768), (64, 64, 9, 8)]
)
def test_no_more_connections_than_files(monkeypatch, caplog, soft, hard, asked, given):
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.__setitem__(slice(None), wanted))
    assert within_limits(ServerConfig(max_connections=asked)).max_connections == given
    assert limits == [hard, hard]
    assert ("ulimit" in caplog.text) == (given < asked)


def test_a_limit_that_cannot_be_raised(monkeypatch):
    def refuse(_: int, __: tuple[int, int]) -> None:
        raise ValueError("not permitted")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert within_limits(ServerConfig()).max_connections == 768


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_where_it_listens(host):
    made = bind(ServerConfig(host=host, port=0))
    try:
        port = made.getsockname()[1]
        assert url_of(made) == (f"http://[::1]:{port}" if ":" in host else f"http://127.0.0.1:{port}")
    finally:
        made.close()


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, capsys):
    for name in ("mm_core.server.run", "mm_core.server.http"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "some/model"]) == 1
    assert "pip install 'mm-core[serve]'" in capsys.readouterr().err
