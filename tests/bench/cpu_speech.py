"""Speech to text on this machine's CPU: mm-core beside transformers and faster-whisper, in one run.

Whisper base with its real weights; five LibriVox clips (24.6 s in all, each heard in a window of 30 s) and a sound
of more than 65 s joined from them; English is given; two threads. Each engine has a process of its own and takes
samples in memory; runs alternate, so that a machine that slows down slows all; figures are medians over the
rounds. faster-whisper is installed beside the environment, into the cache of the test data.

    python tests/bench/cpu_speech.py [--rounds 3] [--json docs/benchmarks/cpu-speech.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.real_whisper import CACHE, ct2_whisper_base, long_speech, speech, whisper_base, word_errors  # noqa: E402

THREADS = 2
PEER = "faster-whisper==1.2.1"
FIVE, LONG, BATCHED = "five clips", "long, window after window", "long, batched windows"
OURS = "mm-core bf16"
BEGIN, END = "<!-- cpu-speech:begin -->", "<!-- cpu-speech:end -->"
# Workload, whose time for the same is taken, how many times as fast we want to be.
GOALS = (
    (FIVE, "transformers bf16", 1.25),
    (FIVE, "faster-whisper int8", 2.5),
    (BATCHED, "faster-whisper int8", 1.35),
)
Samples = np.ndarray[Any, Any]
Runs = Mapping[str, Callable[[list[Samples]], list[str]]]
"""By workload: sounds to texts."""


def transformers_bf16() -> Runs:
    """Clips as a batch; the long sound by `generate`'s long-form algorithm."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    path = whisper_base()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=torch.bfloat16).eval()
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    @torch.inference_mode()
    def run(sounds: list[Samples], *, whole: bool) -> list[str]:
        extract: dict[str, Any] = {"truncation": False, "padding": "longest"} if whole else {}
        features = extractor(sounds, sampling_rate=16000, return_tensors="pt", **extract)["input_features"]
        ids = model.generate(
            features.to(torch.bfloat16), language="en", task="transcribe", do_sample=False, return_timestamps=whole
        )
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))

    return {FIVE: lambda sounds: run(sounds, whole=False), LONG: lambda sounds: run(sounds, whole=True)}


def faster_whisper_int8(**options: Any) -> Runs:
    """Clips one by one: it has no other way for several sounds."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(ct2_whisper_base()), device="cpu", compute_type="int8", cpu_threads=THREADS)
    batched = BatchedInferencePipeline(model)

    def texts(transcribe: Callable[..., Any], sounds: list[Samples], **more: Any) -> list[str]:
        found = (transcribe(sound, language="en", **options, **more) for sound in sounds)
        return ["".join(segment.text for segment in segments) for segments, _ in found]

    return {
        FIVE: lambda sounds: texts(model.transcribe, sounds, without_timestamps=True),
        LONG: lambda sounds: texts(model.transcribe, sounds),
        BATCHED: lambda sounds: texts(batched.transcribe, sounds, batch_size=8),
    }


def mm_core_bf16() -> Runs:
    """Clips by one call of `generate`, the long sound by `transcribe`."""
    import torch

    from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

    torch.set_num_threads(THREADS)
    engine = Engine.from_pretrained(
        whisper_base(), device="cpu", dtype="bfloat16", kv_cache_config=KvCacheConfig(num_blocks=2048),
        show_progress=False,
    )  # fmt: skip
    prompt = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    params = SamplingParams(max_tokens=None, temperature=0.0)

    def clips(sounds: list[Samples]) -> list[str]:
        prompts = [TextPrompt(prompt=prompt, multi_modal_data={"audio": (sound, 16000)}) for sound in sounds]
        return [output.text for output in engine.generate(prompts, params)]

    def long(sounds: list[Samples], *, batched: bool) -> list[str]:
        # The peer's batched windows have no timestamps by default either.
        options = {"language": "en", "batched": batched, "timestamps": not batched}
        return [engine.transcribe((sound, 16000), **options).text for sound in sounds]

    return {
        FIVE: clips,
        LONG: lambda sounds: long(sounds, batched=False),
        BATCHED: lambda sounds: long(sounds, batched=True),
    }


ENGINES: Mapping[str, Callable[[], Runs]] = {
    "transformers bf16": transformers_bf16,
    "faster-whisper int8": lambda: faster_whisper_int8(beam_size=1),
    "faster-whisper int8, its default beam of 5": faster_whisper_int8,
    OURS: mm_core_bf16,
}


def serve(engine: str) -> None:
    """The worker process: each line on stdin is [workload, seed]; answers with the seconds it took, and texts."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    runs = ENGINES[engine]()
    given = {FIVE: [samples for samples, _ in speech()], LONG: [long_speech()[0]]}
    print(json.dumps(sorted(runs)), file=out, flush=True)
    for line in sys.stdin:
        workload, seed = json.loads(line)
        noise = np.random.default_rng(seed)
        # Noise that nobody hears: nothing that was kept of an earlier round is of use.
        sounds = [
            s + 1e-6 * noise.standard_normal(len(s), dtype=np.float32)
            for s in given[FIVE if workload == FIVE else LONG]
        ]
        start = time.perf_counter()
        texts = runs[workload](sounds)
        print(json.dumps([time.perf_counter() - start, texts]), file=out, flush=True)


