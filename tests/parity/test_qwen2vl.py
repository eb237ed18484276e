"""Qwen2-VL and Qwen2.5-VL: the same prompt ids, greedy tokens and logits as transformers in fp32.

What the conformance kit covers (plugins/qwen2vl/tests/test_conformance.py) is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from support.pictures import frames, picture
from support.reference import Answer, Reference
from support.video import reference_video

from mm_core import Engine, RequestOutput, SamplingParams, TextPrompt

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=16, temperature=0, logprobs=8)
VARIANTS = [("2", "hub", True), ("2", "tf5", True), ("2", "hub", False), ("2", "tf5", False),
            ("2.5", "hub", True), ("2.5", "tf5", True), ("2.5", "hub", False)]  # fmt: skip


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def check(output: RequestOutput, wanted: Answer) -> None:
    assert list(output.prompt_token_ids) == wanted.prompt_ids
    assert list(output.token_ids) == wanted.token_ids
    assert len(set(wanted.token_ids)) > 4, "the reference repeats itself: it proves nothing"
    check_logprobs(output, wanted)


def check_logprobs(output: RequestOutput, wanted: Answer) -> None:
    assert output.logprobs is not None
    for step, given in enumerate(output.logprobs):
        expected = torch.log_softmax(wanted.logits[step].float(), -1)
        for token, entry in given.items():
            assert abs(entry.logprob - float(expected[token])) < 5e-4


def margin(answer: Answer) -> float:
    best = answer.logits.float().topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize(("version", "layout", "tied"), VARIANTS)
def test_one_image(
    version: str, layout: str, tied: bool, engine: Callable[..., Engine], reference: Callable[..., Reference]
) -> None:
    prompt = turn(f"{IMAGE}Describe this image.")
    wanted = reference(version, layout, tied).generate(prompt, [picture(1, 150, 100)])
    assert margin(wanted) > 2e-4
    data = {"image": picture(1, 150, 100)}
    (output,) = engine(version, layout, tied).generate(TextPrompt(prompt=prompt, multi_modal_data=data), GREEDY)
    check(output, wanted)
    other = reference(version, layout, tied).generate(prompt, [picture(2, 150, 100)])
    assert other.token_ids != wanted.token_ids, "the reference ignores the picture: it proves nothing"


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("size", [(28, 28), (29, 200), (400, 60), (333, 251), (7, 9)])
def test_image_sizes(
    version: str, size: tuple[int, int], engine: Callable[..., Engine], reference: Callable[..., Reference]
) -> None:
    prompt = turn(f"What is in the picture?{IMAGE}")
    wanted = reference(version).generate(prompt, [picture(3, *size)])
    (output,) = engine(version).generate(
        TextPrompt(prompt=prompt, multi_modal_data={"image": picture(3, *size)}), GREEDY
    )
    check(output, wanted)


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("count", [2, 5])
def test_video(version: str, count: int, engine: Callable[..., Engine], reference: Callable[..., Reference]) -> None:
    prompt = turn(f"{VIDEO}Describe this image.")
    clip = frames(6, count)
    wanted = reference(version).generate(prompt, videos=[reference_video(clip, fps=2.0)])
    data = {"video": {"frames": clip, "fps": 2.0}}
    (output,) = engine(version).generate(TextPrompt(prompt=prompt, multi_modal_data=data), GREEDY)
    check(output, wanted)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_mixed_batch_equals_each_alone(
    version: str, engine: Callable[..., Engine], reference: Callable[..., Reference]
) -> None:
    """Text, one image, two images and a video in one batch."""
    clip = frames(9, 3)
    jobs = [
        ("The cat sleeps in", [], []),
        (turn(f"{IMAGE}Describe this image."), [picture(10, 60, 60)], []),
        (turn(f"{IMAGE}{IMAGE}Describe these images."), [picture(11), picture(12, 200, 30)], []),
        (turn(f"{VIDEO}What is in it?"), [], [clip]),
    ]
    prompts, wanted = [], []
    for text, images, clips in jobs:
        data = {"image": images, "video": [{"frames": c, "fps": 2.0} for c in clips]}
        prompts.append(TextPrompt(prompt=text, multi_modal_data={k: v for k, v in data.items() if v}))
        wanted.append(reference(version).generate(text, images, [reference_video(c, fps=2.0) for c in clips]))
    model = engine(version)
    steps = model.stats()["steps"]
    outputs = model.generate(prompts, GREEDY)
    assert model.stats()["steps"] - steps < 3 * 16, "the requests did not share steps"
    for output, answer in zip(outputs, wanted, strict=True):
        check(output, answer)


def test_chat_gives_transformers_prompt(engine: Callable[..., Engine], reference: Callable[..., Reference]) -> None:
    ref = reference("2")
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    text = ref.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    wanted = ref.generate(text, [picture(13)])
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(13)}, content[1]]}]
    (output,) = engine("2").chat(messages, GREEDY)
    check(output, wanted)
    (implied,) = engine("2").generate(
        TextPrompt(prompt="Describe this image.", multi_modal_data={"image": picture(13)}), GREEDY
    )
    check(implied, wanted)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_video_file(
    version: str, tmp_path: Path, engine: Callable[..., Engine], reference: Callable[..., Reference]
) -> None:
    """A file, by path and as bytes: every fifth of 30 frames at 10 fps, decoded here a second time."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for image in frames(14, 30, 112, 84):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    prompt = turn(f"{VIDEO}What is there to see?")
    wanted = reference(version).generate(prompt, videos=[reference_video(decoded[::5], fps=2.0)])
    for given in (path, path.read_bytes()):
        data = {"video": given}
        (output,) = engine(version).generate(TextPrompt(prompt=prompt, multi_modal_data=data), GREEDY)
        check(output, wanted)
    assert output.usage.encoded_media_tokens == 0  # the bytes are the file's: encoded once
