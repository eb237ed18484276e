"""`mm bench`: measure throughput and latency of named workloads or of a file of requests; load on a server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.cli.bench_serve import add_bench_serve_arguments
from mm_core.errors import ConfigError
from mm_core.zoo import default_model

if TYPE_CHECKING:
    from mm_core.bench.run import Result, Session

_WORKLOADS = "image-distinct, image-reuse, image-reuse-warm, image-large, text, latency, and the family's own"
_EPILOG = """\
workloads (prompt tokens -> output tokens):
  image-distinct    256 requests at once, a different 448x448 noise image each   294 -> 128
  image-reuse       256 requests at once on 16 images, a question each           294 -> 128
  image-reuse-warm  as image-reuse, its images with other questions run before   294 -> 128
  image-large       32 requests at once, a different 1344x1344 image each       2342 -> 64
  text              256 requests at once, no media                                36 -> 256
  latency           one request at a time, an image each           294 -> 1, then 294 -> 129
Plugins bring their own beside these: llava-distinct, llava-reuse, asr, …

examples:
  mm bench throughput --model qwen2-vl-7b --load-format dummy --workload image-distinct,text --json out.json
  mm bench latency --model ./my-checkpoint --report report/
  mm bench throughput --model ./my-checkpoint --dataset requests.jsonl --num-requests 64
  mm bench checkpoint qwen2-vl-7b ./dummy-7b && mm serve ./dummy-7b --load-format dummy
  mm bench serve --url http://localhost:8000 --workload serve-poisson-10
"""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm bench`."""
    parser.description = "Measure an engine, or a server."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, text in (("throughput", "requests all at once"), ("latency", "requests one at a time")):
        _add_run_arguments(modes.add_parser(mode, help=text, allow_abbrev=False))
    add_bench_serve_arguments(
        modes.add_parser("serve", help="load on any server that speaks OpenAI's API", allow_abbrev=False)
    )
    writing = modes.add_parser("checkpoint", help="write a built-in size without weights", allow_abbrev=False)
    writing.description = (
        "Write what `--load-format dummy` needs of a built-in size: settings, tokenizer and chat template, no weights."
    )
    writing.add_argument("model", metavar="NAME", help="such as qwen2-vl-7b")
    writing.add_argument("directory", type=Path, metavar="DIR", help="made where it is not there")
    writing.set_defaults(run_mode=_write_checkpoint, usage_error=writing.error)


def bench(arguments: argparse.Namespace) -> int:
    """Do what the mode says."""
    return int(arguments.run_mode(arguments))


