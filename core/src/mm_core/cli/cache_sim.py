"""`mm cache-sim`: replay a trace of requests against the scheduler and the caches, without a model or a GPU."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from mm_core.bench.simulate import SimSetup
    from mm_core.bench.traces import Trace

_PROGRESS_DELAY_S = 2.0
_MAX_RUNS = 1000
_EPILOG = """\
kinds of made-up traces:
  zipf            a picture and a question each; pictures are drawn by Zipf's law
  chat            conversations about a picture of their own; each turn repeats what was said
  system-prompts  questions behind one of some long instructions, without media
  mixed           a third of each, with pictures, clips and videos of several sizes

examples:
  mm cache-sim --generate zipf --requests 2000 --rate 20 -o zipf.jsonl
  mm cache-sim zipf.jsonl --kv-tokens 77k,154k,308k --policies reuse,fcfs --plot zipf.png
  mm cache-sim --generate chat --kv-tokens 154k --host-tokens 0,500k --json chat.json
"""


def add_cache_sim_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm cache-sim`."""
    parser.description = (
        "Replay a trace against the real scheduler and caches, with a virtual clock and costs measured on a GPU in its "
        "place: how many prompt tokens come from which cache, and how fast requests are answered, by policy and size."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("trace", nargs="?", type=Path, metavar="TRACE", help="a file of requests (docs/reuse.md)")
    made = parser.add_argument_group("a made-up trace in its place")
    made.add_argument("--generate", metavar="KIND", help="zipf, chat, system-prompts or mixed")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the trace, and replay nothing")
    for name, kind, text in (
        ("requests", int, "requests in all (default 2000)"),
        ("seed", int, "of everything that is drawn (default 0)"),
        ("rate", float, "requests a second, at random; 0: all at once (default 10)"),
        ("media", int, "different items (default 200)"),
        ("exponent", float, "of Zipf's law (default 1.0)"),
        ("rows", int, "encoder rows, which are prompt tokens, of an item (default 2304)"),
        ("shared-tokens", int, "of the instruction behind an item (default 12)"),
        ("text-tokens", int, "of a question (default 22)"),
        ("output-tokens", int, "of an answer (default 64)"),
        ("turns", int, "of a conversation, on average (default 6)"),
        ("think", float, "seconds before a next turn, on average (default 10)"),
        ("systems", int, "different system prompts (default 20)"),
        ("system-tokens", int, "of one, on average (default 1500)"),
        ("salts", int, "users who share nothing; 0: one user (default 0)"),
    ):
        made.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--policies", default="reuse,fcfs", metavar="NAMES", help="comma list (default reuse,fcfs)")
    sizes = "comma list of tokens; 154k is 154,000"
    engine.add_argument("--kv-tokens", default="154k", metavar="SIZES", help=f"KV cache: {sizes} (default 154k)")
    engine.add_argument("--host-tokens", default="0", metavar="SIZES", help=f"host tier: {sizes} (default 0)")
    engine.add_argument("--disk-tokens", default="0", metavar="SIZES", help=f"disk tier: {sizes} (default 0)")
    engine.add_argument("--encoder-cache-tokens", type=_positive, metavar="N", help="rows (default 32768)")
    engine.add_argument("--max-num-seqs", type=_positive, metavar="N", help="default 256")
    engine.add_argument("--max-num-batched-tokens", type=_positive, metavar="N", help="default 8192")
    engine.add_argument("--block-size", type=int, choices=(16, 32, 64, 128), help="default 16")
    costs = "h100-qwen2-vl-7b, h100-llava-1.5-7b, or a JSON file (default h100-qwen2-vl-7b)"
    engine.add_argument("--costs", default=None, metavar="NAME", help=costs)
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw them against the cache's size (a .png)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def cache_sim(arguments: argparse.Namespace) -> int:
    """Replay, or write, what is asked for."""
    if (arguments.trace is None) == (arguments.generate is None):
        arguments.usage_error("give a TRACE, or --generate KIND")
    trace = _trace(arguments)
    if arguments.output is not None:
        from mm_core.bench.traces import write_trace

        write_trace(trace, arguments.output)
        print(f"Wrote {arguments.output}: {_about(trace)}")
        return 0
    setups = _setups(arguments)
    if arguments.plot is not None:
        from mm_core.bench.sim_plot import check_plots

        check_plots()  # before minutes of work
    results = _run(trace, setups)
    _tell(trace, setups[0], results, arguments)
    return 0


def _trace(arguments: argparse.Namespace) -> Trace:
    from mm_core.bench.trace_kinds import TraceOptions, make_trace
    from mm_core.bench.traces import read_trace

    given = {f.name: getattr(arguments, f.name) for f in fields(TraceOptions)}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.generate is not None:
        return make_trace(arguments.generate, TraceOptions(**given))
    if arguments.output is not None or given:
        name = "output" if arguments.output is not None else next(iter(given)).replace("_", "-")
        arguments.usage_error(f"--{name} belongs to --generate; {arguments.trace} is replayed as it is")
    return read_trace(arguments.trace)


def _about(trace: Trace) -> str:
    tokens = sum(r.prompt_tokens for r in trace.requests)
    kind = trace.kind or "a trace"
    return f"{kind}, {len(trace.requests):,} requests, {tokens:,} prompt tokens, {len(trace.media):,} media items"


def _setups(arguments: argparse.Namespace) -> list[SimSetup]:
    """Every policy with every combination of sizes; a disk tier only behind a host tier."""
    from mm_core.bench.sim_costs import DEFAULT_COSTS, costs_of
    from mm_core.bench.simulate import SimSetup
    from mm_core.scheduler.policy import POLICIES

    policies = [name.strip() for name in arguments.policies.split(",")]
    if unknown := [name for name in policies if name not in POLICIES]:
        raise ConfigError(f"--policies: {unknown[0]!r} is unknown. There are: {', '.join(POLICIES)}.")
    sizes = [_sizes(arguments, name) for name in ("kv_tokens", "host_tokens", "disk_tokens")]
    runs = [(p, *s) for s in itertools.product(*sizes) if s[1] or not s[2] for p in dict.fromkeys(policies)]
    if not runs:
        raise ConfigError("--disk-tokens needs a host tier to go through: give --host-tokens too.")
    if len(runs) > _MAX_RUNS:
        raise ConfigError(f"{len(runs)} combinations of policies and sizes are too many; {_MAX_RUNS} are the limit.")
    names = ("encoder_cache_tokens", "max_num_seqs", "max_num_batched_tokens", "block_size")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    costs = costs_of(arguments.costs or DEFAULT_COSTS)
    return [
        SimSetup(policy=policy, kv_tokens=kv, host_tokens=host, disk_tokens=disk, costs=costs, **given)
        for policy, kv, host, disk in runs
    ]


def _sizes(arguments: argparse.Namespace, name: str) -> list[int]:
    """Distinct sizes of a comma list, in tokens."""
    text: str = getattr(arguments, name)
    found = []
    for part in text.split(","):
        number, thousand = part.strip(), 1
        if number.lower().endswith("k"):
            number, thousand = number[:-1], 1000
        if not (number.isascii() and number.isdigit() and len(number) <= 12):
            raise ConfigError(f"--{name.replace('_', '-')} {text}: {part!r} is no size. Write 154000, or 77k,154k.")
        found.append(int(number) * thousand)
    return list(dict.fromkeys(found))


def _run(trace: Trace, setups: list[SimSetup]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from mm_core.bench.sim_report import figures
    from mm_core.bench.simulate import replay

    total = len(trace.requests) * len(setups)
    with tqdm(total=total, unit="req", desc="Replaying", delay=_PROGRESS_DELAY_S, leave=False, disable=None) as bar:
        return [figures(replay(trace, setup, bar.update)) for setup in setups]


def _tell(trace: Trace, setup: SimSetup, results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from mm_core.bench.sim_report import document, table

    print(f"{_about(trace)}\n\n{table(results)}")
    if failed := max(found["failed"] for found in results):
        print(f"\n{failed} of the requests do not fit the caches and were refused.")
    if arguments.json is not None:
        text = json.dumps(document(trace, setup.costs, results), indent=1) + "\n"
        try:
            arguments.json.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written ({type(error).__name__}).") from None
    if arguments.plot is not None:
        from mm_core.bench.sim_plot import plot

        plot(results, _about(trace), arguments.plot)
