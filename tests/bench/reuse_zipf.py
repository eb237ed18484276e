"""Many questions about pictures that do not fit the KV cache: first come, first served beside reuse with a host tier.

    python tests/bench/reuse_zipf.py [--runs fcfs,reuse] [--json FILE]
    python tests/bench/reuse_zipf.py --tiny                     # a small model on a CPU, in seconds
    python tests/bench/reuse_zipf.py --write-docs FILE          # measure nothing; put FILE into the docs

Pictures are drawn by Zipf's law (exponent 1), all requests come at once, in the same order in every run, each with
a question of its own. Pictures are noise, resized and hashed ahead, off the clock, and named; requests then hold
the names, so that the clock has the engine and not the host's preprocessing. Each run has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- reuse-zipf:begin -->", "<!-- reuse-zipf:end -->"
GIB = 2**30
WARM_UP, SAMPLES = 8, 12


@dataclass(frozen=True)
class Setting:
    """What is measured. kv_tokens: the device's KV cache; side: of the square pictures, in pixels."""

    model: str = "qwen2-vl-7b"
    device: str = "auto"
    requests: int = 2000
    pictures: int = 200
    side: int = 1344
    output_tokens: int = 64
    kv_tokens: int = 154_000
    host_bytes: int = 30 * GIB
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    encoder_rows: int = 32768
    seed: int = 0


TINY = Setting("tiny", "cpu", 120, 20, 112, 8, 640, 64 * 2**20, 8, 128, 40)
RUNS: dict[str, dict[str, Any]] = {
    "fcfs": {"scheduling_policy": "fcfs"},
    "reuse": {"scheduling_policy": "reuse", "host": True},
    "reuse-no-host": {"scheduling_policy": "reuse"},
    "restores": {"scheduling_policy": "reuse", "host": True, "spans": True},
}


