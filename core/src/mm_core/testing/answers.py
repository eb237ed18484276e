"""Rungs about answers: whatever serves or carries a request, the tokens are those of the request alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mm_core.engine.engine import Engine
from mm_core.testing.case import Answer, Case
from mm_core.testing.workbench import LOGPROBS, Workbench, need
from mm_core.types import LogitsRows, RequestOutput

if TYPE_CHECKING:
    from torch import Tensor

GRAPHS = "CUDA graph"
OVERLAP = "overlapped scheduling"
CHUNKS = "chunked prefill"
KV_REUSE = "KV reuse"
ENCODER_REUSE = "encoder reuse"
PROCESSORS = "logits processors"
STREAMING = "streaming"
FP8 = "fp8 KV"
_LARGEST_CHUNK = 7
_FP8_ERROR = 1.0  # of the first token's log-probability; some 0.1 where weights are random
_CROWD = 2  # variants of each case that join it in a batch


def _same(output: RequestOutput, wanted: RequestOutput, how: str) -> None:
    """Tokens and text are those of `wanted`."""
    got, want = list(output.token_ids), list(wanted.token_ids)
    if got != want:
        place = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        raise AssertionError(f"{how} the answer differs from token {place} on: {got}, alone {want}")
    need(output.text == wanted.text, f"{how} the text is {output.text!r}, alone {wanted.text!r}")


# -- cached


def check_cached(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Asked twice where KV is reused, and where only encoder rows are."""
    found: dict[str, str | None] = {}
    wanted = bench.alone(case)
    engine = bench.engine("reuse", reuse=True)
    with _counted(engine) as sources:
        _same(bench.ask(engine, case), wanted, "for the first time on an engine with reuse")
        calls, written = _encoder_calls(engine), sources.count
        again = bench.ask(engine, case)
        _same(again, wanted, "served from the caches")
        need(_encoder_calls(engine) == calls, "the same request again ran the encoder again")
        found[KV_REUSE] = _kv_reused(bench, again, written, sources.count)
    if case.items:
        _check_encoder_rows(bench, case, wanted)
        found[ENCODER_REUSE] = None
    if isinstance(case.prompt, str) and case.prompt:
        longer = replace(case, prompt=f"{case.prompt} Why?")
        calls = _encoder_calls(engine)
        _same(bench.ask(engine, longer), bench.alone(longer), "behind a prefix from the cache")
        need(_encoder_calls(engine) == calls, "another question about the same media ran the encoder again")
    return found


def _check_encoder_rows(bench: Workbench, case: Case, wanted: RequestOutput) -> None:
    engine = bench.engine("encoder reuse", reuse=False)
    for time in ("first", "second"):
        calls = _encoder_calls(engine)
        output = bench.ask(engine, case)
        _same(output, wanted, f"for the {time} time, KV not reused,")
        need(output.usage.cached_tokens == 0, "an engine without reuse served tokens from its KV cache")
    need(_encoder_calls(engine) == calls, "the same media again were encoded again")


def _kv_reused(bench: Workbench, again: RequestOutput, written: int, now: int) -> str | None:
    """None where KV was served from the cache; why not, where a prompt is shorter than a block."""
    if written:  # cross-attention: the keys and values of the source
        need(now == written, "the same source was projected to keys and values again")
        return None
    size = bench.plain.stats()["block_size"]
    short = len(again.prompt_token_ids) <= size
    need(short or again.usage.cached_tokens >= size, "the same prompt again: no token came from the KV cache")
    return f"the prompt is shorter than a block of {size} tokens" if short else None


def _encoder_calls(engine: Engine) -> int:
    return int(engine.stats()["encoder_calls"])


@dataclass
class _Count:
    count: int = 0


@contextmanager
def _counted(engine: Engine) -> Iterator[_Count]:
    """Counts the sources that the decoder projects; none, without cross-attention."""
    decoder: Any = getattr(engine._frontend.model, "decoder", None)  # it runs in this process
    found = _Count()
    write = getattr(decoder, "write_source", None)
    if write is None:
        yield found
        return

    def counting(*args: Any, **kwargs: Any) -> Any:
        found.count += 1
        return write(*args, **kwargs)

    decoder.write_source = counting
    try:
        yield found
    finally:
        del decoder.write_source


# -- fp8


