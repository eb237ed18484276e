"""Train by wall clock: `python -m qwen2vl_nano.train --out DIR --seconds 540` (see README.md)."""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from . import config
from .data import Feed, Key
from .model import Nano, Turns
from .tokenizer import SYSTEM, save
from .tokenizer import train as train_tokenizer


@dataclass(eq=False)
class Held:
    """A shard on the device, with the number of times it was used."""

    pixels: list[Tensor]
    packs: Tensor
    uses: int = 0


@dataclass
class Pool:
    """Shards on the device by key; the least used are drawn, the most used make room."""

    device: str
    budget: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    capturing: threading.Lock = field(default_factory=threading.Lock)  # no copies while a graph is captured
    shards: dict[Key, list[Held]] = field(default_factory=lambda: defaultdict(list))
    bytes: int = 0
    seen: int = 0
    drawn: int = 0

    def follow(self, feed: Feed) -> None:
        """Take shards from the workers for ever, copying on a stream of its own."""
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        if stream is not None:
            with self.capturing, torch.cuda.stream(stream):
                reserve(self.budget + (2 << 30))
        while True:
            slot, shard = feed.get()
            with self.capturing, torch.cuda.stream(stream):
                pixels = [torch.from_numpy(p).to(self.device) for p in shard.pixels]
                packs = torch.from_numpy(shard.packs).to(self.device)
                if stream is not None:
                    stream.synchronize()
            feed.done(slot)
            self.add(shard.key, Held(pixels, packs))

    def add(self, key: Key, held: Held) -> None:
        with self.lock:
            self.shards[key].append(held)
            self.bytes += sum(p.nbytes for p in held.pixels)
            self.seen += len(held.pixels[0]) * len(held.pixels)
            while self.bytes > self.budget:
                crowded = max(self.shards, key=lambda k: len(self.shards[k]))
                worst = max(self.shards[crowded], key=lambda h: h.uses)
                self.shards[crowded].remove(worst)
                self.bytes -= sum(p.nbytes for p in worst.pixels)

    def draw(self, rng: np.random.Generator, pictures: int, count: int) -> tuple[Key, list[Held]]:
        """`count` shards of one key, of those least used so far."""
        while True:
            with self.lock:
                keys = [key for key, held in self.shards.items() if len(key) == pictures and len(held) >= count]
                if keys:
                    odds = np.array([sum(1 / (1 + h.uses) ** 2 for h in self.shards[key]) for key in keys])
                    key = keys[int(rng.choice(len(keys), p=odds / odds.sum()))]
                    chosen = sorted(self.shards[key], key=lambda h: (h.uses, rng.random()))[:count]
                    break
            time.sleep(0.02)
        self.drawn += sum(len(held.pixels[0]) for held in chosen) * pictures
        return key, chosen


class FlatAdamW:
    """AdamW over one flat float32 master copy; the model itself computes in bfloat16 (float32 on a CPU)."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, decay: float) -> None:
        parameters = list(model.parameters())
        self.master = torch.cat([p.detach().float().flatten() for p in parameters])
        self.decay = torch.cat([torch.full((p.numel(),), decay * (p.ndim > 1), device=p.device) for p in parameters])
        self.work = self.master.to(dtype)
        self.grad = torch.zeros_like(self.work)
        self.mean, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.steps, offset = 0, 0
        for p in parameters:
            p.data = self.work[offset : offset + p.numel()].view(p.shape)
            p.grad = self.grad[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()

    def step(self, rate: float, clip: float = 1.0) -> Tensor:
        self.steps += 1
        grad = self.grad.float()
        norm = grad.norm()
        grad *= (clip / (norm + 1e-6)).clamp(max=1.0)
        self.mean.lerp_(grad, 0.1)
        self.square.lerp_(grad * grad, 0.02)
        first, second = 1 - 0.9**self.steps, 1 - 0.98**self.steps
        update = self.mean / first / ((self.square / second).sqrt() + 1e-8)
        self.master -= rate * (update + self.decay * self.master)
        self.work.copy_(self.master)
        self.grad.zero_()
        return norm


def augment(pixels: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised pixels [B, 3, H, W], with a little more exposure and sensor noise, new at every use."""
    batch, device = pixels.shape[0], pixels.device
    x = pixels.permute(0, 3, 1, 2).float() / 255
    chance = torch.rand(4, batch, 1, 1, 1, device=device)
    x = x * (1 + (chance[0] < 0.5) * (chance[1] * 0.14 - 0.09))
    x = x + torch.randn_like(x) * ((chance[2] < 0.5) * chance[3] * 0.03)
    return ((x.clamp(0, 1) - norm[0]) / norm[1]).to(dtype)


