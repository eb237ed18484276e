"""ServerConfig: everything that `mm serve` can be told beside the engine's own settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from mm_core.config import Settings

Bytes = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0, le=86400.0)]
Count = Annotated[int, Field(ge=1)]


def _half_the_processors() -> int:
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(there // 2, 2), 8)


class MediaConfig(Settings):
    """What media a request may bring, and from where. All ceilings hold before bytes or pixels are in memory.

    allowed_domains: hosts that URLs may name ("example.org", or "*.example.org" for all below it); none: URLs are
    not fetched at all. allowed_path: directory that `file:` URLs may read below; None: none may.
    max_part_bytes: encoded bytes of one item. max_image_pixels, max_video_frames, max_audio_seconds: of one item.
    max_total_bytes, max_decoded_bytes, max_items: of one request, over all modalities. fetch_timeout_s: for one URL,
    all in all; max_redirects: each is checked as the first address was. decode_workers: processes that decode media (by
    itself half as many as there are processors, 2 to 8), each bounded in memory (decode_memory_bytes) and time
    (decode_timeout_s); 0: threads of the server's own process (no bounds).
    """

    allowed_domains: tuple[str, ...] = ()
    allowed_path: Path | None = None
    max_part_bytes: Bytes = 64 * 2**20
    max_image_pixels: Count = 64 * 2**20
    max_video_frames: Count = 768
    max_audio_seconds: Seconds = 7200.0
    max_total_bytes: Bytes = 256 * 2**20
    max_decoded_bytes: Bytes = 2 * 2**30
    max_items: Count = 64
    fetch_timeout_s: Seconds = 15.0
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 0
    allow_http: bool = False
    decode_workers: Annotated[int, Field(ge=0, le=64)] = Field(default_factory=_half_the_processors)
    decode_memory_bytes: Bytes = 2 * 2**30
    decode_timeout_s: Seconds = 20.0


class ServerConfig(Settings):
    """Where the server listens, who may ask, and how much.

    api_keys: who may ask; none: everybody who reaches the port. admin_key: opens the routes that change caches;
    None: they are off. Each key's callers have caches of their own. served_model_name: the name clients use (None:
    the model's). max_body_bytes: of one call; max_pending_bytes: of all that are on their way.
    header_timeout_s, body_timeout_s: how long a client may take to send.
    max_waiting: calls that may wait for the engine; more are refused with 429. max_waiting_per_key: of one key's.
    max_running: answers inside the engine (None: twice its max_num_seqs). max_queue_s: calls that would wait longer, as
    far as the recent rate tells, are refused too. allowed_origins: web pages that may call from a browser.
    allowed_hosts: names under which a server without keys may be called, beside `host`, localhost and addresses.
    request_timeout_s: of one answer. drain_timeout_s: how long calls in flight may take to end after SIGTERM.
    stall_timeout_s: without a step, while there is work, for which `/health` calls the engine stuck. in_process: engine
    and HTTP in one process. log_format: of the lines on stderr. log_prompts: also log what was asked (never media).
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[SecretStr, ...] = ()
    admin_key: SecretStr | None = None
    served_model_name: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    media: MediaConfig = Field(default_factory=MediaConfig)
    max_body_bytes: Bytes = 128 * 2**20
    max_pending_bytes: Bytes = 2 * 2**30
    max_header_bytes: Bytes = 32 * 2**10
    max_connections: Count = 4096
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    keep_alive_s: Seconds = 30.0
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    max_waiting_per_key: Annotated[int, Field(ge=0)] | None = None
    max_running: Count | None = None
    max_queue_s: Seconds | None = None
    request_timeout_s: Seconds = 600.0
    drain_timeout_s: Seconds = 60.0
    stall_timeout_s: Seconds = 30.0
    max_completion_tokens: Count | None = None
    playground: bool = True
    in_process: bool = False
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = [key.get_secret_value() for key in self.api_keys]
        if not all(keys) or (self.admin_key is not None and not self.admin_key.get_secret_value()):
            raise ValueError("api_keys and admin_key: a key cannot be empty")
        if self.admin_key is not None and self.admin_key.get_secret_value() in keys:
            raise ValueError("admin_key is one of api_keys: whoever has that could change everybody's caches")
        for origin in self.allowed_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"allowed_origins: {origin!r} is no origin, e.g. https://page.example")
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", host):
                raise ValueError(f"allowed_hosts: {host!r} is no host's name, e.g. box.example (without a port)")
        return self
