"""`mm run`: ask a model once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mm_core.errors import EngineError
from mm_core.zoo import default_model

if TYPE_CHECKING:
    from mm_core.config import SamplingParams
    from mm_core.engine.engine import Engine
    from mm_core.types import RequestOutput, TextPrompt

SUFFIXES = {
    "image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"},
    "video": {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"},
    "audio": {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"},
}
_USAGE = 'mm run [MODEL] "PROMPT" [--image PATH] [--video PATH] [--audio PATH] [options]'


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm run`."""
    parser.usage = _USAGE
    parser.description = "Without MODEL, the small model that the project ships is used."
    parser.add_argument("words", nargs="*", metavar="[MODEL] PROMPT", help="directory or hub id, and the prompt")
    parser.add_argument("--model-dir", metavar="DIR", help="the model, spelled as an option")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt, spelled as an option")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    media = parser.add_argument_group("media")
    media.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for several")
    media.add_argument("--video", action="append", default=[], metavar="PATH", help="a video; repeat for several")
    media.add_argument("--audio", action="append", default=[], metavar="PATH", help="a recording; repeat for several")
    media.add_argument("--media", nargs="+", action="extend", default=[], metavar="PATH", help="media of --modality")
    kinds = ("text", *SUFFIXES)
    media.add_argument("--modality", choices=kinds, help="what --media are (else: by suffix)")
    output = parser.add_argument_group("output")
    output.add_argument("--max-tokens", type=int, default=256, metavar="N", help="at most N tokens (default 256)")
    output.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the best token always")
    output.add_argument("--seed", type=int, help="makes sampled output repeatable")
    output.add_argument("--stream", action="store_true", help="print text as it is made")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:0"')
    engine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    engine.add_argument("--disable-kv-cache-reuse", action="store_true", help="compute every prompt in full")


def run(arguments: argparse.Namespace) -> int:
    """Load the model, answer, and tell on stderr what it took."""
    model, text = _model_and_prompt(arguments)
    data = _media(arguments)
    from mm_core.config import KvCacheConfig, SamplingParams
    from mm_core.engine.engine import Engine
    from mm_core.types import TextPrompt

    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    prompt = TextPrompt(prompt=text, multi_modal_data=data or None)
    loaded = Engine.from_pretrained(
        str(default_model()) if model is None else model,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
        kv_cache_config=KvCacheConfig(enable_block_reuse=not arguments.disable_kv_cache_reuse),
    )
    with loaded as engine:
        start = time.perf_counter()
        answer = _stream(engine, prompt, params) if arguments.stream else _generate(engine, prompt, params)
        print(_usage_line(answer, time.perf_counter() - start), file=sys.stderr)
    return 0


def _refuse(arguments: argparse.Namespace, text: str) -> NoReturn:
    arguments.usage_error(text)  # argparse: usage and the text on stderr, exit code 2
    raise SystemExit(2)


def _model_and_prompt(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Positionals fill what the options leave open: the prompt last, the model before it."""
    words: list[str] = list(arguments.words)
    prompt: str | None = arguments.prompt
    if prompt is None:
        if not words:
            _refuse(arguments, "a prompt is wanted")
        prompt = words.pop()
    model: str | None = arguments.model_dir
    if model is None and words:
        model = words.pop(0)
    if words:
        _refuse(arguments, f"too many arguments: {' '.join(words)} (quote the prompt)")
    return model, prompt


def _media(arguments: argparse.Namespace) -> Mapping[str, list[Any]]:
    data: dict[str, list[Any]] = {kind: list(getattr(arguments, kind)) for kind in SUFFIXES}
    for path in arguments.media:
        if arguments.modality == "text":
            _refuse(arguments, "--modality text takes no --media")
        kind = arguments.modality or kind_of(path)
        if kind is None:
            _refuse(arguments, f"what is {path}? Say --modality image, video or audio")
        data.setdefault(kind, []).append(path)
    given = {kind: [_value(path) for path in paths] for kind, paths in data.items() if paths}
    if arguments.modality is not None and (other := set(given) - {arguments.modality}):
        _refuse(arguments, f"--modality {arguments.modality} does not go with --{min(other)}")
    return given


def kind_of(path: str) -> str | None:
    """The modality that a file's suffix stands for."""
    suffix = Path(path).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _value(path: str) -> str | Path:
    return path if path.startswith(("data:", "http:", "https:")) else Path(path).expanduser()


def _generate(engine: Engine, prompt: TextPrompt, params: SamplingParams) -> RequestOutput:
    answer = engine.generate(prompt, params)[0]
    print(answer.text)
    return answer


def _stream(engine: Engine, prompt: TextPrompt, params: SamplingParams) -> RequestOutput:
    """Print what each output adds. A family's final repair may change the text: then it is printed whole."""
    shown, answer = "", None
    for answer in engine.stream(prompt, params):
        if not answer.text.startswith(shown):
            print()
            shown = ""
        print(answer.text[len(shown) :], end="", flush=True)
        shown = answer.text
    print()
    if answer is None:
        raise EngineError("The engine ended the stream without an answer.")
    return answer


def _usage_line(answer: RequestOutput, seconds: float) -> str:
    usage = answer.usage
    media = f", {usage.media_tokens} of media" if usage.media_tokens else ""
    return (
        f"[prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached{media}) · "
        f"completion {usage.completion_tokens} tokens · {seconds:.2f} s]"
    )