class Bench:
    """One engine, its prompts, and its pictures."""

    def __init__(self, setting: Setting, run: str, folder: Path) -> None:
        from mm_core.bench.models import family_of, place_model
        from mm_core.bench.workloads import PromptMaker
        from mm_core.benchspecs import BenchWorkload
        from mm_core.config import EngineConfig, KvCacheConfig
        from mm_core.engine.engine import Engine
        from mm_core.engine.frontend import Frontend
        from mm_core.plugins import PluginRegistry

        self.setting, self.host = setting, bool(RUNS[run].get("host"))
        registry = PluginRegistry()
        path = tiny_model(folder) if setting.model == "tiny" else place_model(setting.model, "dummy", registry, folder)
        kv = KvCacheConfig(num_blocks=setting.kv_tokens // 16, host_cache_size=setting.host_bytes * self.host)
        begin = time.perf_counter()
        self.frontend = Frontend(
            str(path),
            EngineConfig(
                kv_cache_config=kv,
                device=setting.device,
                load_format="dummy",
                scheduling_policy=RUNS[run]["scheduling_policy"],
                max_model_len=min(4096, setting.kv_tokens),
                max_num_seqs=setting.max_num_seqs,
                max_num_batched_tokens=setting.max_num_batched_tokens,
                encoder_cache_tokens=setting.encoder_rows,
                processor_cache_size=4 * GIB,
                record_timeline=bool(RUNS[run].get("spans")),
                show_progress=False,
            ),
            None,
        )
        self.startup_s = time.perf_counter() - begin
        self.engine = Engine(self.frontend)
        family = family_of(registry, self.frontend.model.checkpoint.architectures)
        assert family is not None
        self._workload = BenchWorkload(
            "reuse-zipf", setting.requests, setting.pictures, setting.output_tokens, setting.side
        )
        self._maker = PromptMaker.of(self.frontend.model.processor, family.prompt, "image")
        self._number = 0

    def prepare(self, name: str, count: int) -> list[str]:
        """Noise pictures under names, hashed and preprocessed; returns the names."""
        from mm_core.bench.workloads import noise_images
        from mm_core.types import TextPrompt

        names, ids = [f"{name}-{index}" for index in range(count)], self._maker.ids(self._workload, 0)
        pending = []
        for uuid, picture in zip(names, noise_images(name, count, self.setting.side, self.setting.seed), strict=True):
            prompt = TextPrompt(
                prompt_token_ids=ids, multi_modal_data={"image": [picture]}, multi_modal_uuids={"image": [uuid]}
            )
            pending.append(self.frontend.pipeline.submit("ahead", prompt))
            if len(pending) >= 32:
                pending.pop(0).result()
        for each in pending:
            each.result()
        return names

    def prompts(self, names: list[str]) -> list[Any]:
        """A question about each picture named, no two alike."""
        from mm_core.types import TextPrompt

        found = []
        for name in names:
            ids = self._maker.ids(self._workload, self._number)
            self._number += 1
            found.append(TextPrompt(prompt_token_ids=ids, multi_modal_uuids={"image": [name]}))
        return found

    def answer(self, prompts: list[Any], tokens: int) -> list[Any]:
        from mm_core import SamplingParams

        return self.engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))

    # -- what is measured ------------------------------------------------------------------

    def throughput(self) -> dict[str, Any]:
        """All requests at once."""
        import numpy as np

        from mm_core.bench.analysis import difference

        setting = self.setting
        names = self.prepare("picture", setting.pictures)
        self.answer(self.prompts(self.prepare("warm-up", min(WARM_UP, setting.pictures))), 4)
        self.engine.clear_cache()
        weights = 1 / np.arange(1, setting.pictures + 1)
        chances = weights / weights.sum()
        drawn = np.random.default_rng(setting.seed).choice(setting.pictures, setting.requests, p=chances)
        prompts = self.prompts([names[index] for index in drawn])
        done = threading.Event()
        threading.Thread(target=self._tell, args=(done,), daemon=True).start()
        before, begin = self.engine.stats(), time.perf_counter()
        outputs = self.answer(prompts, setting.output_tokens)
        seconds = time.perf_counter() - begin
        done.set()
        self.engine.wait_idle()
        usages = [output.usage for output in outputs]
        assert all(usage.completion_tokens == setting.output_tokens for usage in usages)
        return {
            "seconds": seconds,
            "requests_per_s": len(outputs) / seconds,
            "pictures_asked_for": len(set(drawn.tolist())),
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "media_tokens_each": usages[0].media_tokens,
            "counters": difference(before, self.engine.stats()),
        }

    def _tell(self, done: threading.Event) -> None:
        """Now and then how far it is, for whoever waits."""
        begin = time.perf_counter()
        while not done.wait(10):
            stats = self.engine.stats()
            say(
                f"{time.perf_counter() - begin:.0f} s: {stats['finished'].get('length', 0)} requests ended, "
                f"{stats['running']} run, {stats['encoded_items']} pictures encoded, {restored_in(stats)} tokens "
                f"copied back, {stats['steps']} steps, {stats['preemptions']} preemptions"
            )

    def fill(self) -> None:
        """Ask once about each picture, one after another: most of them are in the host's memory then."""
        names = self.prepare("picture", self.setting.pictures)
        for name in names:
            self.answer(self.prompts([name]), 1)
        self.engine.wait_idle()

    def show_spans(self) -> None:
        """What happens within a request whose picture is copied back, in ms since it came."""
        for index in range(self.setting.pictures):
            self.engine.timeline()
            before = restored_in(self.engine.stats())
            begin = time.perf_counter_ns()
            self.answer(self.prompts([f"picture-{index}"]), 1)
            self.engine.wait_idle()
            if restored_in(self.engine.stats()) > before and index >= WARM_UP:
                for span in sorted(self.engine.timeline(), key=lambda span: span.start_ns):
                    start, end = (span.start_ns - begin) / 1e6, (span.end_ns - begin) / 1e6
                    say(f"{start:8.2f} to {end:8.2f}  {span.track}: {span.name} {dict(span.args or {})}"[:160])
                return

    def first_tokens(self) -> dict[str, Any]:
        """Milliseconds to the first token, one request at a time: the picture computed, in the host's memory only,
        and on the device."""
        found: dict[str, list[float]] = {"computed": [], "restored": [], "on the device": []}
        fresh = self.prepare("fresh", SAMPLES)
        for name in fresh:
            self._first(name, found)
        for name in [f"picture-{index}" for index in reversed(range(self.setting.pictures))]:
            if len(found["restored"]) >= SAMPLES:
                break
            self._first(name, found)
            self._first(name, found)
        return {kind: {"median": median(times), "all": times} for kind, times in found.items() if times}

    def _first(self, name: str, found: dict[str, list[float]]) -> None:
        before = self.engine.stats()
        (output,) = self.answer(self.prompts([name]), 1)
        self.engine.wait_idle()
        after = self.engine.stats()
        metrics, encoded = output.metrics, after["encoded_items"] > before["encoded_items"]
        restored = restored_in(after) - restored_in(before)
        kind = "computed" if encoded else "restored" if restored >= output.usage.media_tokens // 16 * 16 else None
        if kind is None and output.usage.cached_tokens >= output.usage.media_tokens and not restored:
            kind = "on the device"
        if kind is not None:  # else some of it was here, some there
            found[kind].append((metrics.first_token - metrics.arrival) * 1e3)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def restored_in(stats: dict[str, Any]) -> int:
    """Tokens copied back from the host's memory."""
    return int(stats.get("host_cache", {}).get("restored_tokens", 0))


def tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import make_tiny_qwen2vl

    return make_tiny_qwen2vl(folder)


def child(setting: Setting, run: str) -> None:
    """One run; prints what it found."""
    from mm_core.bench.device import environment

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(setting, run, Path(folder))
        try:
            say(f"{run}: ready in {bench.startup_s:.1f} s")
            found: dict[str, Any] = {"startup_s": bench.startup_s}
            if RUNS[run].get("spans"):
                bench.fill()
            else:
                found |= bench.throughput()
                say(f"{run}: {found['seconds']:.1f} s")
            if bench.host:
                found["first_token_ms"] = bench.first_tokens()
                found["costs"] = asdict(bench.frontend._core.scheduler.costs)
            if RUNS[run].get("spans"):
                bench.show_spans()
            found["environment"] = dict(environment(setting.device))
        finally:
            bench.engine.close()
    print("\n" + json.dumps(found), flush=True)


