"""Put what `mm bench --json` wrote into docs/benchmarks/README.md, and the rates into README.md.

    python tests/bench/report.py [--check | --plots DIR] [docs/benchmarks/mm-bench-*.json ...]

--plots draws the pictures of `mm bench --report` from the traces in DIR instead, for runs on a machine
without matplotlib. Without files, every docs/benchmarks/mm-bench-*.json is taken; kv-*.json are runs that differ
in the KV cache's dtype, serve-*.json are of `mm bench serve`, with the model and the device in their label. Other
engines' figures beside ours are those of docs/benchmarks/peers-h100.json; they stand only beside runs on the same
kind of device and model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- mm-bench:begin -->", "<!-- mm-bench:end -->"
SERVE_BEGIN, SERVE_END = "<!-- serve:begin -->", "<!-- serve:end -->"
KV_BEGIN, KV_END = "<!-- kv-dtypes:begin -->", "<!-- kv-dtypes:end -->"
PEER_DEVICE = "H100"


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def peers_of(found: dict[str, Any]) -> dict[str, Any]:
    known = json.loads((DOCS / "peers-h100.json").read_text(encoding="utf-8"))
    if PEER_DEVICE not in found["environment"]["device"] or found["model"] not in known["models"]:
        return {}
    return {"about": known["about"], **known["models"][found["model"]]}


def throughput_table(results: Sequence[dict[str, Any]], peers: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | requests/s | output tok/s | vLLM, requests/s | ratio | goal | floor | first token p50 / p99 "
        "| device busy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        peer = peers.get("throughput", {}).get(result["workload"], {})
        rate, vllm = result["requests_per_s"], peer.get("vllm")
        ratio = "–" if vllm is None else f"{rate / vllm:.2f} ×"
        goal = "–" if "goal" not in peer else f"≥ {peer['goal']}"
        first = result["ttft_ms"]
        busy = (result.get("timeline") or {}).get("device_busy_fraction")
        lines.append(
            f"| {result['workload']} | **{number(rate)}** | {number(result['output_tokens_per_s'], 0)} "
            f"| {number(vllm)} | {ratio} | {goal} | {number(result['floor_requests_per_s'])} "
            f"| {number(first['p50'], 0)} / {number(first['p99'], 0)} ms | {'–' if busy is None else f'{busy:.0%}'} |"
        )
    return lines


def phase_table(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| workload | phase | seconds | floor | TFLOP/s | TB/s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, phase in result.get("phases", {}).items():
            floor = result["floor_s"].get(name)
            lines.append(
                f"| {result['workload']} | {name} | {phase['seconds']:.3f} | {number(floor, 3)} | "
                f"{phase['tflops']:.4g} ({phase['tflops_share']:.0%}) | {phase['tbs']:.3g} ({phase['tbs_share']:.0%}) |"
            )
        total = sum(result["floor_s"].values())
        lines.append(f"| {result['workload']} | whole run | {result['seconds']:.3f} | {total:.3f} | | |")
    return lines


def latency_table(results: Sequence[dict[str, Any]], peers: dict[str, Any]) -> list[str]:
    lines = ["| one request at a time | p50 | p99 | vLLM | goal | floor |", "|---|---|---|---|---|---|"]
    for result in results:
        answers = max(result["definition"].get("output_tokens", 0) - 1, 1) * result["requests"]
        floors = {
            "ttft_ms": sum(result.get("ttft_floor_ms", {}).values()) or None,
            "per_token_ms": result["floor_s"]["decode"] * 1e3 / answers,
            "request_ms": sum(result["floor_s"].values()) * 1e3 / result["requests"],
        }
        labels = {"ttft_ms": "first token", "per_token_ms": "each token after it", "request_ms": "last token"}
        for key, label in labels.items():
            found, peer = result.get(key), peers.get("latency", {}).get(key, {})
            if found is None:
                continue
            goal = "–" if "goal" not in peer else f"≤ {peer['goal']} ms"
            vllm = "–" if "vllm" not in peer else f"{peer['vllm']} ms"
            lines.append(
                f"| {result['workload']}: {label} | **{found['p50']:.2f} ms** | {found['p99']:.2f} ms | {vllm} "
                f"| {goal} | {number(floors[key], 2)} ms |"
            )
    return lines


def beside_kv(found: dict[str, Any]) -> str:
    """Settings of the KV cache that are not the usual ones."""
    kv = found["config"]["kv_cache_config"]
    parts = [] if kv["dtype"] == "auto" else [f"KV cache in {kv['dtype']}"]
    if kv.get("host_cache_size"):
        parts.append(f"{kv['host_cache_size'] / 2**30:.3g} GiB of host memory behind it")
    return "".join(f", {part}" for part in parts)


def section(found: dict[str, Any], short: bool = False) -> str:
    """One file's tables; short: without those of the phases."""
    facts, measured, peers = found["environment"], found["ceilings"], peers_of(found)
    results = found["results"]
    throughput = [r for r in results if r["kind"] == "throughput"]
    latency = [r for r in results if r["kind"] == "latency"]
    start = peers.get("start_s", {})
    beside = f" (vLLM: {start['vllm']} s; goal: ≤ {start['goal']} s)" if start else ""
    parts = [
        f"**{found['model']}** on {facts['device']}, {found['config']['dtype']} dtype{beside_kv(found)}, torch "
        f"{facts['torch']}, "
        f"driver {facts.get('driver', '–')}; ready in {found['startup']['seconds']:.1f} s{beside}; KV cache of "
        f"{found['kv_cache_tokens']:,} tokens; ceilings measured in the same run: copy "
        f"{measured['copy_bandwidth'] / 1e12:.3g} TB/s, read {measured['read_bandwidth'] / 1e12:.3g} TB/s, matrix "
        f"product {measured['matmul']} {measured['matmul_flops'] / 1e12:.4g} TFLOP/s."
    ]
    if throughput:
        parts += ["\n".join(throughput_table(throughput, peers))]
    if latency:
        parts += ["\n".join(latency_table(latency, peers))]
    if not short and any(r.get("phases") for r in throughput):
        parts += ["\n".join(phase_table(throughput))]
    if peers:
        parts.append(f"Peers: {peers['about']}.")
    return "\n\n".join(parts)


