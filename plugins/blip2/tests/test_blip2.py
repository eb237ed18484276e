"""What the conformance kit does not ask: checkpoint layouts, prompts, instructions, pixel values, wrong settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.blip2_reference import Answer, Reference
from support.pictures import picture
from support.tiny_blip2 import make_tiny_blip2

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.checkpoint import open_checkpoint
from mm_core.errors import (
    CheckpointError,
    ConfigError,
    InvalidParamsError,
    InvalidPromptError,
    PlaceholderMismatchError,
)
from mm_core.hookspecs import BuildContext
from mm_core.layers import Patchify
from mm_core.media import PatchLayout
from mm_core.types import MediaItem
from mm_plugin_blip2.fusion import InstructBlipFusion
from mm_plugin_blip2.processor import Blip2Processor, read_settings
from mm_plugin_blip2.vision import EvaConfig

KINDS = [("blip2", "opt"), ("blip2", "t5"), ("instructblip", "llama"), ("instructblip", "t5")]
QUESTION = "Question: what is in the picture? Answer:"
GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=8)
CPU = BuildContext(torch.device("cpu"), torch.float32, 64)

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda kind, text, layout="hub": make_tiny_blip2(root, kind, text, layout))


@pytest.fixture(scope="module")
def reference(checkpoint: Make) -> Make:
    return cache(lambda kind, text: Reference(checkpoint(kind, text)))


@pytest.fixture(scope="module")
def engine(checkpoint: Make) -> Iterator[Make]:
    @cache
    def make(kind: str, text: str, layout: str = "hub") -> Engine:
        made.append(
            Engine.from_pretrained(checkpoint(kind, text, layout), kv_cache_config=KvCacheConfig(num_blocks=64))
        )
        return made[-1]

    made: list[Engine] = []
    yield make
    for one in made:
        one.close()


def ask(text: str, image: object = None) -> TextPrompt:
    return TextPrompt(prompt=text, multi_modal_data=None if image is None else {"image": image})


def check(output: RequestOutput, wanted: Answer, *, same_prompt: bool = True) -> None:
    assert (list(output.prompt_token_ids) == wanted.prompt_ids) == same_prompt
    assert list(output.token_ids) == wanted.token_ids
    assert output.logprobs is not None
    for step, given in enumerate(output.logprobs):
        expected = torch.log_softmax(wanted.logits[step].float(), -1)
        assert all(abs(entry.logprob - float(expected[token])) < 5e-4 for token, entry in given.items())


@pytest.mark.parametrize("layout", ["tf5", "old"])
@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_other_layouts_give_the_same(kind: str, text: str, layout: str, engine: Make, reference: Make) -> None:
    image = picture(1, 100, 80)
    wanted = reference(kind, text).generate(QUESTION, image)
    (output,) = engine(kind, text, layout).generate(ask(QUESTION, image), GREEDY)
    check(output, wanted)


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_other_questions_about_a_picture_do_not_encode_it_again(
    kind: str, text: str, engine: Make, reference: Make
) -> None:
    model, image = engine(kind, text), picture(4, 70, 90)
    answers = set()
    for number, question in enumerate(["How many cats are there?", "Describe this image.", "How many dogs"]):
        calls = model.stats()["encoder_calls"]
        (output,) = model.generate(ask(question, image), GREEDY)
        check(output, reference(kind, text).generate(question, image))
        assert model.stats()["encoder_calls"] - calls == (number == 0)
        answers.add(output.token_ids)
    assert len(answers) == 3


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_messages_have_the_ids_of_plain_text(kind: str, text: str, engine: Make, reference: Make) -> None:
    image = picture(5)
    parts = [{"type": "text", "text": QUESTION}, {"type": "image", "image": image}]
    (output,) = engine(kind, text).chat([{"role": "user", "content": parts}], GREEDY)
    check(output, reference(kind, text).generate(QUESTION, image))
    (templated,) = engine(kind, text).generate(ask(QUESTION, image), GREEDY, apply_chat_template=True)
    assert (templated.prompt_token_ids, templated.token_ids) == (output.prompt_token_ids, output.token_ids)
    # What a user writes is text, whatever it spells
    spelt = [{"type": "text", "text": "What is <image> here?"}, {"type": "image", "image": image}]
    (plain,) = engine(kind, text).chat([{"role": "user", "content": spelt}], GREEDY)
    assert plain.usage.media_tokens == 6


@pytest.mark.parametrize(("kind", "text"), [("blip2", "opt"), ("instructblip", "t5")])
def test_a_picture_stands_where_it_is_written(kind: str, text: str, engine: Make, reference: Make) -> None:
    model, ref, image = engine(kind, text), reference(kind, text), picture(6)
    (first,) = model.generate(ask(QUESTION, image), GREEDY)
    token = first.prompt_token_ids[0]
    ids = [token, *ref.processor.tokenizer(QUESTION)["input_ids"]]
    given = TextPrompt(prompt_token_ids=ids, multi_modal_data={"image": image})
    (as_ids,) = model.generate(given, GREEDY)
    assert as_ids.token_ids == first.token_ids
    (inside,) = model.generate(ask(f"Question:<image> {QUESTION}", image), GREEDY)
    place = inside.prompt_token_ids.index(token)
    assert place > 0
    assert inside.prompt_token_ids[place : place + 6] == (token,) * 6


def test_the_instruction_is_read(engine: Make, checkpoint: Make) -> None:
    fusion = InstructBlipFusion(open_checkpoint(str(checkpoint("instructblip", "llama"))), CPU)
    tokens = fusion._tokenizer.encode("How many cats?").tokens
    assert list(fusion.instruction("How many cats?")) == fusion._tokenizer.encode("How many cats?").ids
    assert tokens == ["[CLS]", "how", "many", "cats", "?", "[SEP]"]
    with pytest.raises(InvalidPromptError, match="reads 40"):
        fusion.condition([torch.zeros(17, 32)], [(1,) * 41])
    with pytest.raises(InvalidPromptError, match="reads 40"):
        engine("instructblip", "llama").generate(ask("cat " * 39, picture(7)), GREEDY)


@pytest.mark.parametrize("size", [(56, 56), (1, 1), (333, 20), (640, 480)])
def test_pixels_are_transformers_bit_for_bit(size: tuple[int, int], checkpoint: Make, reference: Make) -> None:
    processor = Blip2Processor(open_checkpoint(str(checkpoint("blip2", "opt"))))
    image = picture(8, *size)
    feature = processor.prepare(MediaItem("image", b"", image), b"")
    make = Patchify(PatchLayout(14, 1, 1), processor._settings.norm, CPU.device, torch.float32)
    patches = make([feature.tensors["pixels"]]).view(4, 4, 3, 14, 14)
    got = patches.permute(2, 0, 3, 1, 4).reshape(3, 56, 56).numpy()
    wanted = reference("blip2", "opt").images(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(got, wanted)


def test_an_old_vocabulary_without_room_for_the_image_token(tmp_path: Path, checkpoint: Make, reference: Make) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(checkpoint("instructblip", "llama", "old"), tmp_path / "full"))
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    size = len(open_checkpoint(str(path)).tokenizer)
    config["text_config"]["vocab_size"] = size
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = tensors[name][:size].clone()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    image = picture(1, 100, 80)
    wanted = reference("instructblip", "llama").generate(QUESTION, image)
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=32)) as model:
        (output,) = model.generate(ask(QUESTION, image), SamplingParams(max_tokens=12, temperature=0))
        assert list(output.token_ids) == wanted.token_ids


def test_wrong_requests_are_named(engine: Make) -> None:
    model = engine("blip2", "opt")
    with pytest.raises(PlaceholderMismatchError):
        model.generate(ask("<image><image> both?", picture(1)), GREEDY)
    with pytest.raises(InvalidParamsError, match="has none"):
        model.generate(
            TextPrompt(prompt="a", multi_modal_data={"image": picture(1)}, mm_processor_kwargs={"max_pixels": 3}),
            GREEDY,
        )


def test_wrong_settings_are_named(tmp_path: Path, checkpoint: Make) -> None:
    path = Path(shutil.copytree(checkpoint("instructblip", "llama"), tmp_path / "changed"))
    vision = EvaConfig.from_config(open_checkpoint(str(path)).config["vision_config"])
    settings = json.loads((path / "preprocessor_config.json").read_text())
    for change, told in (({"size": {"height": 28, "width": 56}}, "28"), ({"do_rescale": False}, "do_rescale=False")):
        (path / "preprocessor_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(CheckpointError, match=told):
            read_settings(open_checkpoint(str(path)), vision)
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, "size": 56}))
    assert read_settings(open_checkpoint(str(path)), vision).side == 56
    config = json.loads((path / "config.json").read_text())
    config["qformer_config"]["vocab_size"] = 20
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the Q-Former 20"):
        InstructBlipFusion(open_checkpoint(str(path)), CPU)
    shutil.rmtree(path / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match="qformer_tokenizer"):
        InstructBlipFusion(open_checkpoint(str(path)), CPU)
    with pytest.raises(ConfigError, match="qkv_bias"):
        EvaConfig.from_config({"qkv_bias": False})
