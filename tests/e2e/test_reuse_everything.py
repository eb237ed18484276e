"""Thousands of requests through every kind of reuse at once: none changes a token, the books balance after every step,
and nobody is served from another salt's work (fp32, on the CPU).
"""

from __future__ import annotations

import collections
import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.reuse_worlds import SYSTEMS, WORLDS, Ask, Script, World, ask_all
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, SamplingParams, TextPrompt
from mm_core.bench.analysis import difference
from mm_core.errors import MediaNotCachedError


class Truth:
    """A cold engine that answers one request at a time, each under a salt that nobody had before."""

    def __init__(self, world: World) -> None:
        self.engine = world.start(kv={"enable_block_reuse": False}, processor_cache_size=0)
        self._salts = itertools.count()

    def __call__(self, ask: Ask) -> tuple[tuple[int, ...], str]:
        alone = replace(ask, prompt=replace(ask.plain, cache_salt=f"truth-{next(self._salts)}"))
        (output,) = ask_all(self.engine, [alone])
        return output.token_ids, output.text

    def close(self) -> None:
        stats = self.engine.stats()
        assert stats["cached_tokens"] == stats["blocks"]["cached"] == 0
        assert stats["preemptions"] == stats["partial_prefills"] == 0
        self.engine.close()


class Watch:
    """Looks at the books after every step of an engine, and at whose blocks a sequence is given."""

    def __init__(self, engine: Engine) -> None:
        self.scheduler = engine._frontend._core.scheduler
        self.steps = self.shared = self.copied = 0
        self.faults: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        for name in ("schedule", "update"):
            setattr(self.scheduler, name, self._checked(getattr(self.scheduler, name)))

    def _checked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*given: Any) -> Any:
            result = call(*given)
            self.steps += 1
            try:
                self.scheduler.check_integrity()
            except RuntimeError as error:
                self.faults.append(f"step {self.scheduler.stats.steps}, after {call.__name__}: {error}")
            if not given and result is not None:
                self._look_at(result)
            return result

        return checked

    def _look_at(self, batch: Any) -> None:
        """Blocks that sequences begin with, and those that are copied from, are of the sequence's own salt."""
        find, size = self.scheduler.prefix.content, self.scheduler.pool.block_size
        owners = {block: s.seq for s in batch.sequences for block in s.seq.tables["self"]}
        for scheduled in batch.sequences:
            seq = scheduled.seq
            if (seq.seq_id, seq.epoch) in self._seen:
                continue
            self._seen.add((seq.seq_id, seq.epoch))
            blocks = seq.tables["self"][: scheduled.start // size]
            if seq.source is not None and seq not in batch.sources:
                blocks = [*blocks, *seq.tables["cross"]]
            for block in blocks:
                content = find(block)
                self.shared += 1
                if content is None or content.salt != seq.request.cache_salt:
                    self.faults.append(f"sequence {seq.seq_id} of {seq.request.cache_salt} was given {content}")
        for copy in batch.transfers.copies:
            self.copied += copy.num_tokens
            content, owner = find(copy.source), owners.get(copy.target)
            if owner is None or content is None or content.salt != owner.request.cache_salt:
                self.faults.append(f"a copy from {content} for {owner and owner.request.cache_salt}")


@dataclass
class Run:
    """Phases of one script, each with an engine of its own."""

    script: Script
    asked: int = 0
    wrong: list[str] = field(default_factory=list)
    totals: collections.Counter[str] = field(default_factory=collections.Counter)

    def phase(self, engine: Engine, waves: int, size: int, willing: float | None) -> None:
        """Waves of requests, some of which are given up on the way. willing: how likely it is that what could be
        copied back is; None: as measured costs have it."""
        watch = Watch(engine)
        # Admission counts on no output, so that sequences are preempted where the cache is small.
        watch.scheduler.outlook.wants = lambda _: (1, 0)  # type: ignore[method-assign]
        watch.scheduler.reuse._copy_tokens = 4  # beginnings of blocks are copied, too
        if willing is not None:
            dice, policy = random.Random(self.asked), watch.scheduler.policy
            watch.scheduler.policy = replace(policy, restores=lambda *_: dice.random() < willing)
        self.script.forget()
        before = engine.stats()
        for number in range(waves):
            if number % 3 == 2:
                engine.cache.evict(salt="bob")
                self.script.forget(["bob"])
            pinned = self.script.some_name()
            if pinned is not None:
                self.totals["pinned tokens"] += engine.cache.pin(pinned[0], cache_salt=pinned[1]).kv_tokens
            asks = self.script.wave(size)
            dropped = [engine.stream(ask.prompt, ask.params) for ask in asks[:1]]
            for ask, output in zip(asks, ask_all(engine, asks), strict=True):
                self._compare(ask, output)
            for stream in dropped:
                stream.close() if hasattr(stream, "close") else None
            del dropped
            if pinned is not None:
                engine.cache.unpin(pinned[0], cache_salt=pinned[1])
            assert watch.faults == [], watch.faults[:3]
        engine.wait_idle()
        watch.scheduler.check_integrity()
        grown = difference(before, engine.stats())
        self._count(grown, watch)

    def _compare(self, ask: Ask, output: Any) -> None:
        self.asked += 1
        if output.token_ids != ask.wanted:
            usage = output.usage
            self.wrong.append(f"{ask.prompt}: {output.token_ids} is not {ask.wanted}; {usage}")

    def _count(self, grown: dict[str, Any], watch: Watch) -> None:
        host = grown["host_cache"]
        self.totals.update({
            "steps": watch.steps, "shared blocks": watch.shared, "tokens of partial blocks": watch.copied,
            "prefix hits": grown["cached_tokens"], "encoder hits": grown["encoder_cache"]["hits"],
            "processor hits": grown["processor_cache"]["hits"], "preemptions": grown["preemptions"],
            "chunks": grown["partial_prefills"], "stored": host["offloaded"],
            "restored": host["restored"], "restored items": host["restored_items"],
            "from disk": host["disk_hits"], "spilled": host["spilled"],
            "damaged": host["damaged"],
        })  # fmt: skip


def quarter(asks: list[Ask], seqs: int, prompts: Callable[[Ask], int]) -> int:
    """Blocks of a pool that holds a quarter of what `seqs` running requests want."""
    mean = sum(-(-(prompts(ask) + len(ask.wanted)) // 16) for ask in asks) / len(asks)
    return int(mean * seqs / 4)


def tight(world: World, disk: Path, blocks: int, options: dict[str, Any]) -> Engine:
    """Too few blocks, chunks, little room for rows, and everything behind them."""
    kv = {
        "host_cache_size": world.host_cache_size, "disk_cache_path": str(disk), "disk_cache_size": 64 * 2**20,
        **options.get("kv", {}),
    }  # fmt: skip
    settings = {"max_num_seqs": SEQS, "max_num_batched_tokens": 40, "encoder_cache_tokens": world.rows}
    return world.start(blocks, **{**settings, **options, "kv": kv})


SEQS = 16
# Engines that follow each other on one disk, and how willing each is to copy back.
PHASES: tuple[tuple[float | None, dict[str, Any]], ...] = (
    (1.0, {}),
    (1.0, {"overlap": True, "max_num_batched_tokens": 23, "kv": {"host_cache_checksums": True}}),
    (0.5, {"scheduling_policy": "fcfs", "preprocess_threads": 1}),
    (None, {"overlap": True, "encoder_budget": 1}),
)


def everything(
    folder: Path, name: str, waves: int, size: int, seed: int, phases: int = len(PHASES)
) -> collections.Counter[str]:
    """The first phases in one world; returns what the engines did."""
    (folder / name).mkdir()
    world = WORLDS[name](folder / name)
    truth = Truth(world)
    script = Script(world, truth, seed, max_tokens=20 if waves > 2 else 12)
    run = Run(script)
    blocks = blocks_for(world, truth)
    for willing, options in PHASES[:phases]:
        with tight(world, folder / f"{name}-disk", blocks, options) as engine:
            run.phase(engine, waves, size, willing)
            twins(engine, script)
        assert run.wrong == [], f"{len(run.wrong)} of {run.asked}, the first: {run.wrong[0]}"
    truth.close()
    assert run.asked == phases * waves * size
    return run.totals


def blocks_for(world: World, truth: Truth) -> int:
    """A quarter of what the running requests want, as a sample of them shows."""
    sample = Script(world, truth, 12345).wave(24)
    lengths = {}
    for ask in sample:
        submitted = truth.engine._frontend.pipeline.submit("length", ask.plain).result(30)
        source = 0 if submitted.source is None else submitted.source.num_tokens
        lengths[id(ask)] = len(submitted.token_ids) + source
    return max(quarter(sample, SEQS, lambda ask: lengths[id(ask)]), -(-max(lengths.values()) // 16) + 2)


def twins(engine: Engine, script: Script) -> None:
    """Requests that were answered before, each under a salt of its own now: whatever they found would be another's."""
    asks = script.twins(12)
    before = engine.stats()
    for ask in asks:
        (output,) = ask_all(engine, [ask])
        assert output.token_ids == ask.wanted
        assert output.usage.cached_tokens == 0, ask.prompt
        assert output.usage.encoded_media_tokens == output.usage.media_tokens, ask.prompt
    host = difference(before, engine.stats())["host_cache"]
    assert host["host_hits"] == host["disk_hits"] == host["restored_items"] == 0


PATHS = (
    "prefix hits", "encoder hits", "processor hits", "preemptions", "chunks", "tokens of partial blocks", "stored",
    "restored", "restored items", "spilled", "from disk", "pinned tokens",
)  # fmt: skip


def check(totals: collections.Counter[str]) -> None:
    """Every path was taken, and nothing was damaged on the way."""
    print(dict(totals))
    assert [name for name in PATHS if not totals[name]] == []
    assert totals["damaged"] == 0


def test_a_few_of_everything(tmp_path: Path) -> None:
    totals: collections.Counter[str] = collections.Counter()
    for name, size, phases in (("pictures", 8, 4), ("sounds", 6, 2), ("speech", 4, 2)):
        totals.update(everything(tmp_path, name, 2, size, 1, phases))
    check(totals)


OTHERS: dict[str, dict[str, Any]] = {
    "block size": {"kv": {"block_size": 32}},
    "hash": {"hash_algorithm": "sha256"},
    "dtype": {"dtype": "bfloat16"},
    "random weights": {"load_format": "dummy"},
    "other random weights": {"load_format": "dummy", "seed": 1},
}


@pytest.mark.slow
def test_another_model_or_setting_finds_nothing_on_the_same_disk(tmp_path: Path) -> None:
    """Keys of text alone say nothing of the model, so the file must."""
    world = WORLDS["pictures"](tmp_path)
    twin = replace(world, path=make_tiny_qwen2vl(tmp_path / "twin", version="2.5", seed=1))
    disk = tmp_path / "disk"
    kv = {"host_cache_size": world.host_cache_size, "disk_cache_path": str(disk)}
    text = SYSTEMS[0] + " " + SYSTEMS[1]
    picture = TextPrompt(
        prompt=SYSTEMS[0] + world.marks["image"] + "Why?", multi_modal_data={"image": [world.items[6].value]},
        multi_modal_uuids={"image": ["kept"]},
    )  # fmt: skip
    prompts = [TextPrompt(prompt=text), picture]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def answers(world: World, options: dict[str, Any], *, cold: bool = False) -> tuple[list[Any], int]:
        given = {**options, "kv": {**({} if cold else kv), **options.get("kv", {})}}
        with world.start(256, **{"dtype": "float32", **given}) as engine:
            outputs = [engine.generate(prompt, params)[0].token_ids for prompt in prompts]
            return outputs, 0 if cold else engine.stats()["host_cache"]["disk_hits"]

    wanted, hits = answers(world, {})
    assert hits == 0
    for name, options in {"weights": {}, **OTHERS}.items():
        other = twin if name == "weights" else world
        found, hits = answers(other, options)
        assert hits == 0, name
        assert name != "weights" or found == answers(twin, {}, cold=True)[0] != wanted
    again, hits = answers(world, {})
    assert again == wanted
    assert hits >= 64
    (weights,) = world.path.glob("*.safetensors")
    with world.start(256, kv=kv) as engine:
        with pytest.raises(MediaNotCachedError, match="with the content"):
            engine.generate(replace(picture, multi_modal_data=None), params)
        (output,) = engine.generate(picture, params)
        assert output.usage.cached_tokens > 0, "what a uuid means ends with the engine, what was computed does not"
        assert output.token_ids == wanted[1]
    os.utime(weights, ns=(1, 1))
    assert answers(world, {}) == (wanted, 0), "weights that were written anew may be others"


def test_pins_never_keep_a_request_from_running(tmp_path: Path) -> None:
    """Half of the blocks and of the rows are pinned; a request comes that needs more than the rest."""
    world = WORLDS["pictures"](tmp_path)
    small, large = world.items[1].value, world.items[4].value
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    prompts = [
        TextPrompt(prompt=SYSTEMS[0] + world.marks["image"] * 2, multi_modal_data={"image": [picture, picture]})
        for picture in (small, large)
    ]
    named = replace(prompts[0], multi_modal_uuids={"image": ["kept", None]})
    with world.start(32) as engine:
        wanted = engine.generate(prompts[1], params)[0].token_ids
    for budget, overlap in itertools.product((16, 512), (False, True)):
        with world.start(8, encoder_cache_tokens=24, max_num_batched_tokens=budget, overlap=overlap) as engine:
            watch = Watch(engine)
            engine.generate(named, SamplingParams(max_tokens=1))
            held = engine.cache.pin("kept")
            assert held.kv_tokens >= 48
            assert held.encoder_rows > 0
            assert engine.generate(prompts[1], params)[0].token_ids == wanted
            engine.cache.unpin("kept")
            assert watch.faults == []
            engine.wait_idle()
            assert engine.stats()["blocks"]["pinned"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_of_everything(tmp_path: Path) -> None:
    totals: collections.Counter[str] = collections.Counter()
    for name, waves, size in (("pictures", 6, 40), ("sounds", 6, 30), ("speech", 4, 20)):
        totals.update(everything(tmp_path, name, waves, size, seed=2))
    check(totals)