@dataclass
class Batch:
    """Fixed input buffers for one key, and the pass over them: on a GPU a captured graph, elsewhere a function."""

    model: Nano
    prompt: list[Tensor]
    weight: float
    totals: Tensor  # running sums of the loss and of the share of answer tokens predicted right
    pixels: list[Tensor]
    packs: Tensor
    norm: Tensor
    graph: torch.cuda.CUDAGraph | None = None

    def load(self, shards: list[Held]) -> None:
        rows = len(shards[0].packs[0])
        for index, shard in enumerate(shards):
            span = slice(index * rows, (index + 1) * rows)
            self.packs[span].copy_(shard.packs[shard.uses % len(shard.packs)])
            for into, pixels in zip(self.pixels, shard.pixels, strict=True):
                into[span].copy_(pixels)
            shard.uses += 1

    def learn(self) -> None:
        """One forward and backward pass; gradients add up in place."""
        cells = sum(p.shape[1] * p.shape[2] // 784 for p in self.pixels)
        packs = F.pad(self.packs.long(), (0, -(sum(len(p) for p in self.prompt) + cells) % 8))
        turns = Turns(packs[:, 0], packs[:, 1], packs[:, 2], packs[:, 3])
        dtype = self.model.embed_tokens.weight.dtype
        logits = self.model([augment(p, self.norm, dtype) for p in self.pixels], self.prompt, turns)[:, :-1].float()
        scored = turns.scored[:, 1:] > 0
        target = torch.where(scored, turns.tokens[:, 1:], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        (loss * self.weight).backward()
        right = ((logits.argmax(-1) == target) & scored).sum() / scored.sum()
        self.totals += torch.stack((loss.detach(), right))

    def run(self) -> None:
        self.graph.replay() if self.graph is not None else self.learn()


class Batches:
    """The batches by key, made when first needed."""

    def __init__(self, model: Nano, tokenizer: Tokenizer, pool: Pool, optimiser: FlatAdamW) -> None:
        self.model, self.pool, self.optimiser, self.device = model, pool, optimiser, pool.device
        self.prompts = prompts(tokenizer, self.device)
        self.totals = {pictures: torch.zeros(2, device=self.device) for pictures in (1, 2)}
        self.norm = torch.tensor((config.MEAN, config.STD), device=self.device).view(2, 1, 3, 1, 1)
        self.made: dict[tuple[Key, bool], Batch] = {}
        self.memory = torch.cuda.graph_pool_handle() if self.device == "cuda" else None

    def get(self, key: Key, shards: list[Held], system: bool) -> Batch:
        system = system and sum(key[0]) % 4 == 0  # only some grids get a second graph
        if (key, system) not in self.made:
            rows = sum(len(shard.packs[0]) for shard in shards)
            self.made[key, system] = Batch(
                self.model, self.prompts[len(key), system], (0.64, 0.36)[len(key) - 1], self.totals[len(key)],
                [p.new_empty(rows, *p.shape[1:]) for p in shards[0].pixels],
                shards[0].packs.new_empty(rows, *shards[0].packs.shape[2:]), self.norm,
            )  # fmt: skip
            self.made[key, system].load(shards)
            if self.device == "cuda":
                self.capture(self.made[key, system])
        return self.made[key, system]

    def capture(self, batch: Batch) -> None:
        with self.pool.capturing:
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                batch.learn()
            torch.cuda.synchronize()
            batch.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(batch.graph, pool=self.memory, capture_error_mode="thread_local"):
                batch.learn()
            torch.cuda.synchronize()
            self.optimiser.grad.zero_()


def prompts(tokenizer: Tokenizer, device: str) -> dict[tuple[int, bool], list[Tensor]]:
    """Token ids around one or two pictures, without and with a system turn."""
    table = {}
    for pictures in (1, 2):
        for system in (False, True):
            start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" if system else ""
            texts = [
                start + "<|im_start|>user\n<|vision_start|>",
                *["<|vision_end|><|vision_start|>"] * (pictures - 1),
                "<|vision_end|>",
            ]
            table[pictures, system] = [torch.tensor(tokenizer.encode(t).ids, device=device) for t in texts]
    return table


def rate_at(share: float, peak: float, warm: float = 0.02) -> float:
    """Warm up, then a cosine down to zero at the deadline; `share` is the share of the time that is over."""
    if share < warm:
        return peak * max(share, 0.02 * warm) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warm) / (1 - warm))))


