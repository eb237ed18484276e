"""Nougat: pixels bit for bit, tokens and logits as transformers in fp32, the guard, PDFs, and wrong inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import picture
from support.tiny_nougat import NougatReference, make_tiny_nougat

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.checkpoint import open_checkpoint
from mm_core.errors import (
    InvalidParamsError,
    InvalidPromptError,
    MediaDecodeError,
    MediaError,
    TooManyMediaError,
    UnsupportedMediaError,
)
from mm_core.media import normalise
from mm_core.types import LogitsRows, MediaItem
from mm_plugin_nougat.pdf import pdf_pages
from mm_plugin_nougat.processor import NougatProcessor
from mm_plugin_nougat.repetition import RepetitionGuard, cut_repetition

GREEDY = SamplingParams(max_tokens=16, temperature=0, logprobs=8)
# name: layout, decoder width, encoder settings. A window of 5 does not divide the grids: they are padded.
VARIANTS = {
    "hub": {"layout": "hub"},
    "tf5": {"layout": "tf5"},
    "projected": {"layout": "hub", "width": 48},
    "padded": {"layout": "hub", "window_size": 5, "seed": 3},
    "one window": {"layout": "hub", "window_size": 8},
}

Make = Callable[[str], tuple[Engine, NougatReference]]


def page(image: object, prompt: str = "") -> TextPrompt:
    return TextPrompt(prompt=prompt, multi_modal_data={"image": image})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    engines: list[Engine] = []

    @cache
    def make(variant: str) -> tuple[Engine, NougatReference]:
        path = make_tiny_nougat(tmp_path_factory.mktemp("nougat"), **VARIANTS[variant])  # type: ignore[arg-type]
        engines.append(Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=256)))
        return engines[-1], NougatReference(path)

    yield make
    for engine in engines:
        engine.close()


def check(output: RequestOutput, wanted: tuple[list[int], torch.Tensor]) -> None:
    tokens, logits = wanted
    assert list(output.token_ids) == tokens
    assert len(set(tokens)) > 4, "the reference repeats itself: it proves nothing"
    for step, given in enumerate(output.logprobs or ()):
        expected = torch.log_softmax(logits[step], -1)
        assert all(abs(entry.logprob - float(expected[token])) < 5e-4 for token, entry in given.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_page(variant: str, model: Make) -> None:
    engine, reference = model(variant)
    wanted = reference.generate(picture(1, 150, 100))
    (output,) = engine.generate(page(picture(1, 150, 100)), GREEDY)
    check(output, wanted)
    assert reference.generate(picture(2, 150, 100))[0] != wanted[0], "the reference ignores the page"


def test_pages_together_and_again(model: Make) -> None:
    engine, reference = model("hub")
    pages = [picture(seed, *size) for seed, size in enumerate([(64, 96), (7, 9), (500, 37), (90, 300), (64, 96)], 20)]
    outputs = engine.generate([page(p) for p in pages], GREEDY)
    for output, image in zip(outputs, pages, strict=True):
        check(output, reference.generate(image))
    before = engine.stats()["encoded_items"]
    again = engine.generate([page(p) for p in pages], GREEDY)
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs]
    assert engine.stats()["encoded_items"] == before
    assert all(o.usage.encoded_media_tokens == 0 for o in again)


def test_an_answer_is_continued(model: Make) -> None:
    engine, reference = model("hub")
    text = "<s>Describe these images"
    ids = tuple(engine._frontend.model.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert ids[0] == 0
    (output,) = engine.generate(page(picture(1, 150, 100), text), GREEDY)
    check(output, reference.generate(picture(1, 150, 100), prompt=ids))


@pytest.mark.parametrize("size", [(150, 100), (100, 150), (64, 96), (7, 9), (1, 1), (500, 37), (37, 500), (300, 300)])
def test_pixels_are_the_references(size: tuple[int, int], model: Make, tmp_path: Path) -> None:
    _, reference = model("hub")
    processor = NougatProcessor(open_checkpoint(str(make_tiny_nougat(tmp_path))))
    for image in (picture(3, *size), picture(3, *size).point(lambda v: 255 if v > 128 else v)):
        feature = processor.prepare(MediaItem("image", b"", image), b"")
        mine = normalise(feature.tensors["pixels"][0].numpy(), processor.settings.norm)
        assert np.array_equal(mine.transpose(2, 0, 1), reference.pixels(image)[0].numpy())


# --- the repetition guard


def rows_of(sequences: list[list[int]]) -> LogitsRows:
    lengths = [len(s) for s in sequences]
    ids = torch.full((len(sequences), max(lengths) + 3), -1)
    for row, ids_of in zip(ids, sequences, strict=True):
        row[: len(ids_of)] = torch.tensor(ids_of)
    return LogitsRows([()] * len(sequences), ids, lengths, torch.tensor(lengths))


def test_the_guard_ends_repetitions_and_nothing_else() -> None:
    guard = RepetitionGuard(2, span=20, longest=6)
    loops = [list(range(10, 40)) + [5, 6, 7] * 9, [9] * 30, list(range(10, 20)) + [1, 2, 3, 4, 5, 6] * 5]
    fine = [[*range(100, 140)], [9] * 20, [*([7, 8, 9] * 9), 1], ([1, 2, 3, 4, 5, 6, 7] * 8)]
    logits = torch.randn(len(loops) + len(fine), 50)
    out = guard(logits.clone(), rows_of([*loops, *fine]))
    ended = torch.isinf(out).sum(1) == 49
    assert ended.tolist() == [True] * len(loops) + [False] * len(fine)
    assert torch.equal(out[:, 2], logits[:, 2])
    assert torch.equal(out[len(loops) :], logits[len(loops) :])
    assert [guard.repeats([*s, 2]) for s in (*loops, *fine)] == ended.tolist()


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("A page. and so on and so on and so on", "A page. and so on"),
        ("A page.", "A page."),
        ("", ""),
        ("x" * 50, "x"),
        ("twice twice", "twice twice"),
    ],
)
def test_one_copy_of_a_repetition_stays(text: str, cut: str) -> None:
    assert cut_repetition(text) == cut


def test_an_endless_answer_is_ended(model: Make) -> None:
    """Biased towards one token, the model would go on to the end of its context."""
    engine, _ = model("hub")
    params = SamplingParams(max_tokens=230, temperature=0, logit_bias={30: 100.0})
    (output,) = engine.generate(page(picture(1, 150, 100)), params)
    assert output.finish_reason == "length", "shorter than the guard's span"
    guard = RepetitionGuard(2, span=20, longest=4)
    params = SamplingParams(max_tokens=230, temperature=0, logit_bias={30: 100.0}, logits_processors=(guard,))
    (output,) = engine.generate(page(picture(1, 150, 100)), params)
    assert (output.finish_reason, len(output.token_ids)) == ("stop", 25)


# --- PDFs


def make_pdf(path: Path, pages: int) -> Path:
    images = [picture(40 + i, 60, 80) for i in range(pages)]
    images[0].save(path, save_all=True, append_images=images[1:], resolution=72)
    return path


def test_a_pdf_is_read_page_by_page(model: Make, tmp_path: Path) -> None:
    engine, _ = model("hub")
    path = make_pdf(tmp_path / "three.pdf", 3)
    images = pdf_pages(path)
    assert [image.size for image in images] == [(80, 107)] * 3
    document = engine.task("read", pdf=path, pages=[2, 0], params=SamplingParams(max_tokens=12, temperature=0))
    outputs = engine.generate([page(images[i]) for i in (2, 0)], SamplingParams(max_tokens=12, temperature=0))
    assert document.pages == tuple(o.text.strip() for o in outputs)
    assert document.numbers == (2, 0)
    assert document.text == "\n\n".join(document.pages)


def test_wrong_pdfs(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "one.pdf", 1)
    with pytest.raises(MediaDecodeError, match="no PDF"):
        pdf_pages(b"%PDF-1.4 and nothing")
    with pytest.raises(MediaDecodeError, match="cannot be read"):
        pdf_pages(tmp_path / "none.pdf")
    with pytest.raises(InvalidParamsError, match="pages 0 to 0, not 1"):
        pdf_pages(path, [0, 1])
    with pytest.raises(InvalidParamsError, match="dpi"):
        pdf_pages(path, dpi=float("nan"))
    with pytest.raises(MediaError, match="Lower dpi"):
        pdf_pages(make_big_pdf(tmp_path / "big.pdf"), dpi=600)


def make_big_pdf(path: Path) -> Path:
    picture(1, 60, 80).resize((2000, 2000)).save(path, resolution=72)
    return path


# --- wrong inputs


def test_wrong_inputs_leave_the_engine_alive(model: Make) -> None:
    engine, _ = model("hub")
    image = picture(1, 150, 100)
    (before,) = engine.generate(page(image), GREEDY)
    two = TextPrompt(prompt="", multi_modal_data={"image": [image, image]})
    video = TextPrompt(prompt="", multi_modal_data={"video": [image, image]})
    optioned = TextPrompt(prompt="", multi_modal_data={"image": image}, mm_processor_kwargs={"max_pixels": 3})
    for prompt, error in (
        (two, TooManyMediaError),
        (video, UnsupportedMediaError),
        (optioned, InvalidParamsError),
        (page(image, "What is this?"), InvalidPromptError),
        (TextPrompt(prompt="<s>"), InvalidPromptError),
        (page(picture(1, 1, 8192)), MediaError),
        (page(b"no picture"), MediaError),
    ):
        with pytest.raises(error):
            engine.generate(prompt, GREEDY)
    (after,) = engine.generate(page(image), GREEDY)
    assert after.token_ids == before.token_ids
