"""Reuse, chunking, batching and preemption change speed, never tokens (fp32, greedy).

Every test asserts first that the path it is about was taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pictures import frames, picture
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def prompts() -> list[TextPrompt]:
    """Texts, pictures and a video; several share a picture or a beginning."""
    cat, dog, clip = picture(1, 150, 100), picture(2, 90, 120), {"frames": frames(3, 4), "fps": 2.0}
    return [
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}Describe this image.", multi_modal_data={"image": cat}),
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}What is in the picture?", multi_modal_data={"image": cat}),
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}{IMAGE}Both?", multi_modal_data={"image": [cat, dog]}),
        TextPrompt(prompt=f"Sleeps in the{IMAGE} sun", multi_modal_data={"image": dog}),
        TextPrompt(prompt=f"{VIDEO}What is there to see", multi_modal_data={"video": clip}),
        TextPrompt(prompt="The quick brown fox jumps over the lazy dog while the cat sleeps"),
        TextPrompt(prompt="The quick brown fox jumps over the lazy dog while the system asks"),
    ]


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [o.token_ids for o in outputs]


@pytest.fixture(scope="module", params=["2", "2.5"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"), version=request.param)


@pytest.fixture(scope="module")
def alone(path: Path) -> list[tuple[int, ...]]:
    """Each prompt alone, without reuse, unchunked, on a fresh engine: what all others must equal."""
    with start(path, enable_block_reuse=False) as engine:
        outputs = [engine.generate(p, GREEDY)[0] for p in prompts()]
        stats = engine.stats()
    assert stats["cached_tokens"] == stats["partial_prefills"] == stats["preemptions"] == 0
    assert len(set(tokens(outputs))) == len(outputs)
    return tokens(outputs)


def start(path: Path, num_blocks: int = 512, *, enable_block_reuse: bool = True, **options: Any) -> Engine:
    kv = KvCacheConfig(num_blocks=num_blocks, enable_block_reuse=enable_block_reuse)
    return Engine.from_pretrained(path, kv_cache_config=kv, show_progress=False, **options)


Begin = Callable[..., Engine]


@pytest.fixture(params=[False, True], ids=["synchronous", "overlapped"])
def begin(request: pytest.FixtureRequest) -> Begin:
    """`start`, with steps taken in before the next one is scheduled, and after."""
    return functools.partial(start, overlap=request.param)


def check_idle(engine: Engine) -> None:
    engine.wait_idle()
    stats = engine.stats()
    blocks = stats["blocks"]
    assert blocks["in_use"] == blocks["pending"] == 0
    assert stats["running"] == stats["waiting"] == 0
    engine._frontend._core.scheduler.check_integrity()


def test_a_step_is_launched_before_the_one_before_it_is_taken_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the overlapped runs below are about: without this they would prove nothing."""
    for overlap in (False, True):
        with start(path, overlap=overlap) as engine:
            core = engine._frontend._core
            launch, seen = core.runner.launch, []

            def spy(batch: Any, launch: Any = launch, core: Any = core, seen: list[Any] = seen) -> Any:
                known = [len(s.seq.token_ids) for s in batch.sequences]
                ends = [s.start + s.length for s in batch.sequences]
                seen.append((core.stats()["steps_in_flight"], max(e - k for e, k in zip(ends, known, strict=True))))
                return launch(batch)

            monkeypatch.setattr(core.runner, "launch", spy)
            engine.generate("The quick brown", GREEDY)
            assert len(seen) == 24, "a step was wasted on an answer whose length was known"
            assert seen == ([(0, 0)] + [(1, 1)] * 23 if overlap else [(0, 0)] * 24)


