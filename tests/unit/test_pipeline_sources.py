"""Requests of families whose decoder attends to media or to a text encoder, and of those that read instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from support.fake_model import make_scheduler
from support.stub_plugin import PAD, TOKENIZER, VOCAB, StubFusion, StubProcessor, ask, picture, run

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.output import RequestText
from mm_core.errors import ContextLengthError, InvalidParamsError, InvalidPromptError, PluginError, TooManyMediaError
from mm_core.hookspecs import SamplingDefaults
from mm_core.inputs import InputPipeline
from mm_core.scheduler import Sequence as SequenceState
from mm_core.types import MediaFeature, MediaItem, Source, TextPrompt, Usage

Make = Callable[..., InputPipeline]

SPECIAL = TOKENIZER.convert_tokens_to_ids("<|im_start|>")


class Unplaced(StubProcessor):
    """Items have no place in the prompt; a begin of its own makes a prompt complete."""

    def placeholder(self, modality: str) -> None:
        return None

    def placeholder_id(self, modality: str) -> None:
        return None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "<|im_start|>" + "".join(p.get("text", "") for m in messages for p in m["content"])

    def accepts_verbatim(self, prompt: str, counts: Mapping[str, int]) -> bool:
        return prompt.startswith("<|im_start|>")

    def expand(self, feature: MediaFeature) -> tuple[list[int], list[bool]]:
        return [], []


class Attending(StubFusion):
    kind = "cross_attention"


class TextEncoder(StubFusion):
    kind = "encoder_decoder"
    decoder_prompt = (5, 6)


class Asking(StubFusion):
    """Reads what is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def instruction(self, text: str) -> list[int]:
        self.asked.append(text)
        return [ord(c) for c in text]


class AskingEncoder(Asking):
    kind = "encoder_decoder"
    decoder_prompt = (5,)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[InputPipeline] = []

    def build(fusion: Any, processor: Any = None, max_model_len: int = 200, **config: Any) -> InputPipeline:
        settings = EngineConfig(**{"preprocess_threads": 2, **config})
        made.append(
            InputPipeline(processor or StubProcessor(), fusion, "stub", b"id", settings, VOCAB, max_model_len, (3,))
        )
        return made[-1]

    yield build
    for pipeline in made:
        pipeline.close()


def source_of(pipeline: InputPipeline, prompt: Any) -> Source:
    source = run(pipeline, prompt).source
    assert source is not None
    return source


# -- cross-attention ---------------------------------------------------------------------------------


def test_the_decoder_attends_to_media(make: Make) -> None:
    request = run(make(Attending(), Unplaced()), ask([picture(0), picture(1, 40)]))
    source = request.source
    assert source is not None
    assert request.token_ids == (SPECIAL, *TOKENIZER("hello")["input_ids"])
    assert request.user_token_ids == request.token_ids
    assert (request.ranges, request.media) == ((), source.ranges)
    assert (source.num_tokens, source.token_ids) == (6, ())
    assert [(r.offset, r.length, r.feature.num_tokens) for r in source.ranges] == [(0, 0, 2), (0, 0, 4)]
    assert request.kv_context == source.key


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}], {"prompt_token_ids": [9]}])
def test_without_media_there_is_nothing_to_attend_to(make: Make, prompt: Any) -> None:
    with pytest.raises(InvalidPromptError, match="needs image") as caught:
        run(make(Attending(), Unplaced()), prompt)
    assert caught.value.param == "multi_modal_data"


def test_an_empty_prompt_becomes_a_turn(make: Make) -> None:
    pipeline = make(Attending(), Unplaced())
    assert run(pipeline, replace(ask(picture()), prompt="")).token_ids == (SPECIAL,)
    whole = replace(ask(picture()), prompt="<|im_start|>hello")
    assert run(pipeline, whole).token_ids == run(pipeline, ask(picture())).token_ids
    with pytest.raises(InvalidPromptError, match="empty"):
        run(pipeline, replace(ask(picture()), prompt=""), apply_chat_template=False)


def test_ids_are_used_as_they_are(make: Make) -> None:
    pipeline = make(Attending(), Unplaced())
    prompt = TextPrompt(prompt_token_ids=[9, 10], multi_modal_data={"image": picture()})
    assert run(pipeline, prompt).token_ids == (9, 10)


