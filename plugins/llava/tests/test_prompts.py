"""Prompts: templates and their sources, start tokens, placeholders, what a request may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.tiny_llava import Tiny, llama_tokenizer

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.checkpoint import open_checkpoint
from mm_core.errors import InvalidParamsError, PluginError
from mm_core.hookspecs import MediaRequest
from mm_core.testing import clip, picture
from mm_core.types import MediaItem
from mm_plugin_llava.processor import LlavaProcessor

ONEVISION = Tiny("llava_onevision", "siglip", "qwen2", "LlavaOnevision")
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": "Sure?"},
]
OWN = {
    "llama": "USER: <image>\nWhat is it? ASSISTANT: A fox. USER: Sure? ASSISTANT:",
    "mistral": "[INST] <image>\nWhat is it? [/INST] A fox.</s> [INST] Sure? [/INST]",
    "qwen2": "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant \nA fox.<|im_end|>"
    "<|im_start|>user \nSure?<|im_end|><|im_start|>assistant\n",
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %};{% endfor %}"
)


def processor(path: Path) -> LlavaProcessor:
    return LlavaProcessor(open_checkpoint(str(path)))


@pytest.mark.parametrize("text", OWN)
def test_own_template(text: str, tmp_path: Path) -> None:
    tiny = Tiny(text=text) if text != "qwen2" else ONEVISION
    assert processor(tiny.write(tmp_path)).apply_chat_template(MESSAGES) == OWN[text]


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer"])
def test_where_a_checkpoint_keeps_its_template(place: str, tmp_path: Path) -> None:
    path = Tiny().write(tmp_path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    text_only = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings["chat_template"] = TEMPLATE if place == "tokenizer" else text_only
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if place.endswith(".jinja"):
        (path / place).write_text(TEMPLATE)
    elif place.endswith(".json"):
        (path / place).write_text(json.dumps({"chat_template": TEMPLATE}))
    assert processor(path).apply_chat_template(MESSAGES) == "<image>What is it?;A fox.;Sure?;"


def test_a_text_models_own_template_is_not_used(tmp_path: Path) -> None:
    path = Tiny().write(tmp_path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    text_only = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text_only}))
    assert processor(path).apply_chat_template(MESSAGES) == OWN["llama"]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_chat_begins_with_one_start_token_as_transformers_does(bos: str, tmp_path: Path) -> None:
    """Special tokens in users' texts included, which take another way through the tokenizer."""
    path = Tiny().write(tmp_path)
    (path / "chat_template.jinja").write_text(bos + TEMPLATE)
    image = picture(1)
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=64)) as engine:
        for text in ("what is in the picture", "what </s> is <image>", "<s>what"):
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            (output,) = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1))
            ids = list(output.prompt_token_ids)
            assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0)
            assert ids.count(llama_tokenizer().convert_tokens_to_ids("<image>")) == 25
            if "<" not in text:
                wanted = transformers.AutoTokenizer.from_pretrained(path)(f"{'<image>' * 25}{text};")["input_ids"]
                assert ids == wanted


def test_placeholders_of_the_processors_own_spelling(tmp_path: Path) -> None:
    path = Tiny(layout="tf5").write(tmp_path)
    file = path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token": "<video>"}))
    made = processor(path)
    assert made.placeholder("image") == "<video>"
    assert made.placeholder_id("image") == made.tokenizer.convert_tokens_to_ids("<video>")
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token": "<photo>"}))
    with pytest.raises(PluginError, match="<photo>"):
        processor(path)


def test_only_onevision_counts_pictures(tmp_path: Path) -> None:
    item = MediaItem("image", b"", picture(1, 90, 50))
    for name, tiny in (("next", Tiny("llava_next", pictures="LlavaNext")), ("onevision", ONEVISION)):
        made = processor(tiny.write(tmp_path / name))
        alone, several = (made.variant(item, MediaRequest({"image": n})) for n in (1, 2))
        assert (alone == several) == (name == "next")
        assert alone == made.variant(item, MediaRequest({"image": 1, "video": 2} if name == "onevision" else {}))


def test_options(tmp_path: Path) -> None:
    made, plain = processor(ONEVISION.write(tmp_path / "a")), processor(Tiny().write(tmp_path / "b"))
    for bad in ({"fps": 0}, {"fps": float("nan")}, {"fps": True}, {"num_frames": 0}, {"num_frames": 2.0},
                {"num_frames": 10**9}, {"fps": 1, "num_frames": 2}, {"max_pixels": 5}):  # fmt: skip
        with pytest.raises(InvalidParamsError, match="mm_processor_kwargs"):
            made.check_kwargs(bad)
    with pytest.raises(InvalidParamsError, match="Options: none"):
        plain.check_kwargs({"fps": 1})
    assert made.video_sampling(MediaRequest({"video": 1})).num_frames is None
    assert made.video_sampling(MediaRequest({"video": 1}, {"num_frames": 3})).given_frames


def test_frames_of_a_request_and_of_a_checkpoint(tmp_path: Path) -> None:
    path = ONEVISION.write(tmp_path)
    part = {
        "size": {"height": 38, "width": 38},
        "image_mean": [0.1, 0.2, 0.3],
        "do_sample_frames": True,
        "num_frames": 3,
    }
    (path / "video_preprocessor_config.json").write_text(json.dumps(part))
    sampling = processor(path).video_sampling(MediaRequest({"video": 1}))
    assert (sampling.num_frames, sampling.fps) == (3, None)
    prompt = "<image><video>what is in it"
    data = {"video": clip(1, 6), "image": picture(2)}
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=64)) as engine:
        tokens = []
        for count in (2, 5):
            asked = TextPrompt(prompt=prompt, multi_modal_data=data, mm_processor_kwargs={"num_frames": count})
            (output,) = engine.generate(asked, SamplingParams(max_tokens=1))
            tokens.append(output.usage.media_tokens)
        assert tokens[1] - tokens[0] == 3 * 9
