"""`mm serve`: answer calls over HTTP."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.errors import ConfigError, MissingExtraError, PluginError
from mm_core.zoo import default_model

if TYPE_CHECKING:
    from mm_core.server.config import MediaConfig, ServerConfig

KEYS_VARIABLE = "MM_API_KEYS"
ADMIN_VARIABLE = "MM_ADMIN_KEY"
_GIB = 2**30
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT"}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm serve`. What is not given is left to ServerConfig and EngineConfig."""
    parser.usage = "mm serve [MODEL] [options]"
    parser.description = "Without MODEL, the small model that the project ships is served."
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL", help="directory or hub id")
    _add_listening(parser.add_argument_group("who may call, and where"))
    _add_bounds(parser.add_argument_group("bounds"))
    _add_media(parser.add_argument_group("media"))
    _add_engine(parser.add_argument_group("engine"))


def _add_listening(group: Any) -> None:
    group.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", type=int, help="port to listen on, 0: a free one (default 8000)")
    group.add_argument("--api-key", action="append", metavar="KEY", default=[],
                       help=f"a key that callers must have; repeat for several; also ${KEYS_VARIABLE}")  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="PATH", default=None, help="file with a key a line")
    group.add_argument("--admin-key", metavar="KEY", default=None,
                       help=f"opens the admin routes, which are off without it; also ${ADMIN_VARIABLE}")  # fmt: skip
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients")
    group.add_argument("--allow-origin", action="append", metavar="ORIGIN", dest="allowed_origins",
                       help="a web page that may call from a browser; repeat for several (default: none)")  # fmt: skip
    group.add_argument("--allowed-host", action="append", metavar="NAME", dest="allowed_hosts",
                       help="a name of this server that calls without a key may be sent to; repeat for several "
                       "(default: localhost, --host, and addresses)")  # fmt: skip
    group.add_argument("--no-playground", action="store_false", dest="playground", help="no page at /")
    group.add_argument("--log-format", choices=("text", "json"), help="of the lines on stderr (default text)")
    group.add_argument("--log-prompts", action="store_true", help="also log what was asked")