def test_batched(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    with begin(path, enable_block_reuse=False) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        assert engine.stats()["steps"] < 3 * 24  # seven requests of 24 tokens shared steps
        assert tokens(outputs) == alone
        check_idle(engine)


def test_reused(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    with begin(path) as engine:
        engine.generate(prompts(), GREEDY)
        calls = engine.stats()["encoder_calls"]
        outputs = [engine.generate(p, GREEDY)[0] for p in prompts()]
        assert all(o.usage.cached_tokens >= 16 for o in outputs if len(o.prompt_token_ids) > 16)
        assert engine.stats()["encoder_calls"] == calls
        assert tokens(outputs) == alone
        check_idle(engine)


def test_encoder_hit_without_prefix_hit(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    with begin(path, enable_block_reuse=False) as engine:
        engine.generate(prompts(), GREEDY)
        encoded = engine.stats()["encoded_items"]
        assert encoded == 3
        outputs = [engine.generate(p, GREEDY)[0] for p in prompts()]
        assert engine.stats()["encoded_items"] == encoded
        assert tokens(outputs) == alone


def test_prefix_hit_within_a_picture_after_its_rows_were_evicted(
    begin: Begin, path: Path, alone: list[tuple[int, ...]]
) -> None:
    """A prefix hit may end inside a picture: its rows are encoded again for the rest."""
    with begin(path, encoder_cache_tokens=40) as engine:
        engine.generate(prompts()[0], GREEDY)
        engine.generate(prompts()[4], GREEDY)  # evicts the picture
        (output,) = engine.generate(prompts()[2], GREEDY)
        assert output.usage.cached_tokens > 0
        assert output.token_ids == alone[2]
        check_idle(engine)


@pytest.mark.parametrize("budget", [5, 17])
def test_chunked(begin: Begin, path: Path, alone: list[tuple[int, ...]], budget: int) -> None:
    with begin(path, max_num_batched_tokens=budget) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        assert engine.stats()["partial_prefills"] > 5
        assert tokens(outputs) == alone
        check_idle(engine)


def test_small_encoder_budget(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    with begin(path, encoder_budget=1) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        assert engine.stats()["encoder_calls"] == engine.stats()["encoded_items"] >= 3
        assert tokens(outputs) == alone


def test_encoded_ahead(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    """One sequence runs at a time; the next ones' pictures are encoded beside it."""
    with begin(path, max_num_seqs=1, max_num_batched_tokens=17, preprocess_threads=1) as engine:
        outputs = engine.generate(prompts(), GREEDY)
        stats = engine.stats()
        assert stats["encoded_ahead"] > 0
        assert stats["encoded_items"] == 3
        assert tokens(outputs) == alone
        check_idle(engine)


def expect_no_answers(engine: Engine) -> None:
    """Let admission count on no output, so that sequences are preempted where the cache is small."""
    engine._frontend._core.scheduler.outlook.wants = lambda _: (1, 1)  # type: ignore[method-assign]


@pytest.mark.parametrize("reuse", [True, False])
def test_preempted(begin: Begin, path: Path, alone: list[tuple[int, ...]], reuse: bool) -> None:
    """Room for about two of seven at a time: sequences are preempted and computed again."""
    longest = max(len(a) for a in alone)
    assert longest == 24
    with begin(path, num_blocks=8, enable_block_reuse=reuse, max_num_batched_tokens=64) as engine:
        expect_no_answers(engine)
        for _ in range(8):  # whether so many meet depends on when each picture is ready
            outputs = engine.generate(prompts(), GREEDY)
            assert tokens(outputs) == alone
            check_idle(engine)
            if engine.stats()["preemptions"]:
                break
        assert engine.stats()["preemptions"] > 0


def test_identical_requests_in_flight_are_computed_once(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    with begin(path, preprocess_threads=1) as engine:
        outputs = engine.generate([prompts()[0]] * 6, GREEDY)
        stats = engine.stats()
        assert stats["encoded_items"] == 1
        assert stats["cached_tokens"] >= 5 * 16
        assert tokens(outputs) == [alone[0]] * 6


def test_answers_that_end_by_a_token_end_there(begin: Begin, path: Path, alone: list[tuple[int, ...]]) -> None:
    """With overlap the end is noticed when the next token is computed already: that one is dropped."""
    ends = [3 + i for i in range(len(alone))]
    params = [
        SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop_token_ids=(answer[end],))
        for answer, end in zip(alone, ends, strict=True)
    ]
    wanted = [answer[: answer.index(answer[end]) + 1] for answer, end in zip(alone, ends, strict=True)]
    with begin(path, max_num_batched_tokens=40) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts(), params)
            assert tokens(outputs) == wanted
            assert {o.finish_reason for o in outputs} == {"stop"}
            check_idle(engine)


def test_sampling_is_the_same_alone_and_in_a_crowd(begin: Begin, path: Path) -> None:
    params = [SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=i, ignore_eos=True) for i in range(7)]
    with start(path, enable_block_reuse=False) as engine:
        single = [engine.generate(p, s)[0] for p, s in zip(prompts(), params, strict=True)]
    with begin(path, max_num_batched_tokens=40) as engine:
        together = engine.generate(prompts(), params)
        assert engine.stats()["partial_prefills"] > 0
    assert tokens(together) == tokens(single)
    assert len(set(tokens(single))) == 7


@pytest.fixture
def tight(begin: Begin, path: Path) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def make() -> Engine:
        engines.append(begin(path, num_blocks=10, max_num_batched_tokens=32, max_num_seqs=4))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_everything_at_once(tight: Callable[[], Engine], alone: list[tuple[int, ...]]) -> None:
    """Reuse, chunks and preemption together, three rounds, with the books checked at the end."""
    engine = tight()
    for _ in range(3):
        expect_no_answers(engine)
        assert tokens(engine.generate(prompts(), GREEDY)) == alone
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["partial_prefills"] > 0
    assert stats["cached_tokens"] > 0
    check_idle(engine)


def test_penalties_read_the_answer_so_far(begin: Begin, path: Path) -> None:
    """A bias that repeats one token for ever, until a penalty sees what was said."""
    biased = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logit_bias={5: 20.0})
    penalised = biased.model_copy(update={"repetition_penalty": 10.0})
    with begin(path) as engine:
        plain, varied = engine.generate(["The quick brown fox"] * 2, [biased, penalised])
    with start(path) as engine:  # steps taken in one by one
        assert [o.token_ids for o in engine.generate(["The quick brown fox"] * 2, [biased, penalised])] == [
            plain.token_ids,
            varied.token_ids,
        ]
    assert set(plain.token_ids) == {5}
    assert varied.token_ids[0] == 5
    assert len(set(varied.token_ids)) > 2