def test_special_tokens_around_a_raw_prompt_can_be_left_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make(StubFusion())
    given: list[bool] = []
    real = pipeline._renderer._tokenize

    def tokenize(backend: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
        given.append(add_special_tokens)
        return real(backend, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(pipeline._renderer, "_tokenize", tokenize)
    run(pipeline, "hello")
    pipeline.processor.add_special_tokens = False  # type: ignore[attr-defined]
    run(pipeline, "hello")
    assert given == [True, False]


def test_expansions_must_fit_the_fusion(make: Make) -> None:
    with pytest.raises(PluginError, match="'cross_attention'"):
        run(make(Attending()), ask(picture()))
    with pytest.raises(PluginError, match="'embed'"):
        run(make(StubFusion(), Unplaced()), ask(picture()))


# -- a text encoder ----------------------------------------------------------------------------------


def test_a_text_encoder_reads_prompt_and_media(make: Make) -> None:
    request = run(make(TextEncoder()), ask([picture(0), picture(1, 40)]))
    plain = run(make(StubFusion()), ask([picture(0), picture(1, 40)]))
    source = request.source
    assert source is not None
    assert request.token_ids == (5, 6)
    assert source.token_ids == request.user_token_ids == plain.token_ids
    assert source.num_tokens == len(plain.token_ids)
    assert [(r.offset, r.length) for r in source.ranges] == [(0, 2), (2, 4)]
    assert request.ranges == ()
    shown = RequestText(request, TOKENIZER, lambda text, ids: text).output(Usage())
    assert shown.prompt_token_ids == plain.token_ids


def test_text_alone_is_a_source_as_well(make: Make) -> None:
    source = source_of(make(TextEncoder()), "hello")
    assert (source.token_ids, source.ranges) == (tuple(TOKENIZER("hello")["input_ids"]), ())


def test_sources_fit_the_context(make: Make) -> None:
    used = source_of(make(TextEncoder()), ask(picture())).num_tokens
    assert source_of(make(TextEncoder(), max_model_len=used + 1), ask(picture()))
    with pytest.raises(ContextLengthError, match=f"{used} tokens"):
        run(make(TextEncoder(), max_model_len=used), ask(picture()))


@pytest.mark.parametrize("begin", [(), (VOCAB,), (-1,)])
def test_a_decoder_begins_with_something(make: Make, begin: tuple[int, ...]) -> None:
    fusion = TextEncoder()
    fusion.decoder_prompt = begin
    with pytest.raises(PluginError, match="decoder_prompt"):
        make(fusion)


# -- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "processor"), [(Attending, Unplaced), (TextEncoder, StubProcessor)])
def test_everything_that_is_read_enters_the_key(make: Make, fusion: Any, processor: Any) -> None:
    pipeline = make(fusion(), processor())
    one, two = picture(0), picture(1)
    prompts = [
        ask([one]), ask([two]), ask([one, two]), ask([two, one]), ask([one, one]), ask([one], cache_salt="a"),
        ask([one], cache_salt="b"), ask([one], mm_processor_kwargs={"size": 3}), ask([one], ["name"]),
    ]  # fmt: skip
    keys = [source_of(pipeline, p).key for p in prompts]
    assert len(set(keys)) == len(keys)
    assert [source_of(pipeline, p).key for p in prompts[:5]] == keys[:5]
    other = replace(ask([one]), prompt="goodbye")
    same = source_of(pipeline, other).key == keys[0]
    assert same is (fusion is Attending), "what the decoder alone reads is no part of its source"


def test_blocks_of_the_prompt_depend_on_the_source(make: Make) -> None:
    pipeline = make(Attending(), Unplaced())
    pool_of = make_scheduler(num_blocks=64, block_size=pipeline._block_size)
    long = "<|im_start|>" + "hello " * 40
    requests = [run(pipeline, replace(ask(picture(i)), prompt=long)) for i in range(2)]
    assert len(requests[0].block_keys) > 1
    assert not set(requests[0].block_keys) & set(requests[1].block_keys)
    for request in requests:  # those that the scheduler would compute itself
        bare = SequenceState(1, replace(request, block_keys=(), block_size=0))
        found = bare.fill_contents(len(request.block_keys), pipeline._block_size, pool_of.reuse._hasher)
        assert tuple(content.key for content in found) == request.block_keys


# -- instructions ------------------------------------------------------------------------------------


def test_what_is_asked_reaches_the_fusion(make: Make) -> None:
    fusion = Asking()
    pipeline = make(fusion)
    placed = f"{TOKENIZER.decode([PAD])}hello"
    request = run(pipeline, ask(picture()))
    assert request.instruction == tuple(ord(c) for c in "hello")
    run(pipeline, replace(ask(picture()), prompt=placed))
    run(pipeline, TextPrompt(prompt_token_ids=TOKENIZER(placed)["input_ids"], multi_modal_data={"image": picture()}))
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "hello"}]
    run(pipeline, [{"role": "user", "content": parts}])
    assert fusion.asked == ["hello"] * 4