def _add_bounds(group: Any) -> None:
    for name, kind, text in (
        ("max-running", int, "answers inside the engine (default: twice --max-num-seqs)"),
        ("max-waiting", int, "calls that may wait; more get 429 (default 1024)"),
        ("max-waiting-per-key", int, "of one key's (default: as --max-waiting)"),
        ("max-queue-s", float, "refuse calls that would wait longer than this (default: no such bound)"),
        ("max-body-bytes", int, "of one call (default 128 MiB)"),
        ("max-pending-bytes", int, "of all calls on their way (default 2 GiB)"),
        ("max-header-bytes", int, "of one call (default 32 KiB)"),
        ("max-connections", int, "open at a time (default 4096)"),
        ("max-completion-tokens", int, "ceiling on max_tokens of one answer (default: the model's context)"),
        ("header-timeout-s", float, "for a call's headers (default 10)"),
        ("body-timeout-s", float, "for a call's body (default 60)"),
        ("keep-alive-s", float, "that an idle connection is kept (default 30)"),
        ("request-timeout-s", float, "for an answer (default 600)"),
        ("drain-timeout-s", float, "for calls in flight after SIGTERM (default 60)"),
        ("stall-timeout-s", float, "without a step until /health calls the engine stuck (default 30)"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="S" if name.endswith("-s") else "N", help=text)


def _add_media(group: Any) -> None:
    group.add_argument("--allowed-domain", action="append", metavar="HOST", dest="media_allowed_domains",
                       help="a host that URLs of media may name, *.example.org for all below it; repeat for several "
                       "(default: URLs are not fetched)")  # fmt: skip
    group.add_argument("--allowed-path", type=Path, metavar="DIR", dest="media_allowed_path",
                       help="directory that file: URLs may read below (default: none)")  # fmt: skip
    group.add_argument("--allow-http", action="store_true", dest="media_allow_http", help="fetch http: URLs too")
    for name, kind, text in (
        ("max-part-bytes", int, "encoded bytes of one item (default 64 MiB)"),
        ("max-total-bytes", int, "encoded bytes of one call's items (default 256 MiB)"),
        ("max-decoded-bytes", int, "what one call's items may take decoded (default 2 GiB)"),
        ("max-image-pixels", int, "of one picture (default 64 Mi)"),
        ("max-video-frames", int, "of one video (default 768)"),
        ("max-audio-seconds", float, "of one recording (default 7200)"),
        ("max-items", int, "of one call (default 64)"),
        ("fetch-timeout-s", float, "for one URL (default 15)"),
        ("max-redirects", int, "of one URL (default 0)"),
        ("decode-workers", int, "processes that decode media, by itself 2 to 8; 0: threads of the server"),
        ("decode-memory-bytes", int, "of one decode worker (default 2 GiB)"),
        ("decode-timeout-s", float, "for one item (default 20)"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", dest=f"media_{name.replace('-', '_')}", help=text)
    group.add_argument("--limit-mm-per-prompt", action="append", metavar="KIND=N", default=[],
                       help="items of one kind in one prompt, e.g. image=8; repeat for several")  # fmt: skip


def _add_engine(group: Any) -> None:
    group.add_argument("--in-process", action="store_true", help="engine and HTTP in one process, for debugging")
    group.add_argument("--plugin", action="append", metavar="NAME", default=[],
                       help="a module with hooks that is not installed as a plugin, or which of two installed plugins "
                       "is meant; repeat for several")  # fmt: skip
    for name, kind, text in (
        ("revision", str, "branch, tag or commit of a hub id"),
        ("device", str, '"auto", "cpu", "cuda" or "cuda:0"'),
        ("max-model-len", int, "tokens of prompt and answer (default: the model's)"),
        ("max-num-seqs", int, "answers made at a time (default 256)"),
        ("max-num-batched-tokens", int, "token budget of one step (default 8192)"),
        ("encoder-cache-tokens", int, "encoder rows kept for reuse (default 32768)"),
        ("processor-cache-bytes", int, "of preprocessed media on the host (default 1 GiB)"),
        ("gpu-memory-fraction", float, "of the memory left after the weights, for the KV cache (default 0.9)"),
        ("num-kv-blocks", int, "blocks of the KV cache, instead of a share of the memory"),
        ("host-cache-gib", float, "host memory for what leaves the device (default 0: none)"),
        ("disk-cache-path", str, "directory for copies that survive a restart"),
        ("seed", int, "of requests without one"),
    ):
        field = name.replace("-", "_")
        group.add_argument(f"--{name}", type=kind, metavar=_METAVARS[kind], dest=f"engine_{field}", help=text)
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), dest="engine_dtype")
    group.add_argument("--kv-cache-dtype", choices=("auto", "float32", "bfloat16", "float16", "fp8"),
                       dest="engine_kv_cache_dtype")  # fmt: skip
    group.add_argument("--load-format", choices=("safetensors", "dummy"), dest="engine_load_format")
    group.add_argument("--hash-algorithm", choices=("sha256", "xxh3_128"), dest="engine_hash_algorithm",
                       help="of media and blocks; sha256, the default, for callers who are not trusted")  # fmt: skip
    group.add_argument("--scheduling-policy", choices=("reuse", "fcfs"), dest="engine_scheduling_policy")
    group.add_argument("--disable-kv-cache-reuse", action="store_true", dest="engine_disable_kv_cache_reuse",
                       help="compute every prompt in full")  # fmt: skip
    group.add_argument("--no-cuda-graphs", action="store_true", dest="engine_no_cuda_graphs")
    group.add_argument("--record-timeline", action="store_true", dest="engine_record_timeline",
                       help="keep what ran when, for the page's timeline")  # fmt: skip


def serve(arguments: argparse.Namespace) -> int:
    """Load the model and serve it until a signal."""
    try:
        from mm_core.server.run import serve as run_server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("mm_core", "torch", "transformers"):
            raise
        raise MissingExtraError(
            f"mm serve needs {error.name}, which is not installed. Run: pip install 'mm-core[serve]'"
        ) from None
    given = vars(arguments)
    model = str(default_model()) if arguments.model is None else arguments.model
    config = server_config(given)
    for name in (KEYS_VARIABLE, ADMIN_VARIABLE):  # nothing that is started from here is told
        os.environ.pop(name, None)
    return run_server(model, engine_options(given), config)


def server_config(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """ServerConfig of the parsed arguments and the environment. Raises ConfigError."""
    from pydantic import SecretStr

    from mm_core.server.config import MediaConfig, ServerConfig

    media = {
        name.removeprefix("media_"): _as_tuple(value) for name, value in given.items() if name.startswith("media_")
    }
    own = {name: _as_tuple(value) for name, value in given.items() if name in ServerConfig.model_fields}
    keys = [*given["api_key"], *(key.strip() for key in environ.get(KEYS_VARIABLE, "").split(",") if key.strip())]
    if given["api_key_file"] is not None:
        keys += _read_keys(given["api_key_file"])
    admin = given["admin_key"] or environ.get(ADMIN_VARIABLE) or None
    own |= {"api_keys": tuple(map(SecretStr, keys)), "admin_key": None if admin is None else SecretStr(admin)}
    made: MediaConfig = MediaConfig(**media)
    return ServerConfig(**own, media=made)


def engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of EngineConfig that were given."""
    from mm_core.config import KvCacheConfig

    own = {name.removeprefix("engine_"): value for name, value in given.items() if name.startswith("engine_")}
    kv: dict[str, Any] = {}
    for name, field in (("gpu_memory_fraction", "free_gpu_memory_fraction"), ("num_kv_blocks", "num_blocks"),
                        ("kv_cache_dtype", "dtype"), ("disk_cache_path", "disk_cache_path")):  # fmt: skip
        if name in own:
            kv[field] = own.pop(name)
    if "host_cache_gib" in own:
        kv["host_cache_size"] = round(own.pop("host_cache_gib") * _GIB)
    if own.pop("disable_kv_cache_reuse", False):
        kv["enable_block_reuse"] = False
    if own.pop("no_cuda_graphs", False):
        own["cuda_graphs"] = False
    if "processor_cache_bytes" in own:
        own["processor_cache_size"] = own.pop("processor_cache_bytes")
    if limits := given["limit_mm_per_prompt"]:
        own["limit_mm_per_prompt"] = dict(map(_limit, limits))
    if plugins := given["plugin"]:
        own["plugins"] = [_plugin(name) for name in plugins]
    return {**own, "kv_cache_config": KvCacheConfig(**kv)}


def _plugin(name: str) -> Any:
    """A module; or the name as it is, which the registry looks for among installed plugins."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.split(".")[0] == error.name.split(".")[0]:
            return name
        raise PluginError(f"--plugin {name} needs {error.name}, which is not installed.") from None
    except Exception as error:
        raise PluginError(f"--plugin {name} cannot be imported: {type(error).__name__}: {error}.") from error


def _limit(text: str) -> tuple[str, int]:
    kind, _, number = text.partition("=")
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"--limit-mm-per-prompt {text}: want KIND=N, e.g. image=8.")
    return kind, int(number)


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}.") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: the server would be open to everybody.")
    return keys


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
