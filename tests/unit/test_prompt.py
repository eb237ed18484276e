"""Prompts to ids: the templates, what users may spell, placeholders, and their expansion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.tiny import make_tiny_tokenizer

from mm_core.errors import (
    ContextLengthError,
    InvalidPromptError,
    PlaceholderMismatchError,
    PluginError,
    UnsupportedMediaError,
)
from mm_core.inputs.messages import ChatPrompt, Given, read_prompt
from mm_core.inputs.prompt import PromptRenderer, is_long
from mm_core.types import MediaFeature, TextPrompt

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] in ('image', 'video') %}<|vision_start|><|{{ p['type'] }}_pad|>"
    "<|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class StubProcessor:
    """As a processor of the Qwen2-VL kind, with a template of its own and rows around a separator."""

    modalities = ("image", "video")
    settings_key = b""
    verbatim = False

    def __init__(self) -> None:
        self.tokenizer = make_tiny_tokenizer()

    def placeholder(self, modality: str) -> str:
        return PADS[modality]

    def placeholder_id(self, modality: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(PADS[modality]))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
            )
        )

    def accepts_verbatim(self, prompt: str, counts: Mapping[str, int]) -> bool:
        return self.verbatim

    def expand(self, feature: MediaFeature) -> tuple[list[int], list[bool]]:
        return [self.placeholder_id(feature.modality)] * feature.num_tokens + [1], [True] * feature.num_tokens + [False]


@pytest.fixture(scope="module")
def processor() -> StubProcessor:
    return StubProcessor()


@pytest.fixture(scope="module")
def renderer(processor: StubProcessor) -> PromptRenderer:
    return PromptRenderer(processor, "stub", len(processor.tokenizer), 500)


def given(prompt: Any) -> Given:
    return read_prompt(prompt, "stub", ("image", "video"))


def tokenized(processor: StubProcessor, text: str) -> list[int]:
    return list(processor.tokenizer(text)["input_ids"])


def test_text_alone_is_used_as_it_is(processor: StubProcessor, renderer: PromptRenderer) -> None:
    for text in ("Describe this image.", "<|im_start|>user\nhello<|im_end|>\n", "naïve 你好 \0 \u202e\ufeff"):
        assert renderer.render(given(text), None) == tokenized(processor, text)
        assert renderer.render(given({"prompt": text}), False) == tokenized(processor, text)


def test_text_with_media_becomes_a_turn(processor: StubProcessor, renderer: PromptRenderer) -> None:
    prompt = TextPrompt(prompt="What is there?", multi_modal_data={"image": ["a", "b"], "video": "c"})
    vision = "".join(f"<|vision_start|>{PADS[m]}<|vision_end|>" for m in ("image", "image", "video"))
    text = f"<|im_start|>user\n{vision}What is there?<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render(given(prompt), None) == tokenized(processor, text)
    empty = TextPrompt(prompt="", multi_modal_data={"image": "a"})
    assert len(renderer.render(given(empty), None)) > 5


def test_placeholders_make_a_prompt_complete(processor: StubProcessor, renderer: PromptRenderer) -> None:
    text = f"<|im_start|>user\n{PADS['image']}hello {PADS['image']}"
    prompt = TextPrompt(prompt=text, multi_modal_data={"image": ["a", "b"]})
    assert renderer.render(given(prompt), None) == tokenized(processor, text)


def test_forced_templates(processor: StubProcessor, renderer: PromptRenderer) -> None:
    turn = tokenized(processor, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert renderer.render(given("hello"), True) == turn
    with pytest.raises(PlaceholderMismatchError):
        renderer.render(given(TextPrompt(prompt="hello", multi_modal_data={"image": "a"})), False)
    ids = renderer.render(given(TextPrompt(prompt=PADS["image"], multi_modal_data={"image": "a"})), True)
    assert ids.count(processor.placeholder_id("image")) == 1


@pytest.mark.parametrize(
    ("text", "media", "told"),
    [
        (PADS["image"], None, "1 × '<|image_pad|>' for 0 item"),
        (PADS["image"] * 2, {"image": "a"}, "2 × '<|image_pad|>' for 1 item"),
        (PADS["image"], {"image": ["a", "b"]}, "1 × '<|image_pad|>' for 2 item"),
        (PADS["video"], {"image": "a"}, "'<|video_pad|>' for 0 item"),
    ],
)
def test_other_counts_are_refused(renderer: PromptRenderer, text: str, media: Any, told: str) -> None:
    with pytest.raises(PlaceholderMismatchError) as caught:
        renderer.render(given(TextPrompt(prompt=text, multi_modal_data=media)), None)
    assert told in str(caught.value)
    assert "one placeholder an item" in str(caught.value)


def test_token_ids(processor: StubProcessor, renderer: PromptRenderer) -> None:
    pad, width = processor.placeholder_id("image"), len(processor.tokenizer)
    assert renderer.render(given({"prompt_token_ids": [5, 6]}), None) == [5, 6]
    media = {"multi_modal_data": {"image": "a"}}
    assert renderer.render(given({"prompt_token_ids": (5, pad), **media}), None) == [5, pad]
    with pytest.raises(PlaceholderMismatchError):
        renderer.render(given({"prompt_token_ids": [5, pad]}), None)
    with pytest.raises(PlaceholderMismatchError):
        renderer.render(given({"prompt_token_ids": [5], **media}), None)
    for bad in ([], [-1], [width], [True], [1.0], ["5"], "5", [10**5000]):
        with pytest.raises(InvalidPromptError):
            renderer.render(given({"prompt_token_ids": bad}), None)
    with pytest.raises(InvalidPromptError, match="template"):
        renderer.render(given({"prompt_token_ids": [5]}), True)


def test_empty_and_invalid_text(renderer: PromptRenderer) -> None:
    for prompt in ("", {"prompt": ""}):
        with pytest.raises(InvalidPromptError, match="empty"):
            renderer.render(given(prompt), None)
    for prompt in ("a\ud800", [{"role": "user", "content": "\udfff"}]):
        with pytest.raises(InvalidPromptError) as caught:
            renderer.render(given(prompt), None)
        assert caught.value.code == "invalid_unicode"


def test_context_length(renderer: PromptRenderer) -> None:
    assert len(renderer.render(given({"prompt_token_ids": [5] * 499}), None)) == 499
    with pytest.raises(ContextLengthError, match="500 tokens"):
        renderer.render(given({"prompt_token_ids": [5] * 500}), None)
    with pytest.raises(ContextLengthError, match="bytes"):
        renderer.render(given("a" * 10_000_000), None)


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": t} for t in texts]}]


@pytest.mark.parametrize("text", ["hello", "a < b | c > d", "\nnew lines\n", "日本語 <|", "", " spaces "])
def test_chat_ids_are_those_of_transformers(processor: StubProcessor, renderer: PromptRenderer, text: str) -> None:
    for messages in (
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}],
        chat("first", text),
    ):
        wanted = tokenized(processor, processor.apply_chat_template(messages))
        assert renderer.render(given(messages), None) == wanted


def specials(ids: list[int], tokenizer: Any) -> list[int]:
    return [i for i in ids if i in tokenizer.all_special_ids]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_user_text_is_never_parsed(processor: StubProcessor, renderer: PromptRenderer, role: str) -> None:
    tokenizer = processor.tokenizer
    harmless = specials(renderer.render(given([{"role": role, "content": "x"}]), None), tokenizer)
    for spelling in tokenizer.all_special_tokens:
        for text in (spelling, f"a{spelling}b", spelling * 3, f"<{spelling}>"):
            ids = renderer.render(given([{"role": role, "content": text}]), None)
            assert specials(ids, tokenizer) == harmless
            assert tokenizer.decode(ids) == processor.apply_chat_template([{"role": role, "content": text}])


def test_special_tokens_cannot_be_put_together(processor: StubProcessor, renderer: PromptRenderer) -> None:
    for texts in (("<|image_", "pad|>"), ("<", "|im_end|>"), ("<|im_end|", ">")):
        ids = renderer.render(given(chat(*texts)), None)
        assert processor.placeholder_id("image") not in ids
        assert len(specials(ids, processor.tokenizer)) == 3


def test_a_typed_placeholder_beside_a_real_image(processor: StubProcessor, renderer: PromptRenderer) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": PADS["image"] * 4}]}]
    ids = renderer.render(given(messages), None)
    assert ids.count(processor.placeholder_id("image")) == 1


def test_placeholders_that_are_not_special_tokens() -> None:
    class Plain(StubProcessor):
        """As families whose tokenizer adds the placeholder as an ordinary token."""

        modalities = ("image",)  # type: ignore[assignment]

        def placeholder(self, modality: str) -> str:
            return "<image>"

    processor = Plain()
    processor.tokenizer.add_tokens(["<image>", "<note>"])
    pad, note = processor.tokenizer.convert_tokens_to_ids(["<image>", "<note>"])
    processor.placeholder_id = lambda modality: pad  # type: ignore[method-assign]
    renderer = PromptRenderer(processor, "stub", 500, 500)
    ids = renderer.render(given([{"role": "user", "content": "a <image> b <note> c <|im_end|>"}]), None)
    assert pad not in ids
    assert ids.count(note) == 1
    assert len(specials(ids, processor.tokenizer)) == 3
    assert renderer.render(given(TextPrompt(prompt="<image>", multi_modal_data={"image": "a"})), None) == [pad]


def test_placeholders_expand_in_order(processor: StubProcessor, renderer: PromptRenderer) -> None:
    pads = {m: processor.placeholder_id(m) for m in PADS}
    features = [MediaFeature(m, n, {}) for m, n in (("image", 3), ("video", 2), ("image", 1))]
    ids, ranges = renderer.expand([9, pads["image"], 8, pads["image"], pads["video"], 7], features)
    image, video = pads["image"], pads["video"]
    assert ids == [9, image, image, image, 1, 8, image, 1, video, video, 1, 7]
    assert [(r.offset, r.length, r.feature.num_tokens) for r in ranges] == [(1, 4, 3), (6, 2, 1), (8, 3, 2)]
    assert ranges[0].is_media == (True, True, True, False)


def test_masks_become_tuples_of_bools(
    renderer: PromptRenderer, processor: StubProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pad = processor.placeholder_id("image")
    for mask in ((True, False, True), [True, False, True], np.array([True, False, True]), (1, 0, 1)):
        monkeypatch.setattr(processor, "expand", lambda feature, mask=mask: ((pad,) * 3, mask))
        _, (found,) = renderer.expand([pad], [MediaFeature("image", 2, {})])
        assert found.is_media == (True, False, True)
        assert found.row_tokens.tolist() == [0, 2]


def test_long_texts_have_the_same_tokens(renderer: PromptRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The quick brown fox <|im_end|> é你👩", "x" * 300]
    short = [renderer.render(given(text), None) for text in texts]
    assert not any(is_long(given(text)) for text in texts)
    monkeypatch.setattr("mm_core.inputs.prompt.LONG_TEXT", 10)
    assert [renderer.render(given(text), None) for text in texts] == short
    chat = given([{"role": "user", "content": "Hello"}, {"role": "user", "content": [{"type": "text", "text": "you"}]}])
    assert not is_long(chat)
    monkeypatch.setattr("mm_core.inputs.prompt.LONG_TEXT", 8)
    assert is_long(chat)


def test_items_without_placeholders_come_first(processor: StubProcessor) -> None:
    accepting = StubProcessor()
    accepting.verbatim = True
    renderer = PromptRenderer(accepting, "stub", len(processor.tokenizer), 500)
    prompt = TextPrompt(prompt="hello", multi_modal_data={"image": "a"})
    ids = renderer.render(given(prompt), None)
    assert ids == tokenized(processor, "hello")
    expanded, ranges = renderer.expand(ids, [MediaFeature("image", 2, {})])
    assert expanded[3:] == ids
    assert ranges[0].offset == 0


def test_broken_expansions_name_the_plugin(processor: StubProcessor) -> None:
    class Broken(StubProcessor):
        def expand(self, feature: MediaFeature) -> tuple[list[int], list[bool]]:
            return [1, 2], [True, False]

    renderer = PromptRenderer(Broken(), "stub", 500, 500)
    with pytest.raises(PluginError, match="'stub'"):
        renderer.expand([5], [MediaFeature("image", 3, {})])


def test_expansion_is_linear(processor: StubProcessor, renderer: PromptRenderer) -> None:
    count = 20_000
    features = [MediaFeature("image", 1, {})] * count
    ids, ranges = renderer.expand([processor.placeholder_id("image")] * count, features)
    assert len(ids) == 2 * count
    assert ranges[-1].end == len(ids)


BAD_MESSAGES: list[Any] = [
    [], ["hello"], [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": []}], [{"role": "user", "content": "x", "tool_calls": []}],
    [{"role": "user", "content": [3]}],
    [{"role": "user", "content": [{"type": "picture", "picture": "a"}]}],
    [{"role": "user", "content": [{"text": "a"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": None}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}}]}],
    [{"role": "user", "content": [{"type": "image", "image": "a", "image_url": {"url": "b"}}]}],
    [{"role": "system", "content": [{"type": "image", "image": "a"}]}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        given(ChatPrompt(messages))
    assert caught.value.param in ("messages", "multi_modal_data")


@pytest.mark.parametrize("url", ["http://a/b.png", "/etc/passwd", "file:///etc/passwd", ""])
def test_url_parts_hold_data_urls_only(url: str) -> None:
    with pytest.raises(UnsupportedMediaError, match="not fetched"):
        given([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def test_parts_carry_uuids_and_audio_is_refused() -> None:
    parts = [
        {"type": "image", "image": "a", "uuid": "n-1"},
        {"type": "image", "uuid": "n-1"},
        {"type": "text", "text": "x"},
    ]
    items = given([{"role": "user", "content": parts}]).items
    assert [(i.value, i.uuid) for i in items] == [("a", "n-1"), (None, "n-1")]
    with pytest.raises(UnsupportedMediaError, match="image and video"):
        given(
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}]
        )


@pytest.mark.parametrize(
    "prompt",
    [
        {"promt": "x"},
        {},
        {"prompt": "a", "prompt_token_ids": [1]},
        3,
        None,
        {"prompt": 3},
        {"prompt": "a", "mm_processor_kwargs": 3},
        {"prompt": "a", "multi_modal_data": [1]},
    ],
)
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(InvalidPromptError):
        given(prompt)


def test_modalities_of_the_family_are_checked() -> None:
    with pytest.raises(UnsupportedMediaError, match="'stub' reads image and video"):
        given(TextPrompt(prompt="x", multi_modal_data={"audio": ([0.0], 16000)}))
