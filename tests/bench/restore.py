"""Copies between a device's KV blocks, host memory and disk: are they right, and how long do they take?

    python tests/bench/restore.py [--device cuda] [--blocks 100000] [--out restore.json]

Integrity: blocks of random bytes go to host memory and come back to other blocks, through the engine's own
`TransfersRunner` with checksums, and are compared on the device; bits are flipped in host memory (and some on disk) at
random, and each must be reported, and nothing else. Then a whole engine with a tiny model, in which half of what the
host holds is damaged between two passes over the same prompts: the tokens have to be the same.

Speed, with and without checksums: stores and restores of many blocks; one picture of 2,304 tokens, its slots side by
side or scattered; the time that the engine's thread spends on launching such copies.

The blocks are those of Qwen2-VL-7B in bf16 (28 layers, 4 KV heads of 128, 16 tokens: 896 KiB), or small (`--small`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from support.pictures import picture
from support.tier_rig import Shape, TierRig, name
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.cache.disk import DiskTier
from mm_core.cache.disk_file import DiskIdentity
from mm_core.scheduler.transfers import BlockRestore, BlockStore, Spill, TransferDone

QWEN2VL_7B = {"layers": 28, "heads": 4, "head_dim": 128, "dtype": torch.bfloat16}
SMALL = {"layers": 2, "heads": 1, "head_dim": 16, "dtype": torch.bfloat16}
PICTURE = 144  # blocks of 2,304 tokens
IDENTITY = DiskIdentity("bench", "00", "", "", "", "", 16, (28, 4, 128), "xxh3_128", "any")
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


class Part:
    """`count` blocks that are stored, as many that they are restored to, and a rig around them."""

    def __init__(self, args: argparse.Namespace, count: int, slots: int, *, checksums: bool, disk: Any = None) -> None:
        shape = Shape(blocks=2 * count, **(SMALL if args.small else QWEN2VL_7B))
        staging = (min(count, 768), min(count, 292))  # as an engine with room has
        self.rig = TierRig(shape, slots, args.device, checksums, disk, staging)
        self.count = count
        self.words = self.rig.stores[0].flatten(3).view(torch.int64)

    def fill(self) -> None:
        """New random contents in the first half, nothing of use in the second."""
        first, second = self.words[:, :, : self.count], self.words[:, :, self.count :]
        first.random_(-(2**63), 2**63 - 1)
        second.fill_(-1)
        self.rig.wait()

    def store(self, slots: Sequence[int]) -> list[TransferDone]:
        """All of the first half; what finds no room in staging is ordered again, as blocks evicted later are."""
        left = dict(enumerate(slots))
        done: list[TransferDone] = []
        while left:
            self.rig.launch(stores=[BlockStore(name(b), b, s) for b, s in left.items()])
            ended = self.rig.finish()
            done += [d for d in ended if d.ok]
            stored = {d.key for d in ended if d.ok}
            left = {b: s for b, s in left.items() if name(b) not in stored}
        return done

    def differing(self, pairs: Sequence[tuple[int, int]]) -> int:
        """Of (stored, restored) blocks, how many are not alike, compared on the device."""
        self.rig.wait()
        ones, twos = (torch.tensor(side, device=self.words.device) for side in zip(*pairs, strict=True))
        wrong = 0
        for at in range(0, len(ones), 256):
            one, two = (self.words.index_select(2, side[at : at + 256]) for side in (ones, twos))
            wrong += int((one != two).any(3).any(1).any(0).sum())
        return wrong


def check_integrity(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of store, flip, restore, compare."""
    count = min(args.round, args.blocks)
    part = Part(args, count, 2 * count, checksums=True)
    draw = random.Random(args.seed)
    found = {"restored": 0, "mismatches": 0, "flipped": 0, "caught": 0, "false_alarms": 0}
    begin = time.perf_counter()
    while found["restored"] < args.blocks:
        part.fill()
        slots = draw.sample(range(2 * count), count) if draw.random() < 0.5 else list(range(count))
        part.store(slots)
        flipped = set(draw.sample(range(count), max(count // 50, 1)))
        for block in flipped:
            part.rig.flip(slots[block], draw.randrange(8 * part.rig.slot_bytes))
        targets = draw.sample(range(count, 2 * count), count)
        part.rig.launch(restores=[BlockRestore(name(b), targets[b], slots[b]) for b in range(count)])
        done = {d.key: d for d in part.rig.finish()}
        damaged = {b for b in range(count) if done[name(b)].damaged}
        found["flipped"] += len(flipped)
        found["caught"] += len(flipped & damaged)
        found["false_alarms"] += len(damaged - flipped)
        good = [(b, targets[b]) for b in range(count) if done[name(b)].ok]
        found["restored"] += len(good)
        found["mismatches"] += part.differing(good)
    part.rig.close()
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def check_disk(args: argparse.Namespace) -> dict[str, Any]:
    """The same by way of a file, with bits flipped in it."""
    count = min(256, args.blocks // 4)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        slot_bytes = Part(args, 1, 1, checksums=False).rig.slot_bytes
        disk = DiskTier.open(folder, (count + 8) * (slot_bytes + 4096), IDENTITY, slot_bytes)
        assert disk is not None
        part = Part(args, count, count, checksums=True, disk=disk)
        part.fill()
        part.store(range(count))
        spills = [_reserve(disk, block) for block in range(count)]
        begin = time.perf_counter()
        part.rig.launch(spills=spills)
        written = sum(d.ok for d in part.rig.finish())
        write_s = time.perf_counter() - begin
        for spill in spills:
            disk.commit(spill.key)
        flipped = set(draw.sample(range(count), count // 10))
        _flip_on_disk(Path(folder), disk, [spills[block].places[0] for block in flipped], draw)
        orders = [BlockRestore(s.key, count + b, b, s.places[0]) for b, s in enumerate(spills)]
        begin = time.perf_counter()
        part.rig.launch(restores=orders)
        done = {d.key: d for d in part.rig.finish()}
        read_s = time.perf_counter() - begin
        damaged = {b for b in range(count) if done[name(b)].damaged}
        wrong = part.differing([(b, count + b) for b in range(count) if b not in damaged])
        part.rig.close()
    return {
        "written": written, "restored": count - len(damaged), "mismatches": wrong, "flipped": len(flipped),
        "caught": len(flipped & damaged), "false_alarms": len(damaged - flipped),
        "write_gb_s": round(written * slot_bytes / write_s / 1e9, 2),
        "read_gb_s": round(count * slot_bytes / read_s / 1e9, 2),
    }  # fmt: skip


def _reserve(disk: DiskTier, block: int) -> Spill:
    places = disk.reserve(name(block), 1, (block,))
    assert places is not None
    return Spill(name(block), (block,), places, (block,))


def _flip_on_disk(folder: Path, disk: DiskTier, places: Sequence[int], draw: random.Random) -> None:
    (file,) = folder.iterdir()
    descriptor = os.open(file, os.O_RDWR)
    for place in places:
        at = disk._file._sizes.content_at(place) + draw.randrange(disk._file.slot_bytes)
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ (1 << draw.randrange(8))]), at)
    os.close(descriptor)


def check_engine(args: argparse.Namespace) -> dict[str, Any]:
    """A whole engine: tokens of a first pass, of one with restored blocks, and of one with half of them damaged."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [
        TextPrompt(prompt=f"{image}Describe image {i}.", multi_modal_data={"image": picture(i, 280, 200)})
        for i in range(args.prompts)
    ]

    def tokens(engine: Engine) -> list[tuple[int, ...]]:
        outputs: list[RequestOutput] = engine.generate(prompts, GREEDY)
        return [output.token_ids for output in outputs]

    with tempfile.TemporaryDirectory() as folder:
        kv = KvCacheConfig(num_blocks=20, host_cache_size=64 * 2**20, host_cache_checksums=True)
        options = {"device": args.device, "dtype": "float32", "kv_cache_config": kv, "encoder_cache_tokens": 128}
        path = make_tiny_qwen2vl(Path(folder))
        with Engine.from_pretrained(path, show_progress=False, cuda_graphs=False, **options) as engine:
            scheduler = engine._frontend._core.scheduler
            scheduler.policy = replace(scheduler.policy, restores=lambda *_: True)  # so small a model computes faster
            cold = tokens(engine)
            same = [tokens(engine) == cold for _ in range(2)]
            restored = engine.stats()["host_cache"]["restored"]
            engine.wait_idle()
            memory = engine._frontend._core.runner.transfers._memory
            for slot in range(0, memory.num_slots, 2):
                memory.slot(slot)[slot % memory.slot_bytes] ^= 1
            same += [tokens(engine) == cold for _ in range(2)]
            stats = engine.stats()["host_cache"]
    return {
        "prompts": len(prompts), "restored_before": restored, "restored": stats["restored"],
        "damaged": stats["damaged"], "passes_alike": sum(same), "passes": len(same),
    }  # fmt: skip


# -- speed -------------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace, *, checksums: bool) -> dict[str, Any]:
    """Medians; a second each at most."""
    many = min(args.round, 512)
    part = Part(args, many, 4 * many, checksums=checksums)
    part.fill()
    rig, size = part.rig, part.rig.slot_bytes
    side_by_side = list(range(many))
    scattered = random.Random(args.seed).sample(range(many, 4 * many, 2), many)  # no two lie side by side
    found: dict[str, Any] = {"slot_bytes": size, "blocks": many}

    def stores(slots: Sequence[int]) -> dict[str, Any]:
        return {"stores": [BlockStore(name(b), b, s) for b, s in enumerate(slots)]}

    def restores(slots: Sequence[int]) -> dict[str, Any]:
        return {"restores": [BlockRestore(name(b), many + b, s) for b, s in enumerate(slots)]}

    part.store(side_by_side)
    part.store(scattered)
    for label, slots in (("side by side", side_by_side), ("scattered", scattered)):
        for kind, orders, count in (
            ("store", stores(slots), many), ("restore", restores(slots), many),
            ("picture restored", restores(slots[:PICTURE]), min(PICTURE, many)),
            ("picture stored", stores(slots[:PICTURE]), min(PICTURE, many)),
        ):  # fmt: skip
            total, launch, last, device = _time(rig, orders)
            found[f"{kind}, {label}"] = {
                "blocks": count, "ms": _ms(total), "gb_s": round(count * size / statistics.median(total) / 1e9, 2),
                "launch_ms": _ms(launch), "last_poll_ms": _ms(last), "device_ms": _ms(device),
            }  # fmt: skip
    both = {**stores(side_by_side), **restores(scattered)}
    total, launch, _, _ = _time(rig, both)
    speed = round(2 * many * size / statistics.median(total) / 1e9, 2)
    found["both at once"] = {"ms": _ms(total), "gb_s": speed, "launch_ms": _ms(launch)}
    rig.close()
    return found


def _time(rig: TierRig, orders: dict[str, Any]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds until all was told of, of the launch, of a poll when all has ended, and on the device (of restores)."""
    total, launch, last, device = [], [], [], []
    for turn in range(12):
        rig.wait()
        begin = time.perf_counter()
        rig.launch(**orders)
        launched = time.perf_counter()
        done = rig.finish()
        end = time.perf_counter()
        assert all(d.ok for d in done), "staging is too small for this"
        rig.launch(**orders)
        rig.wait()
        time.sleep(0.02)
        polled = time.perf_counter()
        rig.transfers.poll()
        poll = time.perf_counter() - polled
        rig.finish()
        if turn >= 2:
            total.append(end - begin)
            launch.append(launched - begin)
            last.append(poll)
            device.append(sum(d.seconds for d in done))
    return total, launch, last, device


def _ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


@contextmanager
def _seconds(into: dict[str, Any], part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    into.setdefault("took_s", {})[part] = round(time.perf_counter() - begin, 1)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=100_000, help="to restore, at least")
    parser.add_argument("--round", type=int, default=1024, help="blocks stored and restored together")
    parser.add_argument("--prompts", type=int, default=64, help="of the engine's part")
    parser.add_argument("--small", action="store_true", help="small blocks, for a try")
    parser.add_argument("--parts", default="integrity,disk,engine,speed,speed with checksums")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args(given)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "integrity": lambda: check_integrity(args),
        "disk": lambda: check_disk(args),
        "engine": lambda: check_engine(args),
        "speed": lambda: measure_speed(args, checksums=False),
        "speed with checksums": lambda: measure_speed(args, checksums=True),
    }
    on_gpu = args.device.startswith("cuda")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    for part in args.parts.split(","):
        with _seconds(report, part):
            report[part] = parts[part]()
        print(part, json.dumps(report[part]), flush=True)
    print("took_s", json.dumps(report["took_s"]))
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return report


if __name__ == "__main__":
    main()