class Worker:
    """An engine in a process of its own, idle between runs."""

    def __init__(self, engine: str, packages: Path) -> None:
        paths = [str(packages)] if engine.startswith("faster") else []
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        command = [sys.executable, __file__, "--serve", engine]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, text=True)
        self.workloads: list[str] = self._read()

    def run(self, workload: str, seed: int) -> tuple[float, list[str]]:
        """Seconds, and the texts."""
        assert self.process.stdin is not None
        print(json.dumps([workload, seed]), file=self.process.stdin, flush=True)
        seconds, texts = self._read()
        return seconds, texts

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended: run it by hand with --serve to see why")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def install_peer() -> Path:
    """faster-whisper and what it needs, in a folder that only its worker sees."""
    folder = CACHE / PEER
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), PEER]
        subprocess.run(command, check=True)
    return folder


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """By engine and workload: median seconds, every round's, and word errors."""
    wanted = {FIVE: [text for _, text in speech()], LONG: [long_speech()[1]]}
    whisper_base()
    packages = install_peer()
    workers = {name: Worker(name, packages) for name in ENGINES}
    seconds: dict[str, dict[str, list[float]]] = {name: {w: [] for w in workers[name].workloads} for name in ENGINES}
    errors: dict[str, dict[str, int]] = {name: {} for name in ENGINES}
    for round_ in range(rounds + 1):
        for workload in (FIVE, LONG, BATCHED):
            for name, worker in workers.items():
                if workload not in worker.workloads:
                    continue
                took, texts = worker.run(workload, 100 * round_)
                pairs = zip(texts, wanted[FIVE if workload == FIVE else LONG], strict=True)
                errors[name][workload] = sum(word_errors(*pair) for pair in pairs)
                if round_:  # the first one warms up
                    seconds[name][workload].append(took)
                print(f"round {round_}: {name}, {workload}: {took:.2f} s", flush=True)
    for worker in workers.values():
        worker.close()
    return {
        name: {
            workload: {"seconds": round(statistics.median(all_), 3), "rounds": [round(s, 3) for s in all_],
                       "word_errors": errors[name][workload]}
            for workload, all_ in by_workload.items()
        }
        for name, by_workload in seconds.items()
    }  # fmt: skip


def table(found: dict[str, dict[str, Any]], lengths: Mapping[str, float]) -> str:
    """A row an engine: seconds, times real time, and word errors of each workload."""
    lines = ["| engine | " + " | ".join(f"{w}, {lengths[w]:.1f} s" for w in lengths) + " |", "|---" * 4 + "|"]
    for name, by_workload in found.items():
        cells = []
        for workload, length in lengths.items():
            cell = by_workload.get(workload)
            cells.append(
                "–" if cell is None
                else f"{cell['seconds']:.2f} s, {length / cell['seconds']:.1f} ×, {cell['word_errors']} wrong"
            )  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast as each peer, round by round, and what we want."""
    out = []
    for workload, peer, goal in GOALS:
        pairs = zip(found[peer][workload]["rounds"], found[OURS][workload]["rounds"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        out.append({"workload": workload, "peer": peer, "ratio": round(ratio, 2), "goal": goal})
    return out


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_docs(file: Path) -> None:
    """Put what --json wrote into docs/benchmarks/README.md."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"- {g['workload']}: {g['ratio']} × {g['peer']} (goal {g['goal']} ×)" for g in kept["goals"]]
    about = f"{kept['cpu']}, {kept['threads']} threads, torch {kept['torch']}, transformers {kept['transformers']}, "
    body = f"{table(kept['engines'], kept['lengths'])}\n\n" + "\n".join(lines)
    body += f"\n\n{about}{kept['peer']}. Written by `tests/bench/cpu_speech.py --write-docs`."
    page = ROOT / "docs" / "benchmarks" / "README.md"
    head, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    page.write_text(f"{head}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-docs", type=Path, metavar="JSON", help="measure nothing; put this into the docs")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_docs:
        write_docs(options.write_docs)
        return
    if options.serve:
        serve(options.serve)
        return
    import torch
    import transformers

    found = measure(options.rounds)
    clips = sum(len(samples) for samples, _ in speech()) / 16000
    long = len(long_speech()[0]) / 16000
    lengths = {FIVE: clips, LONG: long, BATCHED: long}
    print("\n" + table(found, lengths))
    compared = ratios(found)
    for row in compared:
        print(f"{row['workload']}: {row['ratio']} × {row['peer']} (goal {row['goal']} ×)")
    if options.json:
        facts = {"cpu": cpu_name(), "threads": THREADS, "torch": torch.__version__, "peer": PEER,
                 "transformers": transformers.__version__}  # fmt: skip
        options.json.write_text(
            json.dumps({**facts, "lengths": lengths, "engines": found, "goals": compared}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
