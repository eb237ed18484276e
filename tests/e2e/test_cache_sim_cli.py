"""`mm cache-sim` from its arguments to its files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mm_core.bench.traces import read_trace
from mm_core.cli import main
from mm_core.cli.cache_sim import _setups, _trace
from mm_core.cli.main import _parser

ROOT = Path(__file__).resolve().parents[2]
LARGE = ["--requests", "40", "--media", "12", "--rows", "1024", "--output-tokens", "4"]
SMALL = ["--requests", "40", "--media", "6", "--rows", "64", "--output-tokens", "4"]


def test_makes_a_trace_and_replays_it(tmp_path, capsys):
    file = tmp_path / "zipf.jsonl"
    assert main(["cache-sim", "--generate", "zipf", *LARGE, "--seed", "3", "--salts", "2", "-o", str(file)]) == 0
    assert re.match(
        r"Wrote .*zipf.jsonl: zipf, 40 requests, 42,480 prompt tokens, \d+ media items\n", capsys.readouterr().out
    )
    trace = read_trace(file)
    assert (trace.kind, trace.seed, len(trace.requests)) == ("zipf", 3, 40)
    sizes = ["--kv-tokens", "4500,16k", "--host-tokens", "0,16000", "--disk-tokens", "0,32000"]
    picture, figures = tmp_path / "zipf.png", tmp_path / "zipf.json"
    argv = ["cache-sim", str(file), *sizes, "--json", str(figures), "--plot", str(picture), "--max-num-seqs", "4"]
    assert main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[:4] for row in rows] == [
        [policy, kv, *tiers]
        for kv in ("4.5k", "16k")
        for tiers in (["-", "-"], ["16k", "-"], ["16k", "32k"])
        for policy in ("reuse", "fcfs")
    ]
    kept = json.loads(figures.read_text(encoding="utf-8"))
    assert kept["schema_version"] == 1
    assert kept["trace"]["requests"] == 40
    assert [r["policy"] for r in kept["results"]] == ["reuse", "fcfs"] * 6
    assert all(r["requests"] == 40 and r["failed"] == 0 and r["seconds"] > 0 for r in kept["results"])
    assert max(r["hit_rate"]["host"] for r in kept["results"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 120_000


@pytest.mark.parametrize("kind", ["chat", "system-prompts", "mixed"])
def test_replays_what_it_makes(kind, capsys, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text('{"preset": "h100-llava-1.5-7b", "copy_latency": 0.001}', encoding="utf-8")
    argv = ["cache-sim", "--generate", kind, *SMALL, "--policies", "fcfs", "--costs", str(costs), "--rate", "0"]
    assert main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{kind}, 40 requests")
    assert len(out) == 5


def test_runs_without_torch():
    code = (
        "import sys; from mm_core.cli import main\n"
        f"assert main({['cache-sim', '--generate', 'zipf', *SMALL]}) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where nobody looks


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--generate", "poisson"], "zipf, chat, system-prompts, mixed"),
        (["--generate", "zipf", "--requests", "0"], "--requests 0: want a number from 1"),
        (["--generate", "zipf", "--rate", "nan"], "--rate nan"),
        (["--generate", "zipf", "--policies", "reuse,lru"], "'lru' is unknown. There are: reuse, fcfs"),
        (["--generate", "zipf", "--kv-tokens", "many"], "'many' is no size"),
        (["--generate", "zipf", "--kv-tokens", "-5"], "is no size"),
        (["--generate", "zipf", "--kv-tokens", ""], "is no size"),
        (["--generate", "zipf", "--kv-tokens", "10"], "two blocks"),
        (["--generate", "zipf", "--disk-tokens", "10k"], "--host-tokens too"),
        (["--generate", "zipf", "--costs", "a100"], "h100-qwen2-vl-7b"),
        (["absent.jsonl"], "cannot be read"),
        (["--generate", "zipf", "-o", "absent/t"], "cannot be written"),
        (["--generate", "zipf", *SMALL, "--json", "absent/j"], "cannot be written"),
        (["--generate", "zipf", *SMALL, "--plot", "absent/p.png"], "cannot be written"),
        (["--generate", "zipf", *SMALL, "--plot", "p.nothing"], "cannot be written"),
    ],
)
def test_errors_name_the_remedy(argv, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cache-sim", *argv]) == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [[], ["t", "--generate", "zipf"], ["t", "-o", "u"], ["t", "--requests", "3"], ["t", "--block-size", "7"]]
)
def test_wrong_usage(argv):
    with pytest.raises(SystemExit) as ended:
        main(["cache-sim", *argv])
    assert ended.value.code == 2


# -- docs/reuse.md ---------------------------------------------------------------------------

PAGE = (ROOT / "docs/reuse.md").read_text(encoding="utf-8")


def test_documented_commands_are_understood():
    commands = re.findall(r"^`?(mm cache-sim [^`\n]*)", PAGE, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command)[1:])
        if arguments.generate is not None:
            assert _trace(arguments).requests
        if arguments.output is None:
            assert _setups(arguments)


def test_documented_trace_is_one(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "t").write_text(example, encoding="utf-8")
    (request,) = read_trace(tmp_path / "t").requests
    assert (request.prompt_tokens, request.media_rows, request.answer.tokens) == (2324, 2304, 64)


def test_pictures_are_small_and_name_their_commands():
    pictures = re.findall(r"!\[[^]]*\]\((images/reuse-[^)]*)\)", PAGE)
    assert len(pictures) == 3
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 120_000
        assert f"--plot docs/{picture}" in PAGE