def reserve(size: int) -> None:
    """Give the current stream's allocator its memory in one piece: asking the driver for each shard is slow."""
    block = torch.empty(size, dtype=torch.uint8, device="cuda")
    del block


def run(model: Nano, tokenizer: Tokenizer, feed: Feed, options: argparse.Namespace, begun: float) -> FlatAdamW:
    """Train until the clock says stop."""
    optimiser = FlatAdamW(model, torch.bfloat16 if options.device == "cuda" else torch.float32, options.decay)
    pool = Pool(options.device, options.pool_gb << 30)
    batches = Batches(model, tokenizer, pool, optimiser)
    threading.Thread(target=pool.follow, args=(feed,), daemon=True).start()
    rng, shown, since = np.random.default_rng(options.seed), time.time(), 0
    while (share := (time.time() - begun) / options.seconds) < 1 and optimiser.steps < options.max_steps:
        for pictures, count in ((1, options.shards), (2, 1)):
            key, shards = pool.draw(rng, pictures, count)
            batch = batches.get(key, shards, rng.random() < 0.25)
            batch.load(shards)
            batch.run()
        optimiser.step(rate_at(share, options.rate))
        since += 1
        if optimiser.steps == 1 or time.time() - shown > options.report:
            values = [value / since for totals in batches.totals.values() for value in totals.tolist()]
            speed, shown = since / (time.time() - shown), time.time()
            print(f"{shown - begun:6.1f}s step {optimiser.steps} ({speed:.1f}/s) loss {values[0]:.4f} {values[2]:.4f} "
                  f"right {values[1]:.4f} {values[3]:.4f} pictures {pool.seen} drawn {pool.drawn} "
                  f"pool {pool.bytes / 2**30:.1f} GB graphs {len(batches.made)}", flush=True)  # fmt: skip
            for totals in batches.totals.values():
                totals.zero_()
            since = 0
    return optimiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seconds", type=float, default=540, help="wall clock from start to the end of training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--shards", type=int, default=2, help="shards of 64 pictures in a batch")
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool-gb", type=int, default=38)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--report", type=float, default=15)
    parser.add_argument("--resume", type=Path, help="float32 state of an earlier round")
    parser.add_argument("--state", type=Path, help="write the float32 state here")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    begun = time.time()
    if not (options.out / "tokenizer.json").exists():
        save(train_tokenizer(), options.out)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    feed = Feed(options.out / "tokenizer.json", options.workers, options.seed)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = Nano(tokenizer.get_vocab_size())
    if options.resume:
        model.load_state_dict(
            {k: v for part in sorted(options.resume.glob("*.safetensors")) for k, v in load_file(part).items()}
        )
    model.to(options.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, which takes longer than it saves
    if options.compile:
        torch._dynamo.config.cache_size_limit = 64
        for block in (*model.visual.blocks, *model.layers):
            block.compile(dynamic=True)
    optimiser = run(model, tokenizer, feed, options, begun)
    feed.close()
    finish(model, optimiser, tokenizer, options)


def finish(model: Nano, optimiser: FlatAdamW, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    offset = 0
    for parameter in model.parameters():
        parameter.data = optimiser.master[offset : offset + parameter.numel()].view(parameter.shape).clone()
        offset += parameter.numel()
    config.write_configs(tokenizer, options.out)
    save_file(model.checkpoint(), options.out / "model.safetensors", metadata={"format": "pt"})
    if options.state:
        options.state.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
        names = sorted(state)
        for part in range(2):
            save_file({name: state[name] for name in names[part::2]}, options.state / f"state{part}.safetensors")
    print(f"saved after {optimiser.steps} steps to {options.out}", flush=True)


if __name__ == "__main__":
    main()
