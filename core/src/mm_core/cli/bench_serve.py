"""`mm bench serve`: load on any OpenAI-compatible server, and reports of one or several."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from mm_core.bench.serve_loads import Load
    from mm_core.bench.serve_run import Progress, Setup

KEY_VARIABLE = "MM_API_KEY"
_WARMUP = 8
_EPILOG = """\
workloads (a different 448x448 noise picture a request, as a JPEG data URL, unless another is said):
  serve-burst       256 requests at once, 128 tokens out, not streamed
  serve-poisson-10  120 requests, 10 a second, 64 out, streamed
  serve-poisson-25  300 requests, 25 a second, 64 out, streamed
  serve-zipf        240 requests, 20 a second, 64 out, pictures drawn of 64 by Zipf's law
  serve-text        240 requests, 20 a second, 128 out, no picture
  serve-chat        24 conversations, 2 a second, of 4 turns, a second between an answer and the next turn

examples:
  mm bench serve --url http://localhost:8000 --workload serve-poisson-10 --health --json ours.json --html ours.html
  mm bench serve --url http://gpu1:8000/v1 --workload serve-text --rate 50 --duration 30 --burstiness 0.5
  mm bench serve --url http://localhost:8000 --dataset requests.jsonl --requests 200 --rate 5 --slo ttft=300 itl=50
  mm bench serve --compare ours.json --compare peer.json --html both.html
"""


def add_bench_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm bench serve`."""
    parser.description = (
        "Send requests to a server when their time has come, whatever became of those before, and print percentiles of "
        "latencies, rates and errors. All bytes are made before the clock starts."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    server = parser.add_argument_group("server")
    server.add_argument("--url", metavar="URL", help="http://HOST:PORT, with or without /v1")
    server.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first it lists)")
    server.add_argument("--api-key", metavar="KEY", help=f"default: ${KEY_VARIABLE}")
    server.add_argument("--label", metavar="TEXT", help="the server's name in reports (default: the address)")
    server.add_argument("--timeout-s", type=_number, default=600.0, metavar="S", help="for an answer (default 600)")
    server.add_argument("--health", nargs="?", const="/health", metavar="PATH",
                        help="ask for it ten times a second meanwhile (default path /health)")  # fmt: skip
    _add_load(parser.add_argument_group("load"))
    client = parser.add_argument_group("client")
    client.add_argument("--processes", type=_count, default=1, metavar="N", help="that send (default 1)")
    client.add_argument("--max-concurrency", type=_count, metavar="N", help="requests in flight at most (default: any)")
    client.add_argument("--warmup", type=int, default=_WARMUP, metavar="N",
                        help=f"short requests before the clock, with other pictures (default {_WARMUP})")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--slo", nargs="+", default=[], metavar="NAME=MS",
                        help="goodput under ttft, itl (a request's p99), tpot and e2e, in ms")  # fmt: skip
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures and requests")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots, in one file")
    output.add_argument("--compare", type=Path, action="append", default=[], metavar="FILE",
                        help="a --json of another run, side by side; repeat for several; needs no --url")  # fmt: skip
    parser.set_defaults(run_mode=bench_serve, usage_error=parser.error)


