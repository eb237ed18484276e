"""What a start takes on a GPU, by part, in fresh processes: with and without Triton's cache, and from disk.

    python tests/bench/startup.py [--size 7b] [--only cold,warm,disk]

Random weights of Qwen2-VL's real sizes; the disk's run writes a checkpoint of 2 GB to a temporary folder first.
A listener tells which kernels were still compiled or loaded after the engine was ready: none should be.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda:0"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Log(logging.Handler):
    """Keeps lines of the log, with the last line of an exception."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record, unless it says what another has said."""
        error = record.exc_info[1] if record.exc_info else None
        line = record.getMessage() + (f": {type(error).__name__}: {str(error)[:200]}" if error else "")
        if line not in self.lines:
            self.lines.append(line)


def child(model: str) -> None:
    """Start an engine, answer a few requests, and tell what happened when: two lines of JSON."""
    began = time.perf_counter()
    import torch
    import triton

    import mm_core

    engine_class = mm_core.Engine
    imported = time.perf_counter() - began
    events: list[str] = []
    triton.knobs.compilation.listener = lambda **found: events.append(
        ("", "serial ")[not threading.current_thread().name.startswith("mm-core-compile")]
        + found["src"].name + ("", " (cached)")[found["cache_hit"]]
    )  # fmt: skip
    log = Log()
    logging.getLogger("mm_core").addHandler(log)
    logging.getLogger("mm_core").setLevel(logging.DEBUG)
    start = time.perf_counter()
    engine = engine_class.from_pretrained(model, load_format="dummy")
    called = time.perf_counter() - start
    stats = engine.stats()
    free, total = torch.cuda.mem_get_info()
    tell({
        "import": imported, "call": called, "startup": stats["startup"], "log": log.lines[:16], "kernels": len(events),
        "serial": collections.Counter(event for event in events if event.startswith("serial")).most_common(12),
        "kv_tokens": stats["block_size"] * sum(stats["blocks"].values()), "peak": torch.cuda.max_memory_allocated(),
        "used": total - free, "free": free,
    })  # fmt: skip
    answer(engine, events)
    engine.close()


def answer(engine: Any, events: list[str]) -> None:
    """Requests of several kinds; which of them made kernels that were not there."""
    import numpy as np
    from PIL import Image

    from mm_core import SamplingParams, TextPrompt

    noise = np.random.default_rng(0).integers(0, 256, (4, 448, 448, 3), dtype=np.uint8)
    greedy = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, logprobs=2)

    def picture(i: int) -> TextPrompt:
        data = {"image": Image.fromarray(noise[i])}
        return TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}Describe {i}.<|im_end|>\n", multi_modal_data=data)

    mixed = [TextPrompt(prompt="word " * (3 * i + 1)) if i % 3 else picture(i % 4) for i in range(40)]
    kinds = {
        "text": ([TextPrompt(prompt="The quick brown fox jumps over the lazy dog.")], greedy),
        "picture": ([picture(0)], greedy), "another": ([picture(1)], greedy), "40 mixed": (mixed, greedy),
        "sampled": ([picture(i) for i in range(4)], sampled), "40 sampled": (mixed, sampled),
    }  # fmt: skip
    times, late = {}, []
    for name, (prompts, params) in kinds.items():
        mark, begin = len(events), time.perf_counter()
        try:
            engine.generate(prompts, params)
        except Exception as error:
            late.append(f"{name} failed: {type(error).__name__}: {error}"[:200])
        times[name] = round(time.perf_counter() - begin, 3)
        late.extend(f"{name}: {event}" for event in events[mark:])
    tell({"times": times, "late": late})


def tell(found: dict[str, Any]) -> None:
    """A result for the parent process."""
    print("RESULT " + json.dumps(found), flush=True)


def time_weights(model: str) -> None:
    """Load a checkpoint's weights into the modules of its model, and nothing else."""
    import torch

    from mm_core.checkpoint import load_weights, open_checkpoint
    from mm_core.decoders import default
    from mm_core.hookspecs import BuildContext
    from mm_core.plugins import PluginRegistry

    checkpoint = open_checkpoint(model)
    registry = PluginRegistry()
    owner = registry.resolve(checkpoint.architectures)
    context = BuildContext(torch.device(DEVICE), torch.bfloat16, 1024)
    asked = {"family": owner.family.name, "checkpoint": checkpoint}
    spec = registry.call_owner("mm_decoder", owner, default=default, **asked)
    encoder = registry.call_owner("mm_encoder", owner, context=context, **asked)
    targets = [(encoder, encoder.weight_map), (spec.build(context), spec.weight_map)]
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    for _ in range(2):
        start = time.perf_counter()
        load_weights(checkpoint, targets, show_progress=False)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"[weights] {size / 1e9:.2f} GB in {seconds:.2f} s: {size / 1e9 / seconds:.2f} GB/s", flush=True)