def check_fp8(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Keys and values in eight bits: again from the cache the same tokens, which begin near the exact ones."""
    plain, engine = bench.engine("fp8", kv_dtype="fp8"), bench.engine("fp8 reuse", reuse=True, kv_dtype="fp8")
    caches = engine._frontend._core.runner.kv.caches.values()
    need(all(layer.scales is not None for layers in caches for layer in layers), "the KV cache is not in fp8")
    wanted = bench.ask(plain, case, logprobs=LOGPROBS)
    _same(bench.ask(engine, case), wanted, "for the first time, with an fp8 KV cache,")
    _same(bench.ask(engine, case), wanted, "served from an fp8 KV cache")
    exact, found = ((output.logprobs or ({},))[0] for output in (bench.alone(case), wanted))
    apart = max((abs(exact[t].logprob - found[t].logprob) for t in exact.keys() & found.keys()), default=float("inf"))
    need(apart < _FP8_ERROR, f"with an fp8 KV cache the first token's log-probabilities differ by {apart:.2f}")
    return {FP8: None}


# -- batched, chunked


def check_batched(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """All cases and variants of them in one list, with steps taken in one by one and overlapped."""
    found: dict[str, str | None] = {OVERLAP: None}
    for overlap in (False, True):
        crowd = _crowd(bench, overlap)
        for member, output in crowd:
            if member is case or any(member is bench.other(case, 20 + i) for i in range(_CROWD) if case.items):
                _same(output, bench.alone(member), "overlapped, in a batch" if overlap else "in a batch")
    if bench.model.device.type == "cuda":
        found[GRAPHS] = None
    return found


def _crowd(bench: Workbench, overlap: bool) -> list[tuple[Case, RequestOutput]]:
    """Every case and its variants, answered together; asked once."""
    name = f"batched, overlap={overlap}"
    if name not in bench.memo:
        cases = list(bench.settings.cases)
        template = cases[0].chat_template
        members = [c for c in cases if c.chat_template == template]
        members += [bench.other(c, 20 + i) for i in range(_CROWD) for c in members if c.items]
        members *= 1 if len(members) > 1 else 2
        engine = bench.engine(name, overlap=overlap)
        bench.ask(engine, members[0], max_tokens=1)
        in_flight, replays = _watch_launches(engine), _watch_graphs(engine)
        steps = engine.stats()["steps"]
        outputs = bench.ask_all(engine, members)
        alone = len(members) * bench.settings.max_tokens
        need(engine.stats()["steps"] - steps < alone, "the requests of a list shared no steps")
        need(max(in_flight) == int(overlap), f"overlap={overlap}: {max(in_flight)} steps in flight behind a launch")
        need(sum(replays) > 0 or bench.model.device.type != "cuda", "no decode step was replayed as a CUDA graph")
        bench.memo[name] = list(zip(members, outputs, strict=True))
    crowd: list[tuple[Case, RequestOutput]] = bench.memo[name]
    return crowd


def _watch_launches(engine: Engine) -> list[int]:
    """How many steps are in flight at each launch from now on."""
    core: Any = engine._frontend._core
    launch, seen = core.runner.launch, [0]

    def watching(batch: Any) -> Any:
        seen.append(core.stats()["steps_in_flight"])
        return launch(batch)

    core.runner.launch = watching
    return seen


def _watch_graphs(engine: Engine) -> list[int]:
    """A 1 for every step that is replayed as a CUDA graph from now on."""
    replays: list[int] = []

    def watch(graphs: Any) -> None:
        run = graphs.run

        def watching(*args: Any) -> Any:
            hidden = run(*args)
            replays.append(int(hidden is not None))
            return hidden

        graphs.run = watching

    core: Any = engine._frontend._core
    for graphs in core.runner._graphs:
        watch(graphs)
    return replays


def check_chunked(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """The prompt in steps of a few tokens each."""
    lengths = [len(bench.prepared(c).token_ids) for c in bench.settings.cases]
    budget = min([_LARGEST_CHUNK, *(length - 1 for length in lengths if length > 1)])
    if len(bench.prepared(case).token_ids) <= budget:
        return {CHUNKS: "the decoder's prompt is one token"}
    engine = bench.engine("chunked", max_num_batched_tokens=budget)
    chunks = engine.stats()["partial_prefills"]
    _same(bench.ask(engine, case), bench.alone(case), f"in chunks of {budget} tokens")
    need(engine.stats()["partial_prefills"] > chunks, "the prompt was not chunked")
    return {CHUNKS: None}


# -- streamed, logits processors


def check_streamed(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Token by token: every update goes on from the one before it, the last is the whole answer."""
    engine = bench.engine("streamed")
    updates = list(engine.stream(case.text_prompt(), bench.params(), apply_chat_template=case.chat_template))
    need(len(updates) > 1, "the stream had one update")
    seen: Sequence[int] = ()
    for update in updates:
        need(update.token_ids[: len(seen)] == seen, "an update does not go on from the one before it")
        seen = update.token_ids
    need(updates[-1].finished, "the last update is not finished")
    _same(updates[-1], bench.alone(case), "streamed")
    return {STREAMING: None}


@dataclass(frozen=True)
class Ban:
    """A logits processor: this token is never chosen."""

    token: int

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:  # noqa: ARG002
        """[R, vocab] → [R, vocab]."""
        logits[:, self.token] = float("-inf")
        return logits


@dataclass(frozen=True)
class Once:
    """A logits processor that reads the answer so far: no token is chosen twice."""

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        """[R, vocab] → [R, vocab]."""
        import torch

        seen = torch.zeros((logits.shape[0], logits.shape[1] + 1), dtype=torch.bool, device=logits.device)
        seen.scatter_(1, rows.output_token_ids + 1, True)  # -1 stands beyond a row's end
        return logits.masked_fill(seen[:, 1:], float("-inf"))


def check_logits_processors(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """A token banned by a processor is as banned by a bias, the request beside it notices nothing, and a processor
    may read the answer so far."""
    engine, wanted = bench.engine("logits processors"), bench.alone(case)
    first = wanted.token_ids[0]

    def ask(*params: Mapping[str, Any]) -> list[RequestOutput]:
        prompts, given = [case.text_prompt()] * len(params), [bench.params(**p) for p in params]
        return engine.generate(prompts, given, apply_chat_template=case.chat_template)

    banned, beside = ask({"logits_processors": (Ban(first),)}, {})
    need(first not in banned.token_ids, "a logits processor banned a token, and it was chosen")
    _same(beside, wanted, "beside a request with a logits processor")
    (biased,) = ask({"logit_bias": {first: -100.0}})
    need(
        banned.token_ids == biased.token_ids,
        f"banned by a processor the tokens are {banned.token_ids}, by a bias {biased.token_ids}",
    )
    (once,) = ask({"logits_processors": (Once(),)})
    plain = wanted.token_ids
    repeated = next((i for i, token in enumerate(plain) if token in plain[:i]), len(plain))
    need(once.token_ids[:repeated] == plain[:repeated], "a logits processor changed tokens that it leaves alone")
    need(len(set(once.token_ids)) == len(once.token_ids), "a logits processor was told a wrong answer so far")
    _same(bench.ask(engine, case), wanted, "after a request with a logits processor")
    return {PROCESSORS: None}


# -- parity


def check_parity(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Prompt ids, greedy tokens and log-probabilities are the reference's, which proves something."""
    settings = bench.settings
    if settings.reference is None:
        raise AssertionError("there is no reference")
    wanted: Answer = settings.reference(bench.path, case)
    output, request = bench.alone(case), bench.prepared(case)
    tokens, got = list(wanted.token_ids), list(output.token_ids)
    varied_enough = len(set(tokens)) >= min(settings.distinct_tokens, settings.max_tokens)
    need(varied_enough, f"the reference repeats itself ({tokens}): it proves nothing. Use `randomize_`, another seed")
    if wanted.prompt_ids is not None:
        ids, expected = list(output.prompt_token_ids), list(wanted.prompt_ids)
        need(ids == expected, f"the prompt's ids are {ids}, the reference's {expected}")
    need(got[: len(tokens)] == tokens, f"tokens are {got}, the reference's {tokens}")
    ended = len(tokens) < settings.max_tokens
    need(
        not ended or tokens[-1] in request.stop_token_ids, f"the reference's last token {tokens[-1]} ends nothing here"
    )
    if wanted.logits is not None:
        worst = _worst(output, wanted.logits)
        need(worst < settings.logits_tolerance, f"log-probabilities differ by up to {worst:.2e}")
    if case.items:
        other = bench.alone(bench.other(case, 20))
        need(other.token_ids != output.token_ids, "other media give the same answer: the weights prove nothing")
    return {}


def _worst(output: RequestOutput, logits: Tensor) -> float:
    """The largest difference of a log-probability that the output tells; logits: [tokens, vocab]."""
    import torch

    expected = torch.log_softmax(logits.float(), -1)
    told = (output.logprobs or ())[: len(expected)]
    differences = [
        abs(entry.logprob - float(expected[step, token]))
        for step, given in enumerate(told)
        for token, entry in given.items()
    ]
    return max(differences, default=float("nan"))
