"""What tests of the OpenAI routes share: the demo's questions, pictures as data: URLs, and a server left as it was."""

from __future__ import annotations

import base64
import functools
import json
import time
from typing import Any

import torch
from tokenizers import Tokenizer

from mm_core import Engine, RequestOutput, SamplingParams, TextPrompt
from mm_core.zoo import default_model
from support.e2e import LEAKS
from support.serving import Server

DEMO = default_model() / "samples" / "demo"
QUESTIONS: list[dict[str, Any]] = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))
IMAGE_PAD = "<|image_pad|>"
IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"


def data_url(name: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode((DEMO / name).read_bytes()).decode()


def image(url: str | None, uuid: str | None = None) -> dict[str, Any]:
    """A picture's part; without a URL the uuid stands for it."""
    part: dict[str, Any] = {"type": "image_url", "image_url": None if url is None else {"url": url}}
    return part if uuid is None else {**part, "uuid": uuid}


def user(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    """One message of the user's."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def question(row: dict[str, Any]) -> list[dict[str, Any]]:
    return user(*[image(data_url(name)) for name in row["images"]], row["question"])


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(default_model() / "tokenizer.json"))


def ids_of(text: str) -> list[int]:
    """Special tokens parsed."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


@functools.cache
def offline() -> dict[str, list[RequestOutput]]:
    """What the engine gives by itself, in this process: greedy "chat" answers to every fourth question, three
    "sampled" ones to the first, and "completions" of `BELOW` with its picture and of `TEXTS`."""
    asked = [question(row) for row in QUESTIONS[::4]]
    shown = TextPrompt(prompt=BELOW, multi_modal_data={"image": [data_url("scene.jpg")]})
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    torch.set_num_threads(1)  # as the servers have it
    with Engine.from_pretrained(default_model(), device="cpu", show_progress=False) as engine:
        return {
            "chat": engine.generate(asked, greedy),  # type: ignore[arg-type]
            "sampled": engine.generate(asked[:1], SamplingParams(max_tokens=12, temperature=1.5, seed=5, n=3)),  # type: ignore[arg-type]
            "completions": engine.generate([shown, *TEXTS], greedy),
        }


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


BELOW = turn(IMAGE + "What is below the blue heart?")
TEXTS = [turn("Count the blue squares."), "green heart,"]


class Canary:
    """A question whose answer never changes, and a server that holds nothing when nobody asks."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = server.http()
        self._body = {
            "model": self._http.get("/v1/models").json()["data"][0]["id"], "messages": question(QUESTIONS[0]),
            "temperature": 0, "return_token_ids": True,
        }  # fmt: skip
        self._wanted = self._ask()
        self._files = self._settled()["process"]["open_files"]

    def close(self) -> None:
        self._http.close()

    def _ask(self) -> list[int]:
        reply = self._http.post("/v1/chat/completions", json=self._body)
        assert reply.status_code == 200, reply.text
        ids: list[int] = reply.json()["choices"][0]["token_ids"]
        return ids

    def check(self) -> None:
        """Identical tokens; blocks, places and file handles as they were."""
        assert self._ask() == self._wanted
        assert self._settled()["process"]["open_files"] <= self._files + 2

    def _settled(self) -> dict[str, Any]:
        """The server's inside, as soon as nothing runs in it."""
        deadline = time.monotonic() + 5
        while True:
            stats = self._server.stats()
            engine, gate = stats["engine"], stats["gate"]
            held = [engine["running"], engine["waiting"], engine["blocks"]["in_use"], engine["blocks"]["pending"]]
            if not any([*held, gate["running"], gate["waiting"]]):
                return stats
            assert time.monotonic() < deadline, (engine["blocks"], gate)
            time.sleep(0.02)


def check_error(reply: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """A reply of OpenAI's error shape, without anything of our insides. Gives the error."""
    assert reply.status_code == status, (reply.status_code, reply.text[:300])
    error: dict[str, Any] = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert code is None or error["code"] == code, error
    assert not LEAKS.search(reply.text), reply.text
    assert len(reply.text) < 1500, "an error must not echo its input at length"
    return error
