"""Faults stay where they arise, memory comes back, and long clips in earlier turns reuse nothing wrongly."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import frames, picture
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, MMError, RequestOutput, SamplingParams, TextPrompt
from mm_core.engine import frontend as frontend_module
from mm_core.errors import BatchError, EngineError, MediaNotCachedError, PluginError, RequestAbortedError

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["2", "2.5"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"), version=request.param)


def start(path: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=512), show_progress=False, **options)


@pytest.fixture(params=[False, True], ids=["synchronous", "overlapped"])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with start(path, preprocess_threads=1, overlap=request.param) as made:
        yield made


def ids_of(engine: Engine, text: str) -> list[int]:
    return list(engine._frontend.model.processor.tokenizer(text)["input_ids"])


def test_a_second_turn_after_a_long_clip(path: Path, engine: Engine) -> None:
    """Answers to a clip that is longer than its picture is wide stand at other positions than the same
    tokens in the next turn's prompt: blocks of the one must not serve the other."""
    clip = {"frames": frames(1, 40, 56, 56), "fps": 2.0}
    first = TextPrompt(prompt=f"{VIDEO}What is there to see", multi_modal_data={"video": clip})
    (answer,) = engine.generate(first, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    question = [*ids_of(engine, f"{VIDEO}What is there to see"), *answer.token_ids, *ids_of(engine, " and then?")]
    second = TextPrompt(prompt_token_ids=question, multi_modal_data={"video": clip})
    (warm,) = engine.generate(second, GREEDY)
    assert warm.usage.cached_tokens > 0
    with start(path) as fresh:
        (cold,) = fresh.generate(second, GREEDY)
    assert cold.usage.cached_tokens == 0
    assert warm.token_ids == cold.token_ids


def test_a_second_turn_after_a_picture_reuses_the_answer(engine: Engine, path: Path) -> None:
    text = f"<|im_start|>user\n{IMAGE}Describe this image."
    first = TextPrompt(prompt=text, multi_modal_data={"image": picture(2, 120, 90)})
    (answer,) = engine.generate(first, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    ids = [*ids_of(engine, text), *answer.token_ids, *ids_of(engine, " and then?")]
    second = TextPrompt(prompt_token_ids=ids, multi_modal_data={"image": picture(2, 120, 90)})
    (warm,) = engine.generate(second, GREEDY)
    assert warm.usage.cached_tokens > len(answer.prompt_token_ids)
    with start(path) as fresh:
        assert fresh.generate(second, GREEDY)[0].token_ids == warm.token_ids


def test_a_plugin_that_exits_fails_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(3)

    with monkeypatch.context() as patch:
        patch.setattr(engine._frontend.model.processor, "prepare", leave)
        with pytest.raises(PluginError, match="prepare"):
            engine.generate(TextPrompt(prompt=IMAGE, multi_modal_data={"image": picture(3)}))
    assert len(engine.generate("The quick brown", GREEDY)[0].token_ids) == 24


def test_a_step_that_fails_ends_only_those_at_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ["The quick brown fox", "A system reads images"]
    wanted = [o.token_ids for o in engine.generate(good, GREEDY)]
    poison = ids_of(engine, "lazy dog lazy dog")
    runner = engine._frontend._core.runner
    launch = runner.launch

    def failing(batch: Any) -> Any:
        if any(list(s.seq.request.token_ids) == poison for s in batch.sequences):
            raise SystemExit(4)
        return launch(batch)

    monkeypatch.setattr(runner, "launch", failing)
    results: dict[int, RequestOutput | MMError] = {}
    done = threading.Event()

    def listener(index: int) -> Any:
        def take(result: RequestOutput | MMError) -> None:
            results[index] = result
            if len(results) == 3:
                done.set()

        return take

    for index, prompt in enumerate([*good, TextPrompt(prompt_token_ids=poison)]):
        engine._frontend.add(prompt, GREEDY, listener(index))
    assert done.wait(30)
    assert isinstance(results[2], EngineError)
    assert [results[i].token_ids for i in (0, 1)] == wanted  # type: ignore[union-attr]
    engine.wait_idle()
    assert engine.stats()["blocks"]["in_use"] == 0


def test_an_encoder_that_fails_ends_only_those_with_the_item(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (TextPrompt(prompt=IMAGE, multi_modal_data={"image": picture(i, 90, 90)}) for i in (20, 21))
    (wanted,) = engine.generate(good, GREEDY)
    engine.clear_cache()
    poison = None
    rows = engine._frontend._core.runner.rows
    encoder = rows._encoder
    prepare = engine._frontend.model.processor.prepare

    def noted(item: Any, *args: Any) -> Any:
        nonlocal poison
        feature = prepare(item, *args)
        if item.data.tobytes() == picture(21, 90, 90).tobytes():
            poison = feature.tensors
        return feature

    class Broken:
        hidden_size, cost = encoder.hidden_size, staticmethod(encoder.cost)

        def __call__(self, features: Any) -> Any:
            if any(f.tensors is poison for f in features):
                raise ValueError("a picture it cannot take")
            return encoder(features)

    with monkeypatch.context() as patch:
        patch.setattr(engine._frontend.model.processor, "prepare", noted)
        patch.setattr(rows, "_encoder", Broken())
        with pytest.raises(BatchError) as caught:
            engine.generate([good, bad, good, bad], GREEDY)
        assert poison is not None
    assert [o and o.token_ids for o in caught.value.outputs] == [wanted.token_ids, None, wanted.token_ids, None]
    assert isinstance(caught.value.errors[1], PluginError)
    engine.wait_idle()
    assert engine.stats()["blocks"]["in_use"] == 0
    assert engine.generate(bad, GREEDY)[0].finish_reason == "length"


def test_a_lost_device_stops_the_engine_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(path, overlap=True) as engine:
        engine.generate("The quick brown fox", GREEDY)
        runner, steps = engine._frontend._core.runner, []
        launch = runner.launch

        def broken(batch: Any) -> Any:
            steps.append(batch)
            if len(steps) == 3:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            return launch(batch)

        monkeypatch.setattr(runner, "launch", broken)
        for _ in range(2):
            with pytest.raises(EngineError, match="make a new one"):
                engine.generate("The quick brown fox", GREEDY)
        assert len(steps) == 3, "nothing runs on a lost device"


def test_a_listener_that_raises_costs_nobody_else_a_token(engine: Engine) -> None:
    (wanted,) = engine.generate("A system reads images", GREEDY)

    def broken(_: RequestOutput | MMError) -> None:
        raise ValueError("not mine to handle")

    got: list[RequestOutput | MMError] = []
    done = threading.Event()
    engine._frontend.add("The quick brown fox", GREEDY, broken, stream=True)
    engine._frontend.add("A system reads images", GREEDY, lambda r: (got.append(r), done.set()))
    assert done.wait(30)
    assert isinstance(got[0], RequestOutput)
    assert got[0].token_ids == wanted.token_ids


def test_a_uuid_stands_for_the_frames_its_settings_picked(engine: Engine) -> None:
    data = {"video": {"frames": frames(4, 16), "fps": 8.0}}
    kwargs = {"fps": 2.0}
    named = {"video": ["clip"]}
    engine.generate(
        TextPrompt(prompt=VIDEO, multi_modal_data=data, multi_modal_uuids=named, mm_processor_kwargs=kwargs), GREEDY
    )
    alone = {"video": [None]}
    (again,) = engine.generate(
        TextPrompt(prompt=VIDEO, multi_modal_data=alone, multi_modal_uuids=named, mm_processor_kwargs=kwargs), GREEDY
    )
    assert again.usage.media_tokens > 0
    with pytest.raises(MediaNotCachedError):
        engine.generate(TextPrompt(prompt=VIDEO, multi_modal_data=alone, multi_modal_uuids=named), GREEDY)


def test_only_so_many_requests_hold_prepared_media(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(path, max_num_seqs=2) as engine:
        frontend, most = engine._frontend, 0
        submit = frontend.pipeline.submit

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal most
            most = max(most, sum(live.ask is None for live in frontend._live.values()))
            return submit(*args, **options)

        monkeypatch.setattr(frontend.pipeline, "submit", counted)
        prompts = [TextPrompt(prompt=IMAGE, multi_modal_data={"image": picture(i, 60, 60)}) for i in range(20)]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=2, temperature=0))
        assert len(outputs) == 20
        assert most == 4
        assert frontend._room == 4


def test_close_gives_the_memory_back(path: Path) -> None:
    engine = start(path)
    engine.generate("The quick brown fox", GREEDY)
    kv = weakref.ref(engine._frontend._core.runner.kv.caches["self"][0][0])
    weight = weakref.ref(next(engine._frontend.model.decoder.parameters()))
    engine.close()
    gc.collect()
    assert kv() is None
    assert weight() is None


def test_an_unusable_device_is_named(path: Path) -> None:
    for device in ("tpu", "nonsense", "cuda:99"):
        with pytest.raises(MMError, match="device="):
            start(path, device=device)


def test_a_start_that_fails_late_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = frontend_module.build_core

    def build(*args: Any) -> Any:
        made.append(weakref.ref(args[0].decoder))
        return real(*args)

    def fail(*args: Any) -> Any:
        raise KeyError("of a plugin")

    monkeypatch.setattr(frontend_module, "build_core", build)
    monkeypatch.setattr(frontend_module, "build_pipeline", fail)
    threads = threading.active_count()
    with pytest.raises(KeyError):
        start(path)
    gc.collect()
    assert threading.active_count() == threads
    assert made[0]() is None


def test_aborts_do_not_let_more_preparations_begin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(path, max_num_seqs=2, preprocess_threads=1) as engine:
        frontend, go, ended, begun = engine._frontend, threading.Event(), [], []
        prepare, submit = frontend.model.processor.prepare, frontend.pipeline.submit
        monkeypatch.setattr(frontend.model.processor, "prepare", lambda *a: (go.wait(20), prepare(*a))[1])
        monkeypatch.setattr(frontend.pipeline, "submit", lambda *a, **o: (begun.append(a[0]), submit(*a, **o))[1])
        for i in range(40):
            prompt = TextPrompt(prompt=IMAGE, multi_modal_data={"image": picture(i, 60, 60)})
            request = frontend.add(prompt, GREEDY, ended.append)
            while i < 4 and not frontend._live[request].preparing.running():  # type: ignore[union-attr]
                threading.Event().wait(0.001)
            frontend.abort(request)
        assert len(ended) == 40
        assert all(isinstance(error, RequestAbortedError) for error in ended)
        assert len(begun) == 4
        go.set()
        assert engine.generate("The quick brown fox", GREEDY)[0].finished
        while frontend._room < 4:
            threading.Event().wait(0.001)
        assert frontend._room == 4