def _add_load(group: Any) -> None:
    group.add_argument("--workload", metavar="NAMES", help="comma list of those below (default serve-poisson-10)")
    entry = 'JSON lines, or a list, of {"prompt", "media": [paths], "output_tokens"}'
    group.add_argument("--dataset", type=Path, metavar="FILE", help=entry)
    group.add_argument("--rate", type=_rate, metavar="R", help="arrivals a second at random, inf: all at once")
    for name, kind, text in (
        (
            "burstiness",
            _number,
            "shape of the gaps' gamma distribution; 1 is Poisson, less comes in bursts (default 1)",
        ),
        ("requests", _count, "how many (of chats: conversations)"),
        ("duration", _number, "seconds, instead of --requests"),
        ("output-tokens", _count, "of an answer"),
        ("prompt-tokens", _count, "of a prompt in all: the text is cut or repeated until the server counts so many"),
        ("images", _whole, "of a request (of a conversation's first turn)"),
        ("items", _whole, "different pictures that all requests share; 0: each has its own"),
        ("exponent", float, "of Zipf's law, by which shared pictures are drawn; 0: in turns"),
        ("image-size", _count, "pixels a side"),
        ("turns", _count, "of a conversation"),
        ("think-s", float, "seconds between an answer and the next turn"),
        ("seed", int, "of pictures and arrivals (default: a new one each run, so that nothing is cached from before)"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    group.add_argument("--stream", action=argparse.BooleanOptionalAction, help="instead of the workload's")
    group.add_argument("--no-ignore-eos", action="store_true", help="for servers that do not know ignore_eos")
    group.add_argument("--extra-body", metavar="JSON", help="more fields of every call's body")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a rate: want requests a second, or inf")
    return value


def bench_serve(arguments: argparse.Namespace) -> int:
    """Run what is asked for and print it; results that are done are written where a later one fails."""
    _check(arguments)
    from mm_core.bench.serve_report import comparison_text, document, read_document

    others = [read_document(path) for path in arguments.compare]
    documents = list(others)
    if arguments.url is not None:
        results: list[dict[str, Any]] = []
        label = arguments.label or arguments.url.split("://")[-1].rstrip("/").removesuffix("/v1")
        try:
            _run_all(arguments, results)
        finally:
            if results:
                documents.insert(0, document(label, arguments.url, str(results[0]["model"]), results))
                _write(arguments, documents)
    else:
        _write(arguments, documents)
    if others:
        print(f"\n{comparison_text(documents)}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.url is None and not arguments.compare:
        arguments.usage_error("--url is wanted, or --compare FILE for a report of runs that are done")
    if arguments.url is None and arguments.json is not None:
        arguments.usage_error("--json keeps what was measured, and without --url nothing is")
    if arguments.workload is not None and arguments.dataset is not None:
        arguments.usage_error("--workload and --dataset exclude each other")
    if arguments.requests is not None and arguments.duration is not None:
        arguments.usage_error("--requests and --duration exclude each other")
    if arguments.dataset is not None and arguments.prompt_tokens is not None:
        arguments.usage_error("--prompt-tokens belongs to workloads; a dataset's prompts are taken as they are")
    if arguments.warmup < 0:
        arguments.usage_error("--warmup is a whole number from 0")
    if arguments.extra_body is not None and _fields(arguments.extra_body) is None:
        arguments.usage_error("--extra-body is a JSON object")


def _fields(text: str) -> dict[str, Any] | None:
    """The fields of a JSON object; None for another text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _run_all(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Each workload after the other; what is done is in `results`."""
    from mm_core.bench.serve_figures import read_objectives
    from mm_core.bench.serve_http import Target
    from mm_core.bench.serve_run import Setup

    objectives = read_objectives(arguments.slo)
    loads = _loads(arguments)
    target = Target.of(arguments.url, arguments.api_key or os.environ.get(KEY_VARIABLE))
    model = arguments.model or _first_model(target)
    setup = Setup(target, model, arguments.timeout_s, arguments.max_concurrency)
    print(f"{arguments.url}, model {model}; seed {loads[0].seed}", flush=True)
    for load in loads:
        _run_one(arguments, setup, load, objectives, results)


def _run_one(
    arguments: argparse.Namespace,
    setup: Setup,
    load: Load,
    objectives: Mapping[str, float],
    results: list[dict[str, Any]],
) -> None:
    from mm_core.bench.serve_figures import summarise
    from mm_core.bench.serve_report import result_text
    from mm_core.bench.serve_run import fitted, warm_up
    from mm_core.bench.serve_worker import run_load

    if arguments.prompt_tokens is not None:
        characters = asyncio.run(fitted(setup, load, arguments.prompt_tokens))
        load = replace(load, characters=characters)
    if arguments.warmup:
        asyncio.run(warm_up(setup, load, arguments.warmup))
    outcome = run_load(setup, load, arguments.processes, arguments.health, _tell)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    figures = {**summarise(load, outcome, objectives), "model": setup.model, "processes": arguments.processes}
    results.append(figures)
    print(f"\n{result_text(figures)}", flush=True)


def _loads(arguments: argparse.Namespace) -> list[Load]:
    """What is asked for, with the caller's sizes."""
    from mm_core.bench.serve_loads import Load, select_loads, sized

    given: dict[str, Any] = {
        name: value
        for name in ("rate", "burstiness", "requests", "output_tokens", "images", "items", "exponent", "image_size",
                     "turns", "think_s", "stream")
        if (value := getattr(arguments, name)) is not None
    }  # fmt: skip
    given["seed"] = secrets.randbits(31) if arguments.seed is None else arguments.seed
    given["ignore_eos"] = not arguments.no_ignore_eos
    given["extra"] = _fields(arguments.extra_body or "{}")
    if arguments.dataset is None:
        loads = select_loads(arguments.workload or "serve-poisson-10")
    else:
        from mm_core.bench.dataset import read_dataset

        entries = read_dataset(arguments.dataset, None, None)
        base = Load(arguments.dataset.stem, "dataset", len(entries), 10.0, dataset=str(arguments.dataset))
        loads = [replace(base, output_tokens=None, images=0)]
    loads = [sized(load, given, arguments.duration) for load in loads]
    if any(load.exponent and not load.items for load in loads):
        raise ConfigError("--exponent says how shared pictures are drawn. Say how many there are with --items.")
    return loads


def _first_model(target: Any) -> str:
    from mm_core.bench.serve_http import exchange
    from mm_core.bench.serve_run import fault_of

    reply = asyncio.run(exchange(target, [target.head("GET", f"{target.base}/models", 0)], 30.0))
    where = f"{target.host}:{target.port}"
    if reply.error is not None:
        raise EngineError(f"The server at {where} cannot be asked: {fault_of(reply)}. Check --url.")
    try:
        return str(json.loads(reply.body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise EngineError(
            f"The server at {where} lists no model (status {reply.status}). Check --url and --api-key, or name one "
            "with --model."
        ) from None


def _tell(progress: Progress) -> None:
    """One line, over again; nothing where nobody looks."""
    if sys.stderr.isatty():
        told = f"sent {progress.sent} of {progress.total}, {progress.running} running, {progress.failed} failed"
        print(f"\r\x1b[K{told}", end="", file=sys.stderr, flush=True)


def _write(arguments: argparse.Namespace, documents: list[dict[str, Any]]) -> None:
    from mm_core.bench.serve_html import page

    texts = {}
    if arguments.json is not None:
        texts[arguments.json] = json.dumps(documents[0]) + "\n"
    if arguments.html is not None:
        texts[arguments.html] = page(documents)
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
