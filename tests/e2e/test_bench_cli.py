"""`mm bench` from its arguments to its files, on the small models."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pictures import picture
from support.scripts import module_of

from mm_core.bench import run
from mm_core.bench.run import Session, Settings
from mm_core.bench.workloads import WORKLOADS
from mm_core.cli import main
from mm_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--requests", "16", "--output-tokens", "6", "--image-size", "112", "--device", "cpu", "--dtype", "float32"]
TINY_TEXT = ["--workload", "text", "--requests", "3", "--output-tokens", "2", "--device", "cpu", "--no-warmup"]
ROWS = 16  # of an image of 112 × 112
PROMPT = ROWS + 16 + 22
TRACKS = {"preprocess", "encoder", "decoder", "engine"}


@pytest.fixture(autouse=True, scope="module")
def _measured_once() -> Iterator[None]:
    """What the machine can do is measured in a process of its own, each time for seconds: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_ceilings", functools.cache(run.measure_ceilings))
        yield


@pytest.fixture(scope="module")
def reports(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """All workloads on one engine: the JSON document, the folder of the report, and what was printed."""
    folder = tmp_path_factory.mktemp("report")
    output = ["--json", str(folder / "all.json"), "--report", str(folder)]
    argv = ["bench", "throughput", "--model", str(tiny_path), "--workload", "all", *SMALL, *output]
    command = [sys.executable, "-m", "mm_core.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "all.json").read_text(encoding="utf-8")), folder, done.stdout


def result(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [r for r in document["results"] if r["workload"] == name]
    return found


@pytest.mark.slow
def test_document(reports: tuple[dict[str, Any], Path, str]) -> None:
    document, _, _ = reports
    assert document["schema_version"] == 1
    assert {"torch", "device", "python", "triton", "cores"} <= set(document["environment"])
    assert document["config"]["record_timeline"] is True
    assert document["startup"]["seconds"] > 0
    assert document["kv_cache_tokens"] > 0
    assert all(document["ceilings"][k] > 0 for k in ("copy_bandwidth", "read_bandwidth", "matmul_flops"))
    assert [r["workload"] for r in document["results"]] == list(WORKLOADS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WORKLOADS if n != "latency"])
def test_figures_of_a_workload(reports: tuple[dict[str, Any], Path, str], name: str) -> None:
    found = result(reports[0], name)
    tokens, prompt = found["tokens"], 36 if name == "text" else PROMPT
    assert (found["kind"], found["requests"], tokens["prompt_each"]) == ("throughput", 16, [prompt])
    assert (tokens["prompt"], tokens["output"]) == (16 * prompt, 16 * 6)
    assert tokens["media"] == (0 if name == "text" else 16 * ROWS)
    assert found["requests_per_s"] == pytest.approx(16 / found["seconds"])
    assert found["total_tokens_per_s"] == pytest.approx(16 * (prompt + 6) / found["seconds"])
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["seconds"] * 1e3
    assert 0 < found["inter_token_ms"]["p50"] <= found["inter_token_ms"]["max"]
    assert sum(found["floor_s"].values()) > 0
    assert 0 < found["timeline"]["device_busy_fraction"] <= 1
    assert {"prefill", "mixed"} & set(found["phases"])
    loop = found["timeline"]["by_name"]
    assert loop["launch"]["spans"] == loop["update"]["spans"] == loop["wait"]["spans"] == found["engine"]["steps"]
    assert ("encode" in found["phases"]) == (name not in ("text", "image-reuse-warm"))


def in_full_blocks(found: dict[str, Any]) -> int:
    """Tokens from the cache but for beginnings of blocks that were copied, as of the template's first words."""
    return int(found["tokens"]["cached"] - found["caches"]["copied_tokens"])


@pytest.mark.slow
def test_reuse_is_what_the_workload_has(reports: tuple[dict[str, Any], Path, str]) -> None:
    document, _, _ = reports
    cached = {n: in_full_blocks(result(document, n)) for n in WORKLOADS}
    assert cached["image-distinct"] == cached["image-large"] == cached["text"] == cached["latency"] == 0
    shared = ROWS + 16  # two blocks: nothing of a question is reused
    assert cached["image-reuse"] == 15 * shared  # one image
    assert cached["image-reuse-warm"] == 16 * shared
    for name, tokens in cached.items():
        assert result(document, name)["tokens"]["reusable"] == tokens
    encoded = {n: result(document, n)["caches"]["encoded_items"] for n in WORKLOADS}
    assert (encoded["image-distinct"], encoded["image-reuse"], encoded["image-reuse-warm"]) == (16, 1, 0)
    processed = {n: result(document, n)["caches"]["processor_misses"] for n in WORKLOADS}
    assert (processed["image-distinct"], processed["image-reuse"], processed["image-reuse-warm"]) == (16, 1, 0)


@pytest.mark.slow
def test_latency(reports: tuple[dict[str, Any], Path, str]) -> None:
    found = result(reports[0], "latency")
    assert (found["kind"], found["requests"], found["tokens"]["prompt_each"]) == ("latency", 16, [PROMPT])
    assert found["per_token_ms"]["p50"] > 0
    assert found["tokens"]["output"] == 16 * 6
    assert sum(found["ttft_floor_ms"].values()) > 0
    # One at a time: each first token comes before the next request is sent.
    assert found["ttft_ms"]["mean"] * 16 / 1e3 <= found["one_token"]["seconds"]
    assert found["caches"]["encoder_hits"] == 0


@pytest.mark.slow
def test_traces_and_plots(reports: tuple[dict[str, Any], Path, str]) -> None:
    _, folder, _ = reports
    for name in WORKLOADS:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        events = json.loads((folder / f"{name}.trace.json").read_text(encoding="utf-8"))["traceEvents"]
        tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        assert {t.split()[0] for t in tracks.values()} <= TRACKS
        spans = [e for e in events if e["ph"] == "X"]
        assert {"preprocess", "schedule", "launch", "update"} <= {e["name"] for e in spans}
        assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["tid"] in tracks for e in spans)
        decoder = [e for e in spans if tracks[e["tid"]] == "decoder"]
        assert sum(e["args"]["tokens"] for e in decoder) > 0
        # The clock is one: on a CPU nothing runs beside the decoder on the same thread.
        ordered = sorted(decoder, key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(ordered))


@pytest.mark.slow
def test_what_is_printed(reports: tuple[dict[str, Any], Path, str]) -> None:
    _, folder, text = reports
    assert "ceilings: copy" in text
    assert "ready in" in text
    for name in WORKLOADS:
        assert f"\n{name} (" in text
        assert str(folder / f"{name}.trace.json") in text
    words = ("requests/s", "output tokens/s", "p50", "p90", "p99", "from the KV cache", "busy", "TB/s", "loop, a step")
    for word in (*words, "floor"):
        assert word in text


@pytest.mark.slow
def test_table_for_the_docs(reports: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    script = ROOT / "tests/bench/report.py"
    assert subprocess.run([sys.executable, str(script), "--check"], timeout=120, check=False).returncode == 0
    module = module_of(script)
    page = (ROOT / "docs/benchmarks/README.md").read_text(encoding="utf-8")
    _, folder, _ = reports
    fresh = module.updated(page, [folder / "all.json"])
    assert "| image-reuse | **" in fresh
    assert "latency: first token" in fresh
    assert fresh.split(module.BEGIN)[0] == page.split(module.BEGIN)[0]
    assert fresh.split(module.END)[1] == page.split(module.END)[1]


def dataset(folder: Path) -> Path:
    picture(1, 80, 60).save(folder / "a.png")
    picture(2, 60, 80).save(folder / "b.png")
    rows = [
        {"prompt": "What is this?", "media": ["a.png"], "output_tokens": 3},
        {"prompt": "And these?", "media_paths": ["a.png", "b.png"], "output_tokens": 5},
        {"prompt": "The quick brown fox", "output_tokens": 4},
    ]
    path = folder / "asked.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("mode", ["throughput", pytest.param("latency", marks=pytest.mark.slow)])
def test_dataset(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    out = tmp_path / "deep" / "out.json"
    argv = ["bench", mode, "--model", str(tiny_path), "--dataset", str(dataset(tmp_path)), "--num-requests", "5"]
    assert main([*argv, "--device", "cpu", "--json", str(out), "--no-timeline"]) == 0
    (found,) = json.loads(out.read_text())["results"]
    assert (found["workload"], found["kind"], found["requests"]) == ("asked", mode, 5)
    assert found["tokens"]["output"] == 3 + 5 + 4 + 3 + 5
    caches = found["caches"]  # the warm-up had neither picture
    assert (caches["encoded_items"], caches["processor_misses"]) == (2, 2)
    assert found["floor_s"]["encode"] > 0
    assert "timeline" not in found
    assert "asked (" in capsys.readouterr().out


def test_faulty_datasets_are_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert main(["bench", "throughput", "--model", "absent/model", "--dataset", str(path)]) == 1
    error = capsys.readouterr().err
    assert "d.jsonl, line 2: want an object with a text `prompt`" in error
    assert error.count("\n") == 1


def test_a_model_with_other_rows_is_refused(tiny_path: Path) -> None:
    with Session(Settings(str(tiny_path), {"device": "cpu", "show_progress": False}, requests=2)) as session:
        with pytest.raises(ConfigError, match=r"256 rows an item .* this model makes 64.*--image-size 448"):
            session.workload(WORKLOADS["image-distinct"])
        found = session.workload(WORKLOADS["text"]).figures  # the engine is as good as new
        assert found["tokens"]["prompt_each"] == [36]


def test_no_run_profits_from_an_earlier_one(tiny_path: Path) -> None:
    settings = Settings(str(tiny_path), {"device": "cpu", "show_progress": False}, 0, False, 16, 2, 112)
    keys = ("encoded_items", "encoder_hits", "processor_misses")
    with Session(settings) as session:
        for name in ("image-reuse-warm", "image-reuse", "image-reuse"):
            caches = session.workload(WORKLOADS[name]).figures["caches"]
            assert caches["encoded_items"] == caches["processor_misses"] == int(name == "image-reuse")
        for name in ("image-reuse-warm", "image-reuse"):
            found = session.workload(WORKLOADS[name], one_by_one=True).figures
            assert [found["caches"][key] for key in keys] == [16, 0, 16]
            assert in_full_blocks(found) == 0


def test_engine_settings_arrive(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.json"
    argv = ["bench", "throughput", "--model", str(tiny_path), *TINY_TEXT, "--load-format", "dummy", "--json", str(out),
            "--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--max-model-len", "256", "--no-overlap",
            "--no-cuda-graphs", "--set", "preprocess_threads=1", "--set", "kv_cache_config.num_blocks=40", "--set",
            "hash_algorithm=sha256", "--kv-cache-dtype", "float32", "--host-cache-size", "3MiB",
            "--scheduling-policy", "fcfs"]  # fmt: skip
    assert main(argv) == 0
    document = json.loads(out.read_text())
    config = document["config"]
    wanted = {
        "max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 256, "overlap": False, "cuda_graphs": False,
        "preprocess_threads": 1, "hash_algorithm": "sha256", "load_format": "dummy",
        "scheduling_policy": "fcfs",
    }  # fmt: skip
    assert {k: config[k] for k in wanted} == wanted
    cache = config["kv_cache_config"]
    assert (cache["num_blocks"], cache["dtype"], cache["host_cache_size"]) == (40, "float32", 3 * 2**20)
    assert document["kv_cache_tokens"] == 640
    assert main(["bench", "throughput", "--model", str(tiny_path), "--set", "preprocess_threads"]) == 1
    assert "want FIELD=VALUE" in capsys.readouterr().err
    assert main(["bench", "throughput", "--model", str(tiny_path), "--set", "fly=1"]) == 1
    assert "'fly' is not an option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["bench"], ["bench", "speed"], ["bench", "throughput", "--host-cache-size", "2 loaves"],
     ["bench", "throughput", "--requests", "0"],
     ["bench", "throughput", "--dataset", "x", "--workload", "text"], ["bench", "latency", "--num-requests", "3"],
     ["bench", "latency", "--dataset", "x", "--requests", "3"],
     ["bench", "throughput", "--dataset", "x", "--image-size", "112"]],
)  # fmt: skip
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: mm bench" in capsys.readouterr().err


def test_help_tells_workloads_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in WORKLOADS)
    assert "examples:" in text


def test_unknown_workloads_name_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--workload", "fly"]) == 1
    assert "'fly' is no workload. There are: image-distinct" in capsys.readouterr().err


def test_built_in_models_need_dummy_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--model", "qwen2-vl-7b", "--device", "cpu"]) == 1
    assert "--load-format dummy" in capsys.readouterr().err


def test_no_plot_without_matplotlib(tiny_path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    argv = ["bench", "throughput", "--model", str(tiny_path), *TINY_TEXT, "--report", str(tmp_path)]
    assert main(argv) == 0
    assert "pip install 'mm-core[bench]'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["text.trace.json"]