def measure(setting: Setting, runs: list[str], limit: float, file: Path | None) -> dict[str, Any]:
    """All runs, each in a process of its own; one that fails or takes too long is left out. file: gets each."""
    found: dict[str, Any] = {}
    for run in runs:
        command = [sys.executable, str(Path(__file__)), "--child", json.dumps([asdict(setting), run])]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"{run}: not done after {limit:.0f} s", flush=True)
            continue
        if done.returncode:
            print(f"{run}: failed with {done.returncode}", flush=True)
            continue
        found[run] = json.loads(done.stdout.strip().splitlines()[-1])
        print(line(run, found[run]) if "counters" in found[run] else json.dumps(found[run]), flush=True)
        if file:
            kept = {"setting": asdict(setting), "runs": found}
            file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return found


def line(run: str, result: dict[str, Any]) -> str:
    """One run as a row of a table."""
    counters = result["counters"]
    restored = restored_in(counters)
    return (
        f"| {run} | {result['seconds']:.1f} | **{result['requests_per_s']:.2f}** | {result['cached_tokens']:,} of "
        f"{result['prompt_tokens']:,} | {restored:,} | {counters['encoded_items']} | {counters['preemptions']} |"
    )


def ratio(runs: dict[str, Any]) -> float | None:
    """Requests a second of reuse with a host tier beside first come, first served without."""
    if not {"fcfs", "reuse"} <= runs.keys():
        return None
    return float(runs["reuse"]["requests_per_s"] / runs["fcfs"]["requests_per_s"])


def table(kept: dict[str, Any]) -> str:
    """What was found, for a page."""
    runs, setting = {name: run for name, run in kept["runs"].items() if "counters" in run}, kept["setting"]
    any_run = next(iter(runs.values()))
    about = any_run["environment"]
    rows = any_run["media_tokens_each"]
    lines = [
        f"{setting['requests']:,} requests of {setting['output_tokens']} output tokens at once, about "
        f"{setting['pictures']} pictures of {setting['side']}×{setting['side']} ({rows:,} tokens each, "
        f"{rows * setting['pictures']:,} together; drawn by Zipf's law, exponent 1), KV cache of "
        f"{setting['kv_tokens']:,} tokens; {setting['model']}, random weights, on {about['device']}.",
        "",
        "| run | seconds | requests/s | prompt tokens served by reuse | of these copied back | pictures encoded "
        "| preemptions |",
        "|---|---|---|---|---|---|---|",
        *(line(name, result) for name, result in runs.items()),
    ]
    if (found := ratio(runs)) is not None:
        size = f"{setting['host_bytes'] / GIB:.3g} GiB"
        lines += ["", f"`reuse` with {size} of host memory answers **{found:.2f} ×** the requests a second of `fcfs`."]
    first = runs.get("reuse", {}).get("first_token_ms", {})
    if len(first) == 3:
        times = {kind: first[kind]["median"] for kind in first}
        base = times["on the device"]
        more, less = times["computed"] - base, times["restored"] - base
        lines += [
            "",
            "| first token of one request (median) | ms | beyond a picture on the device |",
            "|---|---|---|",
            f"| picture on the device | {base:.2f} | |",
            f"| picture in the host's memory | {times['restored']:.2f} | {less:.2f} |",
            f"| picture computed (encoder and prefill) | {times['computed']:.2f} | {more:.2f} |",
            "",
            f"So to copy a picture back takes **{more / less:.1f} ×** less time than to compute it; the whole first "
            f"token {times['computed'] / times['restored']:.1f} ×.",
        ]
    return "\n".join(lines)


def write_docs(file: Path) -> None:
    page = ROOT / "docs" / "benchmarks" / "README.md"
    body = (
        table(json.loads(file.read_text(encoding="utf-8"))) + "\n\nWritten by `tests/bench/reuse_zipf.py --write-docs`."
    )
    head, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    page.write_text(f"{head}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="fcfs,reuse", help=f"of: {'; '.join(RUNS)}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--limit", type=float, default=170.0, help="seconds a run may take, its start included")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="measure nothing; put this into the docs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_docs:
        write_docs(options.write_docs)
        return
    if options.child:
        values, run = json.loads(options.child)
        child(Setting(**values), run)
        return
    setting = TINY if options.tiny else Setting()
    given = {"requests": options.requests, "pictures": options.pictures}
    setting = replace(setting, **{name: value for name, value in given.items() if value})
    runs = measure(setting, options.runs.split(","), options.limit, options.json)
    if any("counters" in run for run in runs.values()):
        print("\n" + table({"setting": asdict(setting), "runs": runs}))


if __name__ == "__main__":
    main()