def kv_table(files: Sequence[Path]) -> str:
    """Runs that differ in the KV cache's dtype alone, each beside the first of its model."""
    lines = [
        "| model, workload | KV cache | tokens in it | beside | requests/s | beside | first token p50 | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, tuple[int, float]] = {}
    about = ""
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        facts, tokens = found["environment"], found["kv_cache_tokens"]
        about = f"{facts['device']}, torch {facts['torch']}, random weights"
        for result in found["results"]:
            name, rate = f"{found['model']}, {result['workload']}", result["requests_per_s"]
            kept, base = first.setdefault(name, (tokens, rate))
            lines.append(
                f"| {name} | {found['config']['kv_cache_config']['dtype']} | {tokens:,} | {tokens / kept:.2f} × "
                f"| **{rate:.1f}** | {rate / base:.2f} × | {result['ttft_ms']['p50']:,.0f} ms "
                f"| {result['phases']['decode']['seconds']:.2f} s |"
            )
    return (
        "\n".join([*lines, "", f"{about}. Written by `tests/bench/report.py`."])
        if first
        else "No run is kept here yet."
    )


def serve_cell(key: str, values: Any) -> str:
    """A rate, or p50 and p99 of a latency."""
    if values is None:
        return "–"
    if key == "requests_per_s":
        return f"{values:.1f} requests/s"
    median, tail = values
    return f"{median:.1f} / {tail:.1f} ms"


def serve_table(files: Sequence[Path]) -> str:
    """Runs of load on a server, beside the peers' on the same kind of machine."""
    peers = json.loads((DOCS / "peers-h100.json").read_text(encoding="utf-8"))["models"]
    lines = ["| workload | | measured | vLLM | goal |", "|---|---|---|---|---|"]
    names = {"requests_per_s": "rate", "ttft_ms": "first token p50 / p99", "inter_token_ms": "between tokens p50 / p99"}
    about = []
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, Any] = next((each["serve"] for name, each in peers.items() if name in found["label"]), {})
        about.append(f"{found['label']}, written {found['written'][:10]}")
        for result in found["results"]:
            peer = known.get(result["workload"], {})
            for key, name in names.items():
                value = result[key]
                if (key == "requests_per_s") == result["load"]["stream"] or value is None:
                    continue
                ours = value if key == "requests_per_s" else (value["p50"], value["p99"])
                vllm, goal = (serve_cell(key, peer.get(who, {}).get(key)) for who in ("vllm", "goal"))
                lines.append(f"| {result['workload']} | {name} | **{serve_cell(key, ours)}** | {vllm} | {goal} |")
            if result["health"]:
                tail, goal = result["health"]["latency_ms"]["p99"], peer.get("goal", {}).get("health_ms")
                wanted = "–" if goal is None else f"{goal} ms"
                lines.append(f"| {result['workload']} | `/health` p99 meanwhile | **{tail:.1f} ms** | – | {wanted} |")
    if not about:
        return "No run is kept here yet."
    return "\n".join([*lines, "", f"{'; '.join(about)}. Written by `tests/bench/report.py`."])


def updated(text: str, files: Sequence[Path] = (), short: bool = False) -> str:
    """The page with everything between its markers made anew."""
    given = files or sorted(DOCS.glob("mm-bench-*.json"))
    sections = [section(json.loads(path.read_text(encoding="utf-8")), short) for path in given]
    body = "\n\n".join([*sections, "Written by `tests/bench/report.py`."]) if sections else "No run is kept here yet."
    text = between(text, BEGIN, END, body)
    if SERVE_BEGIN in text:
        text = between(text, SERVE_BEGIN, SERVE_END, serve_table(sorted(DOCS.glob("serve-*.json"))))
    return between(text, KV_BEGIN, KV_END, kv_table(sorted(DOCS.glob("kv-*.json")))) if KV_BEGIN in text else text


def between(text: str, begin: str, end: str, body: str) -> str:
    """The text with what stands between two marks replaced."""
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"


def draw(files: Sequence[Path], folder: Path) -> None:
    """Plots of all results whose trace is in the folder, written beside it."""
    from mm_core.bench.plot import plot
    from mm_core.bench.run import Result
    from mm_core.bench.timeline import read_trace

    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        for figures in found["results"]:
            trace = folder / f"{figures['workload']}.trace.json"
            if trace.exists():
                result = Result(figures["workload"], figures, read_trace(trace), 0)
                print(plot(result, found["model"], folder / f"{figures['workload']}.png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit code 1 where the page is out of date")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw plots of the files' results from DIR's traces")
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.plots is not None:
        draw(arguments.files, arguments.plots)
        return 0
    stale = 0
    for page in (DOCS / "README.md", ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        fresh = updated(text, arguments.files, short=page.parent == ROOT)
        stale += fresh != text
        if not arguments.check:
            page.write_text(fresh, encoding="utf-8")
    return int(arguments.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
