"""Requests that reuse each other's work in every way, and what each must answer.

A world is a tiny model with media of its own. `Script` draws requests for it in waves: those of a wave may run
together, and a name (uuid) means one thing within a wave.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.inputs import ChatPrompt
from support.pictures import frames, picture
from support.scripts import module_of
from support.tiny import make_tiny_qwen2vl
from support.tiny_whisper import make_tiny_whisper, sound

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs/examples/mm-plugin-qwen2audio"
SALTS = (None, None, None, "alice", "bob")
# Two system prompts that part within a block of 16 tokens.
SYSTEMS = (
    "You are a helpful assistant. The user asks, the assistant answers. The quick brown fox jumps over the lazy dog.",
    "You are a helpful assistant. The user asks, the assistant answers. The cat sleeps in the warm sun all day long.",
)
QUESTIONS = (
    "Describe this image.", "What is in the picture?", "Describe these images in one sentence.",
    "Tell what there is to see and hear.", "The cat sleeps in the warm sun.", "Why?", "A system reads sound.",
)  # fmt: skip
SPEECH = ("<|startoftranscript|><|en|><|transcribe|><|notimestamps|>", "<|startoftranscript|><|de|><|transcribe|>")


@dataclass(frozen=True)
class Item:
    """A piece of media, by its place in the world."""

    modality: str
    index: int
    value: Any = field(compare=False, hash=False, default=None)


@dataclass(frozen=True)
class World:
    """A tiny model. marks: the text of an item's place in a prompt. chats: whether it converses. rows: room
    for encoder rows that is too little. host_cache_size: room for some of what its requests leave."""

    name: str
    path: Path
    items: tuple[Item, ...]
    marks: dict[str, str]
    plugins: tuple[Any, ...] | None = None
    chats: bool = True
    rows: int = 64
    host_cache_size: int = 2 * 2**20

    def start(self, num_blocks: int = 512, *, kv: dict[str, Any] | None = None, **options: Any) -> Engine:
        cache = KvCacheConfig(num_blocks=num_blocks, **(kv or {}))
        plugins = None if self.plugins is None else list(self.plugins)
        settings = {"device": "cpu", "dtype": "float32", "show_progress": False, **options}
        return Engine.from_pretrained(self.path, kv_cache_config=cache, plugins=plugins, **settings)


def pictures(folder: Path) -> World:
    sizes = [(112, 84), (84, 84), (168, 56), (56, 112), (140, 112), (84, 140), (196, 84), (112, 112)]
    items = [Item("image", i, picture(700 + i, *size)) for i, size in enumerate(sizes)]
    clips = [{"frames": frames(80 + i, 2 + 2 * (i % 2)), "fps": 2.0} for i in range(3)]
    items += [Item("video", i, clip) for i, clip in enumerate(clips)]
    marks = {m: f"<|vision_start|><|{m}_pad|><|vision_end|>" for m in ("image", "video")}
    return World("pictures", make_tiny_qwen2vl(folder, version="2.5"), tuple(items), marks)


def sounds(folder: Path) -> World:
    """The guide's plugin, from its source, and the checkpoint of its own tests."""
    if str(EXAMPLE / "src") not in sys.path:
        sys.path.append(str(EXAMPLE / "src"))
    plugin = importlib.import_module("mm_plugin_qwen2audio")
    checks = module_of(EXAMPLE / "tests" / "test_conformance.py", "qwen2audio_checks")
    path = checks.TestQwen2Audio().checkpoint(folder)
    items = tuple(Item("audio", i, checks.sound(90 + i, 0.2 + 0.15 * i)) for i in range(7))
    return World("sounds", path, items, {"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"}, (plugin,))


def speech(folder: Path) -> World:
    """Cross-attention: what was heard lies in blocks of its own."""
    items = tuple(Item("audio", i, (sound(1.0 + i, seed=i), 16000)) for i in range(6))
    return World(
        "speech", make_tiny_whisper(folder), items, {"audio": ""}, chats=False, rows=3000, host_cache_size=6 * 2**20
    )


WORLDS: dict[str, Callable[[Path], World]] = {"pictures": pictures, "sounds": sounds, "speech": speech}


# -- what is asked -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request as it is sent, and how it is sent without names and salts."""

    prompt: TextPrompt | ChatPrompt
    plain: TextPrompt | ChatPrompt
    params: SamplingParams
    wanted: tuple[int, ...] = ()
    text: str = ""

    @property
    def salt(self) -> str | None:
        return self.prompt.cache_salt


