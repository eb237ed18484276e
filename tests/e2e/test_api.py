"""The library's front door: what goes into `generate`, what comes out, and what sampling options do."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.e2e import GREEDY, IMAGE, ask, check_message, settle, turn
from support.pictures import picture

from mm_core import Engine, KvCacheConfig, MMError, RequestOutput, SamplingParams, TextPrompt
from mm_core.errors import BatchError, ConfigError, ContextLengthError, InvalidParamsError, InvalidPromptError

TEXT = "The quick brown fox jumps over the lazy"
LONG = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


def ids_of(engine: Engine, text: str) -> list[int]:
    return list(engine._frontend.model.processor.tokenizer(text)["input_ids"])


def one(engine: Engine, prompt: Any = TEXT, **params: Any) -> RequestOutput:
    (output,) = engine.generate(prompt, SamplingParams(**{"max_tokens": 16, "temperature": 0, **params}))
    return output


# -- what goes in ----------------------------------------------------------------------------------


def test_every_form_of_a_text_prompt_gives_the_same_tokens(engine: Engine) -> None:
    ids = ids_of(engine, TEXT)
    forms = [TEXT, TextPrompt(prompt=TEXT), {"prompt": TEXT}, TextPrompt(prompt_token_ids=ids),
             {"prompt_token_ids": tuple(ids)}]  # fmt: skip
    outputs = [one(engine, form) for form in forms]
    assert {o.prompt_token_ids for o in outputs} == {tuple(ids)}
    assert len({o.token_ids for o in outputs}) == 1
    assert all(isinstance(o, RequestOutput) and o.finished for o in outputs)


def test_a_list_keeps_its_order_and_may_have_its_own_params(engine: Engine) -> None:
    prompts: list[Any] = [ask(picture(1)), "The cat", {"prompt": "A system reads images"}, TextPrompt(prompt=TEXT)]
    limits = [3, 9, 1, 6]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in limits]
    together = engine.generate(prompts, params)
    assert [len(o.token_ids) for o in together] == limits
    alone = [engine.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert len({o.prompt_token_ids for o in together}) == 4
    assert len({o.request_id for o in together}) == 4


@pytest.mark.parametrize(
    ("prompts", "word"),
    [
        (None, "NoneType"), (42, "int"), ([], "non-empty"), (b"bytes", "bytes"), (object(), "object"),
        ({"promt": "x"}, "promt"), ({}, "exactly one"), ({"prompt": 3}, "int"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "exactly one"), (TextPrompt(), "exactly one"),
        ({"prompt": "x", "multi_modal_data": [1]}, "multi_modal_data"),
        ({"prompt": "x", "mm_processor_kwargs": {1: 2}}, "mm_processor_kwargs"),
        ([{"role": "user", "content": "x"}], "role"),
    ],
)  # fmt: skip
def test_prompts_of_wrong_kinds_are_refused_by_name(engine: Engine, prompts: Any, word: str) -> None:
    with pytest.raises(InvalidPromptError, match=word) as caught:
        engine.generate(prompts, GREEDY)
    check_message(caught.value)


def test_sampling_params_of_wrong_kinds_are_refused(engine: Engine) -> None:
    wrong: list[Any] = [{"max_tokens": 3}, 3, [GREEDY, {}], [GREEDY], {}, []]
    for params in wrong:
        with pytest.raises(InvalidParamsError) as caught:
            engine.generate([TEXT, "x"], params)
        check_message(caught.value)
    for params in ({"max_tokens": 3}, {}, GREEDY.model_dump(), 0):
        with pytest.raises(InvalidParamsError, match="SamplingParams") as caught:
            list(engine.stream(TEXT, params))
        check_message(caught.value)
    settle(engine)


def test_unknown_options_are_errors_that_name_them(engine: Engine, tiny_path: Path) -> None:
    for make in (SamplingParams, KvCacheConfig, lambda **o: Engine.from_pretrained(tiny_path, **o)):
        with pytest.raises(MMError, match="temprature") as caught:
            make(temprature=0.5)
        assert isinstance(caught.value, ConfigError | InvalidParamsError)
    with pytest.raises(TypeError, match="temprature"):
        engine.generate(TEXT, temprature=0.5)  # type: ignore[call-arg]


def test_batch_error_keeps_the_others_outputs(engine: Engine) -> None:
    prompts = ["The cat", TextPrompt(prompt_token_ids=[-1]), ask(picture(2)), ask(b"no picture")]
    with pytest.raises(BatchError, match="2 of 4") as caught:
        engine.generate(prompts, GREEDY)
    error = caught.value
    assert [o is None for o in error.outputs] == [False, True, False, True]
    assert {i: e.code for i, e in error.errors.items()} == {1: "invalid_prompt", 3: "unsupported_media"}
    for index in (0, 2):
        kept = error.outputs[index]
        assert kept is not None
        assert kept.token_ids == engine.generate(prompts[index], GREEDY)[0].token_ids
    settle(engine)


def test_chat_template_can_be_forced_and_forbidden(engine: Engine) -> None:
    plain = one(engine, "The cat")
    forced = engine.generate("The cat", GREEDY, apply_chat_template=True)[0]
    assert list(plain.prompt_token_ids) == ids_of(engine, "The cat")
    wanted = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + turn("The cat")
    assert list(forced.prompt_token_ids) == ids_of(engine, wanted)
    implied = engine.generate(TextPrompt(prompt="Describe", multi_modal_data={"image": picture(3)}), GREEDY)[0]
    given = engine.generate(ask(picture(3), "Describe"), GREEDY)[0]
    assert implied.prompt_token_ids[-len(given.prompt_token_ids) :] == given.prompt_token_ids
    with pytest.raises(MMError, match="placeholder") as caught:
        engine.generate(
            TextPrompt(prompt="Describe", multi_modal_data={"image": picture(3)}), GREEDY, apply_chat_template=False
        )
    assert caught.value.code == "media_placeholder_mismatch"


# -- what comes out --------------------------------------------------------------------------------


def test_n_answers(engine: Engine) -> None:
    warm = one(engine, n=3, temperature=1.0, seed=11)
    answers = [o.token_ids for o in warm.outputs]
    assert len(set(answers)) == 3, "three samples of one request are three streams"
    assert [o.index for o in warm.outputs] == [0, 1, 2]
    assert one(engine, n=3, temperature=1.0, seed=11).outputs == warm.outputs
    assert one(engine, temperature=1.0, seed=11).token_ids == answers[0]
    assert one(engine, n=3, temperature=1.0, seed=12).token_ids != answers[0]
    first = warm.outputs[0]
    assert (warm.text, warm.token_ids, warm.finish_reason) == (first.text, first.token_ids, first.finish_reason)
    assert warm.usage.completion_tokens == sum(map(len, answers))
    greedy = one(engine, n=3)
    assert len({o.token_ids for o in greedy.outputs}) == 1
    assert greedy.token_ids == one(engine).token_ids
    settle(engine)


def test_usage_counts_each_token_once(engine: Engine) -> None:
    prompt = ask(picture(4, 112, 84), "Describe this image. What is in the picture?")
    before = engine.stats()
    cold = engine.generate(prompt, GREEDY)[0]
    usage = cold.usage
    assert usage.prompt_tokens == len(cold.prompt_token_ids)
    assert usage.media_tokens == (112 // 28) * (84 // 28) == usage.encoded_media_tokens
    assert usage.completion_tokens == len(cold.token_ids)
    warm = engine.generate(prompt, GREEDY)[0]
    size = before["block_size"]
    assert warm.usage.cached_tokens == (len(cold.prompt_token_ids) - 1) // size * size > 0
    assert warm.usage.encoded_media_tokens == 0
    assert warm.usage.media_tokens == usage.media_tokens
    assert warm.token_ids == cold.token_ids
    after = engine.stats()
    assert after["prompt_tokens"] - before["prompt_tokens"] == 2 * usage.prompt_tokens
    assert after["encoder_calls"] - before["encoder_calls"] == 1
    assert after["cached_tokens"] - before["cached_tokens"] == usage.cached_tokens + warm.usage.cached_tokens


def test_stats_has_the_documented_keys(engine: Engine) -> None:
    one(engine)
    stats = engine.stats()
    assert {"steps", "prompt_tokens", "cached_tokens", "generated_tokens", "computed_tokens", "preemptions", "running",
            "waiting", "blocks", "block_size", "block_evictions", "encoder_calls", "encoder_cache",
            "processor_cache", "finished"} <= set(stats)  # fmt: skip
    assert set(stats["blocks"]) == {"free", "cached", "in_use", "pending", "pinned"}
    assert stats["running"] == stats["waiting"] == 0
    assert stats["steps"] > 0
    assert stats["generated_tokens"] > 0


def test_metrics_tell_when_it_happened(engine: Engine) -> None:
    before = time.perf_counter()
    outputs = engine.generate([ask(picture(8)), TEXT], LONG)
    after = time.perf_counter()
    for output in outputs:
        told = output.metrics
        assert told is not None
        assert told.prepared is not None
        assert told.first_token is not None
        assert told.last_token is not None
        assert before <= told.arrival <= told.prepared <= told.first_token < told.last_token <= after
        assert told.token_times is None
    *early, last = engine.stream(TEXT, LONG)
    assert len({o.metrics.last_token for o in [*early, last] if o.metrics}) == len(last.token_ids)
    assert replace(last, metrics=None) == last, "times are no part of an answer"
    with pytest.raises(ConfigError, match="record_timeline"):
        engine.timeline()


def test_timeline(tiny_path: Path) -> None:
    kv = KvCacheConfig(num_blocks=64)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, record_timeline=True, show_progress=False) as engine:
        (output,) = engine.generate(ask(picture(9)), SamplingParams(n=2, max_tokens=5, temperature=0, ignore_eos=True))
        told = output.metrics
        assert told is not None
        assert told.token_times is not None
        assert len(told.token_times) == 5
        assert told.token_times[0] == told.first_token
        assert told.last_token is not None
        assert told.token_times[-1] <= told.last_token, "the second answer may end later"
        assert list(told.token_times) == sorted(told.token_times)
        spans = engine.timeline()
        prepared = [s for s in spans if s.track == "preprocess 0"]
        assert all(s.args == {"request_id": output.request_id, "media": 1} for s in prepared)
        assert [s.args for s in spans if s.track == "preprocess 1"] == [{"part": "prepare"}]
        assert {s.name for s in spans if s.track.startswith("preprocess")} == {"preprocess"}
        assert told.prepared is not None
        assert told.arrival <= prepared[0].start_ns / 1e9
        assert prepared[-1].end_ns / 1e9 <= told.prepared
        assert engine.timeline() == [], "taken once"


# -- sampling --------------------------------------------------------------------------------------


def test_max_tokens_and_max_tokens_none(engine: Engine) -> None:
    assert len(one(engine, max_tokens=5, ignore_eos=True).token_ids) == 5
    assert one(engine, max_tokens=5, ignore_eos=True).finish_reason == "length"
    limit = engine._frontend.max_model_len
    ids = [5 + i % 200 for i in range(limit - 20)]
    output = one(engine, TextPrompt(prompt_token_ids=ids), max_tokens=None, ignore_eos=True)
    assert (len(output.token_ids), output.finish_reason) == (20, "length"), "as far as the context goes"
    settle(engine)


def test_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    full = engine.generate(TEXT, LONG)[0]
    at = len(full.text) // 2
    stop = full.text[at : at + 4]
    place = full.text.find(stop)
    cut = one(engine, max_tokens=32, ignore_eos=True, stop=[stop, "not in it"])
    assert 0 < place <= at
    assert cut.text == full.text[:place]
    assert (cut.finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < len(full.token_ids)
    assert cut.usage.completion_tokens == len(cut.token_ids)
    kept = one(engine, max_tokens=32, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept.text == full.text[: place + len(stop)]
    settle(engine)


def test_stop_ids_and_min_tokens(engine: Engine) -> None:
    full = engine.generate(TEXT, LONG)[0].token_ids
    token = full[6]
    place = full.index(token)
    cut = one(engine, max_tokens=32, ignore_eos=True, stop_token_ids=[token])
    assert cut.token_ids == full[: place + 1]
    assert (cut.finish_reason, cut.outputs[0].stop_reason) == ("stop", token)
    later = one(engine, max_tokens=32, ignore_eos=True, stop_token_ids=[token], min_tokens=place + 3)
    assert token not in later.token_ids[: place + 3]
    assert len(later.token_ids) > place + 3


def test_eos_ends_unless_ignored_or_too_early(engine: Engine) -> None:
    eos = engine._frontend.model.processor.tokenizer.eos_token_id
    push = {"logit_bias": {eos: 100.0}}
    assert one(engine, **push).token_ids == (eos,)
    assert one(engine, **push).finish_reason == "stop"
    assert one(engine, **push).text == ""
    assert one(engine, **push, ignore_eos=True, max_tokens=6).token_ids == (eos,) * 6
    late = one(engine, **push, min_tokens=4)
    assert len(late.token_ids) == 5
    assert late.token_ids.index(eos) == 4


def test_logit_bias_forces_and_bans(engine: Engine) -> None:
    assert one(engine, temperature=1.0, seed=1, logit_bias={77: 100.0}).token_ids == (77,) * 16
    best = one(engine, max_tokens=1).token_ids[0]
    assert one(engine, max_tokens=1, logit_bias={best: -100.0}).token_ids[0] != best
    assert one(engine, max_tokens=1, logit_bias={str(best): -100.0}).token_ids[0] != best, "JSON has only str keys"


def test_seed_means_the_same_alone_and_in_a_mixed_batch(engine: Engine) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=1234, ignore_eos=True)
    alone = engine.generate(TEXT, params)[0].token_ids
    others = [ask(picture(i)) for i in (5, 6)] + ["The cat sleeps in", "Describe"]
    noise = SamplingParams(max_tokens=30, temperature=1.3, top_k=50, ignore_eos=True)
    steps = engine.stats()["steps"]
    mixed = engine.generate([*others[:2], TEXT, *others[2:]], [noise, GREEDY, params, noise, LONG])
    assert engine.stats()["steps"] - steps < 24 + 30, "the requests did not share steps"
    assert mixed[2].token_ids == alone
    assert engine.generate(TEXT, params.model_copy(update={"seed": 1235}))[0].token_ids != alone
    unseeded = params.model_copy(update={"seed": None})
    assert len({engine.generate(TEXT, unseeded)[0].token_ids for _ in range(3)}) == 3


def test_logprobs(engine: Engine) -> None:
    output = one(engine, logprobs=3, ignore_eos=True)
    found = output.logprobs
    assert found is not None
    assert len(found) == len(output.token_ids) == 16
    for token, entry in zip(output.token_ids, found, strict=True):
        assert len(entry) == 3
        assert entry[token].rank == 1, "greedy takes the best token"
        assert sorted(e.rank for e in entry.values()) == [1, 2, 3]
        assert entry[token].logprob == max(e.logprob for e in entry.values()) <= 0
        assert all(e.decoded_token for e in entry.values())
    total = sum(e[t].logprob for t, e in zip(output.token_ids, found, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    assert one(engine).logprobs is None
    chosen = one(engine, temperature=1.5, seed=3, logprobs=0)
    assert chosen.logprobs is not None
    assert [list(e) for e in chosen.logprobs] == [[t] for t in chosen.token_ids]
    assert max(e[t].rank for t, e in zip(chosen.token_ids, chosen.logprobs, strict=True)) > 1


def test_prompt_may_be_media_alone(engine: Engine) -> None:
    output = one(engine, TextPrompt(prompt="", multi_modal_data={"image": picture(7)}))
    assert output.usage.media_tokens == 12
    assert one(engine, TextPrompt(prompt=IMAGE, multi_modal_data={"image": picture(7)})).usage.media_tokens == 12


def test_far_too_many_ids_are_counted_not_read(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="3000000 tokens"):
        engine.generate({"prompt_token_ids": [-1] * 3_000_000}, GREEDY)
    settle(engine)