def write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Random bf16 weights under the hub's names, in two files."""
    import torch
    from safetensors.torch import save_file

    text, vision = config, config["vision_config"]
    h, inter, v = text["hidden_size"], text["intermediate_size"], vision["embed_dim"]
    kv = h // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (text["vocab_size"], h), "model.norm.weight": (h,),
        "visual.patch_embed.proj.weight": (v, 3, 2, 14, 14),
    }  # fmt: skip
    for i in range(text["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            shapes |= {f"{at}self_attn.{name}_proj.weight": (rows, h), f"{at}self_attn.{name}_proj.bias": (rows,)}
        shapes |= {f"{at}self_attn.o_proj.weight": (h, h), f"{at}mlp.down_proj.weight": (h, inter)}
        shapes |= {f"{at}mlp.{name}_proj.weight": (inter, h) for name in ("gate", "up")}
        shapes |= {f"{at}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    linear = {"attn.qkv": (3 * v, v), "attn.proj": (v, v), "mlp.fc1": (4 * v, v), "mlp.fc2": (v, 4 * v)}
    for i in range(vision["depth"]):
        for name, shape in {**linear, "norm1": (v,), "norm2": (v,)}.items():
            shapes |= {f"visual.blocks.{i}.{name}.weight": shape, f"visual.blocks.{i}.{name}.bias": shape[:1]}
    merged = {"ln_q": (v,), "mlp.0": (4 * v, 4 * v), "mlp.2": (h, 4 * v)}
    for name, shape in merged.items():
        shapes |= {f"visual.merger.{name}.weight": shape, f"visual.merger.{name}.bias": shape[:1]}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        made = {n: torch.randn(shapes[n], device=DEVICE, dtype=torch.bfloat16).mul_(0.02).cpu() for n in part}
        save_file(made, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def start_fresh(name: str, model: Path, cache: Path) -> None:
    """Run `child` in a process of its own and print what it tells."""
    command = [sys.executable, __file__, "--child", str(model)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False
    )
    told = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode:
        print(f"[{name}] failed ({done.returncode}):", *(done.stdout + done.stderr).splitlines()[-15:], sep="\n   ")
    for found in told[:1]:
        print(f"[{name}] imports {found['import']:.2f} s, from_pretrained {found['call']:.2f} s")
        print("  ", "  ".join(f"{part} {seconds:.2f}" for part, seconds in found["startup"].items()))
        for line in found["log"]:
            print("   |", line)
        sizes = "  ".join(f"{what} {found[what] / 2**30:.2f}" for what in ("peak", "used", "free"))
        print(f"   KV tokens {found['kv_tokens']:,}  GiB: {sizes}  kernels {found['kernels']}: {found['serial']}")
    for found in told[1:]:
        print(f"   requests {found['times']}")
        print(f"   after ready: {len(found['late'])} kernels {found['late'][:12]}")
    sys.stdout.flush()


def main() -> None:
    """All runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b")
    parser.add_argument("--only", default="cold,warm,disk")
    parser.add_argument("--child")
    parser.add_argument("--weights")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    if args.weights:
        time_weights(args.weights)
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.real_size import make_dummy_qwen2vl

    from mm_core.bench.models import built_in_models, write_model
    from mm_core.plugins import PluginRegistry

    wanted = args.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "triton"
        registry = PluginRegistry()
        name = f"qwen2-vl-{args.size}"
        model = write_model(built_in_models(registry)[name], Path(folder) / name)
        for name in ("cold", "warm"):
            if name in wanted:
                start_fresh(f"{args.size} {name}", model, cache)
        if "disk" in wanted:
            small = make_dummy_qwen2vl(Path(folder) / "disk", "2b")
            config = json.loads((small / "config.json").read_text()) | {"num_hidden_layers": 10}
            (small / "config.json").write_text(json.dumps(config))
            write_weights(small, config)
            subprocess.run([sys.executable, __file__, "--weights", str(small)], check=False)


if __name__ == "__main__":
    main()