def test_text_alone_has_no_instruction(make: Make) -> None:
    fusion = Asking()
    request = run(make(fusion), "hello")
    assert (request.instruction, request.kv_context, fusion.asked) == ((), b"", [])


def test_instructions_enter_the_keys(make: Make) -> None:
    def block_keys(fusion: Any, text: str) -> tuple[bytes, ...]:
        asked = replace(ask(picture(0, 600)), prompt=text)
        return run(make(fusion, processor=StubProcessor()), asked).block_keys[:3]

    assert block_keys(StubFusion(), "hello") == block_keys(StubFusion(), "goodbye")  # the picture comes first
    assert block_keys(Asking(), "hello") == block_keys(Asking(), "hello")
    assert not set(block_keys(Asking(), "hello")) & set(block_keys(Asking(), "goodbye"))


def test_instructions_enter_the_sources_key(make: Make) -> None:
    pipeline, plain = make(AskingEncoder()), make(TextEncoder())
    assert source_of(pipeline, ask(picture())).key != source_of(plain, ask(picture())).key


def test_a_fusions_fault_names_the_plugin(make: Make) -> None:
    fusion = Asking()
    fusion.instruction = lambda text: [1 / 0]  # type: ignore[assignment, method-assign, misc, return-value]
    with pytest.raises(PluginError, match=r"'stub' failed in instruction\(\) with ZeroDivisionError"):
        run(make(fusion), ask(picture()))


# -- what a family adds ------------------------------------------------------------------------------


def test_a_family_may_take_few_items(make: Make) -> None:
    processor = StubProcessor()
    processor.limits = {"image": 1}  # type: ignore[attr-defined]
    pipeline = make(StubFusion(), processor, limit_mm_per_prompt={"image": 5})
    assert run(pipeline, ask(picture())).ranges
    with pytest.raises(TooManyMediaError, match="takes 1 a request"):
        run(pipeline, ask([picture(0), picture(1)]))
    assert not processor.prepared[1:]


@dataclass(frozen=True)
class Named:
    name: str

    def __call__(self, logits: Any, rows: Any) -> Any:
        return logits


def test_a_familys_logits_processors_come_first(make: Make) -> None:
    processor = StubProcessor()
    processor.default_sampling = lambda: SamplingDefaults((7,), (Named("own"),))  # type: ignore[method-assign]
    params = SamplingParams(logits_processors=(Named("asked"),), max_tokens=3)
    request = make(StubFusion(), processor).submit("r", "hello", params).result(10)
    assert request.params.logits_processors == (Named("own"), Named("asked"))
    assert request.params.max_tokens == 3
    assert params.logits_processors == (Named("asked"),)
    assert request.stop_token_ids == {3, 7}


def test_ids_whose_logprobs_are_wanted_are_checked(make: Make) -> None:
    with pytest.raises(InvalidParamsError, match="logprob_token_ids"):
        make(StubFusion()).submit("r", "hello", SamplingParams(logprobs=1, logprob_token_ids=(VOCAB,))).result(10)


def test_fewer_rows_may_be_placed_than_encoded(make: Make) -> None:
    class Fused(StubProcessor):
        def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
            return replace(super().prepare(item, variant), num_fused=3)

        def expand(self, feature: MediaFeature) -> tuple[list[int], list[bool]]:
            return [PAD] * 3, [True] * 3

    request = run(make(Asking(), Fused()), ask(picture(0, 80)))
    assert [(r.length, r.feature.num_tokens, r.feature.num_placed) for r in request.ranges] == [(3, 8, 3)]
    with pytest.raises(PluginError, match="expand"):
        run(make(Asking(), type("Wrong", (Fused,), {"expand": StubProcessor.expand})()), ask(picture(0, 80)))