@dataclass(frozen=True, eq=False)
class Talk:
    """A conversation so far, its media as content."""

    salt: str | None
    messages: tuple[dict[str, Any], ...]


@dataclass(eq=False)
class Script:
    """Draws requests. truth: answers a request without any reuse. forget: a new engine knows no names."""

    world: World
    truth: Callable[[Ask], tuple[tuple[int, ...], str]]
    seed: int = 0
    max_tokens: int = 20

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._names: dict[tuple[str | None, str, str], Item] = {}  # what each means from the next wave on
        self._talks: list[Talk] = []
        self._asked: list[Ask] = []
        self._twins = 0
        self._known: dict[Any, tuple[tuple[int, ...], str]] = {}

    def forget(self, salts: Iterable[str | None] | None = None) -> None:
        """Names mean nothing any more: those of some salts, or all."""
        gone = list(salts) if salts is not None else list(SALTS)
        self._names = {name: item for name, item in self._names.items() if name[0] not in gone}

    def some_name(self) -> tuple[str, str | None] | None:
        """A uuid that means something now, and its salt."""
        salt, _, uuid = self._random.choice(list(self._names) or [(None, "", "")])
        return (uuid, salt) if uuid else None

    def wave(self, count: int) -> list[Ask]:
        """Requests that may run together."""
        before, fresh = dict(self._names), {}
        self._open = list(self._talks)
        asks = [self._answered(self._draw(before, fresh)) for _ in range(count)]
        self._names.update(fresh)
        self._asked += asks
        for ask in asks:
            self._continue(ask)
        return asks

    def twins(self, count: int) -> list[Ask]:
        """The latest requests once more, each under a salt that nobody had before. None has an item twice."""
        found: list[Ask] = []
        for ask in reversed(self._asked):
            if len(found) < count and len(set(map(id, values := media_of(ask.plain)))) == len(values):
                self._twins += 1
                found.append(replace(ask, prompt=replace(ask.plain, cache_salt=f"twin-{self._twins}")))
        return found

    def _draw(self, before: dict[Any, Item], fresh: dict[Any, Item]) -> Ask:
        rng = self._random
        kind = rng.choices(("again", "chat", "media", "text"), (2, 3 * self.world.chats, 4, 1))[0]
        params = self._params()
        if kind == "again" and self._asked:
            old = rng.choice(self._asked)
            return replace(old, prompt=replace(old.plain, cache_salt=rng.choice(SALTS)))
        if kind == "chat":
            return self._chat(before, fresh, params)
        if kind == "text" and self.world.chats:
            text = f"{rng.choice(SYSTEMS)} {rng.choice(QUESTIONS)}"
            return Ask(TextPrompt(prompt=text, cache_salt=rng.choice(SALTS)), TextPrompt(prompt=text), params)
        return self._media(before, fresh, params)

    def _params(self) -> SamplingParams:
        rng = self._random
        length = rng.choice((1, 5, self.max_tokens, self.max_tokens))
        if rng.random() < 0.15:
            return SamplingParams(max_tokens=length, temperature=0.8, seed=rng.randrange(3), ignore_eos=True)
        return SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)

    def _items(self, most: int) -> list[Item]:
        weights = [1 / (1 + place) for place in range(len(self.world.items))]
        return self._random.choices(self.world.items, weights, k=self._random.randint(1, most))

    def _named(self, item: Item, salt: str | None, before: dict[Any, Item], fresh: dict[Any, Item]) -> tuple[Any, Any]:
        """What is sent of an item, and its uuid: content, content with a name, or the name alone."""
        rng = self._random
        known = [uuid for (s, m, uuid), i in before.items() if (s, m) == (salt, item.modality) and i == item]
        known = [uuid for uuid in known if fresh.get((salt, item.modality, uuid), item) == item]
        if known and rng.random() < 0.6:
            name = (salt, item.modality, rng.choice(known))
            fresh[name] = item  # it keeps its meaning in this wave
            return None, name[2]
        if rng.random() < 0.5:
            return item.value, None
        name = (salt, item.modality, f"name-{rng.randrange(6)}")
        if fresh.setdefault(name, item) != item:
            return item.value, None
        return item.value, name[2]

    def _media(self, before: dict[Any, Item], fresh: dict[Any, Item], params: SamplingParams) -> Ask:
        rng, salt = self._random, self._random.choice(SALTS)
        items = self._items(2 if self.world.chats else 1)
        if self.world.chats:
            head = rng.choice((*SYSTEMS, ""))
            text = head + "".join(self.world.marks[i.modality] for i in items) + rng.choice(QUESTIONS)
        else:
            text = rng.choice(SPEECH)
        sent: dict[str, list[Any]] = {}
        uuids: dict[str, list[Any]] = {}
        plain: dict[str, list[Any]] = {}
        options = {"max_pixels": 56 * 84} if self.world.name == "pictures" and rng.random() < 0.15 else None
        for item in items:
            value, uuid = (item.value, None) if options else self._named(item, salt, before, fresh)
            sent.setdefault(item.modality, []).append(value)
            uuids.setdefault(item.modality, []).append(uuid)
            plain.setdefault(item.modality, []).append(item.value)
        prompt = TextPrompt(prompt=text, multi_modal_data=sent, multi_modal_uuids=uuids or None, cache_salt=salt,
                            mm_processor_kwargs=options)  # fmt: skip
        return Ask(prompt, TextPrompt(prompt=text, multi_modal_data=plain, mm_processor_kwargs=options), params)

    def _chat(self, before: dict[Any, Item], fresh: dict[Any, Item], params: SamplingParams) -> Ask:
        """The first turn of a conversation, or the next of one that an earlier wave left."""
        rng = self._random
        question = {"type": "text", "text": rng.choice(QUESTIONS)}
        if self._open and rng.random() < 0.6:
            talk = self._open.pop(rng.randrange(len(self._open)))
            self._talks.remove(talk)
        else:
            talk = Talk(rng.choice(SALTS), ())
        media = [] if talk.messages else [{"type": i.modality, i.modality: i.value} for i in self._items(2)]
        messages = [*talk.messages, {"role": "user", "content": [*media, question]}]
        sent = [self._renamed(message, talk.salt, before, fresh) for message in messages]
        return Ask(ChatPrompt(sent, None, talk.salt), ChatPrompt(messages), params)

    def _renamed(self, message: dict[str, Any], salt: str | None, before: Any, fresh: Any) -> dict[str, Any]:
        """A message with names for some of its media."""
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            item = next((i for i in self.world.items if part.get(i.modality) is i.value), None)
            if item is not None:
                value, uuid = self._named(item, salt, before, fresh)
                named = {"type": item.modality, item.modality: value, "uuid": uuid}
                part = {k: v for k, v in named.items() if v is not None}
            parts.append(part)
        return {**message, "content": parts}

    def _answered(self, ask: Ask) -> Ask:
        signature = (_signed(ask.plain), ask.params.model_dump_json())
        if signature not in self._known:
            self._known[signature] = self.truth(ask)
        wanted, text = self._known[signature]
        return replace(ask, wanted=wanted, text=text)

    def _continue(self, ask: Ask) -> None:
        """A conversation of fewer than three turns goes on in some later wave."""
        if isinstance(ask.plain, ChatPrompt) and len(ask.plain.messages) < 5:
            talk = Talk(ask.salt, (*ask.plain.messages, {"role": "assistant", "content": ask.text}))
            self._talks = [*self._talks[-11:], talk]


def media_of(prompt: TextPrompt | ChatPrompt) -> list[Any]:
    """The values of a plain prompt's media."""
    if isinstance(prompt, TextPrompt):
        return [value for values in (prompt.multi_modal_data or {}).values() for value in values]
    parts = [p for m in prompt.messages if not isinstance(m["content"], str) for p in m["content"]]
    return [p[p["type"]] for p in parts if p["type"] != "text"]


def _signed(value: Any) -> Any:
    """What tells plain prompts apart: media by their identity."""
    if isinstance(value, TextPrompt | ChatPrompt):
        return tuple(_signed(v) for v in vars(value).values())
    if isinstance(value, dict):
        return tuple((k, _signed(v)) for k, v in value.items())
    if isinstance(value, list | tuple) and not (len(value) == 2 and hasattr(value[0], "shape")):
        return tuple(_signed(v) for v in value)
    return value if isinstance(value, str | int | float | None) else id(value)


def ask_all(engine: Engine, asks: list[Ask]) -> Iterator[Any]:
    """Outputs of requests that run together, in order."""
    prompts = [ask.prompt for ask in asks]
    yield from engine._run(prompts, [ask.params for ask in asks], None)