def _write_checkpoint(arguments: argparse.Namespace) -> int:
    from mm_core.bench.models import write_checkpoint
    from mm_core.plugins import PluginRegistry

    try:
        print(write_checkpoint(arguments.model, PluginRegistry(), arguments.directory))
    except OSError as error:
        raise ConfigError(f"{arguments.directory} cannot be written: {error.strerror}.") from error
    return 0


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run a workload on one engine and print rates, latencies, reuse, and each phase beside the floor that the "
        "device's own measured ceilings set. Images are made before the clock starts; preprocessing runs inside it."
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what is run")
    what.add_argument("--model", metavar="NAME", help="directory, hub id, or a built-in size such as qwen2-vl-7b")
    what.add_argument("--revision", help="branch, tag or commit of a hub id")
    formats = ("safetensors", "dummy")
    what.add_argument("--load-format", default="safetensors", choices=formats, help="dummy: random weights")
    what.add_argument("--workload", metavar="NAMES", help=f"comma list of {_WORKLOADS}; or all")
    entry = 'JSON lines, or a list, of {"prompt", "media": [paths], "output_tokens"}'
    what.add_argument("--dataset", type=Path, metavar="FILE", help=entry)
    what.add_argument("--num-requests", type=_positive, metavar="N", help="requests taken of the dataset")
    what.add_argument("--requests", type=_positive, metavar="N", help="instead of the workload's number")
    what.add_argument("--output-tokens", type=_positive, metavar="N", help="instead of the workload's number")
    what.add_argument("--image-size", type=_positive, metavar="PIXELS", help="instead of the workload's")
    what.add_argument("--seed", type=int, default=0, help="of the noise images (default 0)")
    warm = "clock the very first requests too (a warm-up has noise for images, no video or audio)"
    what.add_argument("--no-warmup", action="store_true", help=warm)
    _add_engine_arguments(parser.add_argument_group("engine"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    output.add_argument("--report", type=Path, metavar="DIR", help="write timelines (Chrome traces) and plots")
    output.add_argument("--no-timeline", action="store_true", help="record no spans: no busy fraction, no phases")
    parser.set_defaults(run_mode=_run, usage_error=parser.error)


def _add_engine_arguments(engine: Any) -> None:
    engine.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:0"')
    engine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    engine.add_argument("--max-num-seqs", type=_positive, metavar="N")
    engine.add_argument("--max-num-batched-tokens", type=_positive, metavar="N")
    engine.add_argument("--max-model-len", type=_positive, metavar="N")
    kinds = ("auto", "float32", "bfloat16", "float16", "fp8")
    engine.add_argument("--kv-cache-dtype", choices=kinds, help="of keys and values (default: the model's)")
    engine.add_argument(
        "--host-cache-size", type=_nbytes, metavar="BYTES", help="of host memory behind the device's, as in 28GiB"
    )
    engine.add_argument("--scheduling-policy", choices=("reuse", "fcfs"), help="who starts first, what is kept")
    engine.add_argument("--no-overlap", action="store_true", help="schedule each step after the one before it")
    engine.add_argument("--no-cuda-graphs", action="store_true", help="launch decode steps kernel by kernel")
    engine.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of EngineConfig (JSON value)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _nbytes(text: str) -> int:
    """A number of bytes, in KiB, MiB or GiB where that stands behind it."""
    number, unit = text.rstrip("KMGiB"), text[len(text.rstrip("KMGiB")) :]
    powers = {"": 0, "B": 0, "KiB": 1, "MiB": 2, "GiB": 3}
    if unit not in powers or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no size. Want bytes, or a whole number of KiB, MiB or GiB: 28GiB")
    return int(number) << 10 * powers[unit]


def _run(arguments: argparse.Namespace) -> int:
    """Run what is asked for and print it; results that are done are kept where a later one fails."""
    if arguments.dataset is not None and arguments.workload is not None:
        arguments.usage_error("--dataset and --workload exclude each other")
    if arguments.num_requests is not None and arguments.dataset is None:
        arguments.usage_error("--num-requests belongs to --dataset; for a workload use --requests")
    if arguments.requests is not None and arguments.dataset is not None:
        arguments.usage_error("--requests belongs to --workload; for a dataset use --num-requests")
    if arguments.image_size is not None and arguments.dataset is not None:
        arguments.usage_error("--image-size belongs to --workload; a dataset's images are taken as they are")
    from mm_core.bench import report
    from mm_core.bench.dataset import read_dataset
    from mm_core.bench.device import environment
    from mm_core.bench.models import workloads_of
    from mm_core.bench.run import Session, Settings
    from mm_core.bench.workloads import select
    from mm_core.plugins import PluginRegistry

    one_by_one = arguments.mode == "latency"
    names = arguments.workload or ("latency" if one_by_one else "image-distinct")
    if names != "all":
        select(names, workloads_of(PluginRegistry()))  # a misspelt one is told before a model is loaded
    entries = None
    if arguments.dataset is not None:
        entries = read_dataset(arguments.dataset, arguments.num_requests, arguments.output_tokens)
    settings = Settings(
        model=arguments.model or str(default_model()),
        engine=_engine_options(arguments),
        seed=arguments.seed,
        warmup=not arguments.no_warmup,
        requests=arguments.requests,
        output_tokens=arguments.output_tokens,
        image_size=arguments.image_size,
    )
    with Session(settings) as session:
        workloads = session.workloads(names) if entries is None else []
        facts = environment(session.frontend.config.device)
        print(report.startup_text(report.document(session, facts, [])), flush=True)
        done: list[Result] = []
        try:
            if entries is not None:
                result = session.dataset(arguments.dataset.stem, entries, one_by_one=one_by_one)
                _finish(session, result, done, arguments)
            for workload in workloads:
                _finish(session, session.workload(workload, one_by_one=one_by_one), done, arguments)
        finally:
            if arguments.json is not None and done:
                report.write_json(report.document(session, facts, done), arguments.json)
    return 0


def _finish(session: Session, result: Result, done: list[Result], arguments: argparse.Namespace) -> None:
    """Print a result, and write its files."""
    from mm_core.bench import report

    print(f"\n{report.result_text(result.figures)}", flush=True)
    done.append(result)
    if arguments.report is not None:
        for line in report.write_report(result, Path(session.settings.model).name, arguments.report):
            print(f"  {line}", file=sys.stderr if line.startswith("no plot") else sys.stdout)


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig that the arguments name."""
    options: dict[str, Any] = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "load_format": arguments.load_format,
        "record_timeline": not arguments.no_timeline,
    }
    for name in ("revision", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "scheduling_policy"):
        if (value := getattr(arguments, name)) is not None:
            options[name] = value
    if arguments.no_overlap:
        options["overlap"] = False
    if arguments.no_cuda_graphs:
        options["cuda_graphs"] = False
    named = {"dtype": arguments.kv_cache_dtype, "host_cache_size": arguments.host_cache_size}
    cache = {name: value for name, value in named.items() if value is not None}
    return options | _more_options(arguments.set, cache)


def _more_options(assignments: Sequence[str], cache: dict[str, Any]) -> dict[str, Any]:
    """`--set FIELD=VALUE`; fields of the KV cache are spelt kv_cache_config.FIELD, and go to those in `cache`."""
    from mm_core.config import KvCacheConfig

    options: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: want FIELD=VALUE, for example --set preprocess_threads=12.")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        target = cache if name.startswith("kv_cache_config.") else options
        target[name.removeprefix("kv_cache_config.")] = parsed
    return options | ({"kv_cache_config": KvCacheConfig(**cache)} if cache else {})
