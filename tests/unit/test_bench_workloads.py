"""Workloads and built-in models: exact token counts, noise, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_core.bench.models import built_in_models, family_of, place_model, tokenizer_json, write_model
from mm_core.bench.workloads import (
    WORKLOADS,
    BenchRequest,
    PromptMaker,
    make_requests,
    noise_images,
    resized,
    select,
)
from mm_core.benchspecs import BenchPrompt, BenchWorkload
from mm_core.checkpoint import LoadedCheckpoint, open_checkpoint
from mm_core.errors import ConfigError, PluginError
from mm_core.hookspecs import hookimpl
from mm_core.plugins import PluginRegistry
from mm_core.types import ModelFamily

IMAGE_PAD = 151655
ZOO = Path(__file__).resolve().parents[2] / "zoo" / "qwen2vl-nano"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    models = built_in_models(PluginRegistry())
    return open_checkpoint(str(write_model(models["qwen2-vl-7b"], tmp_path_factory.mktemp("bench") / "7b")))


def maker_for(checkpoint: LoadedCheckpoint, *, media: bool = True) -> PromptMaker:
    family = family_of(PluginRegistry(), checkpoint.architectures)
    assert family is not None
    tokenizer = checkpoint.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor = SimpleNamespace(tokenizer=tokenizer, placeholder_id=lambda _: placeholder)
    return PromptMaker.of(processor, family.prompt, "image" if media else None)


def expanded(ids: list[int], placeholder: int, rows: int) -> list[int]:
    at = ids.index(placeholder)
    return ids[:at] + [placeholder] * rows + ids[at + 1 :]


# --- built-in models


def test_built_in_sizes(checkpoint: LoadedCheckpoint) -> None:
    assert {"qwen2-vl-2b", "qwen2-vl-7b"} <= set(built_in_models(PluginRegistry()))
    text = checkpoint.text_config
    assert (text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]) == (3584, 28, 152064)
    assert not list(checkpoint.path.glob("*.safetensors"))


def test_tokenizer_has_the_real_special_ids(checkpoint: LoadedCheckpoint) -> None:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>", "<|video_pad|>"]) == [
        151643, IMAGE_PAD, 151656
    ]  # fmt: skip
    ids = tokenizer.encode("<|im_start|>é <|image_pad|>")
    assert (ids[0], ids[-1], len(ids)) == (151644, IMAGE_PAD, 5)
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界!\n")) == "Grüße, 世界!\n"
    assert tokenizer.decode([256, 151642]).split() == ["w256", "w151642"]  # whatever is sampled has a text
    assert tokenizer.eos_token_id == 151645


def test_every_id_below_the_largest_special_one_is_taken() -> None:
    found = tokenizer_json({"<a>": 300, "<b>": 302})
    assert sorted(found["model"]["vocab"].values()) == list(range(303))
    assert [(t["content"], t["id"]) for t in found["added_tokens"]] == [("<a>", 300), ("<b>", 302)]


def test_built_in_models_have_no_weights(tmp_path: Path) -> None:
    registry = PluginRegistry()
    with pytest.raises(ConfigError, match=r"qwen2-vl-2b is a built-in size.*--load-format dummy"):
        place_model("qwen2-vl-2b", "safetensors", registry, tmp_path)
    path = Path(place_model("qwen2-vl-2b", "dummy", registry, tmp_path))
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    assert place_model("org/other", "safetensors", registry, tmp_path) == "org/other"


class Silent:
    """A plugin that says nothing about benchmarks."""

    @hookimpl
    def mm_families(self) -> list[ModelFamily]:
        return [ModelFamily("silent", ("SilentModel",), ("image",))]


class Wrong(Silent):
    @hookimpl
    def mm_bench(self, family: str) -> object:
        return object()


def test_plugins_without_benchmarks_and_with_wrong_ones(caplog: pytest.LogCaptureFixture) -> None:
    registry = PluginRegistry([Silent()])
    assert family_of(registry, ["SilentModel"]) is None
    owners = {owner.plugin for owner in registry.owners("mm_bench")}
    assert "qwen2vl" in owners
    assert "silent" not in owners
    with pytest.raises(PluginError, match=r"mm_bench\(family\) returned object without prompt, models.*a BenchFamily"):
        family_of(PluginRegistry([Wrong()]), ["SilentModel"])
    assert "qwen2-vl-7b" in built_in_models(PluginRegistry([Wrong()]))
    assert "models of plugin 'Wrong' are left out" in caplog.text


# --- prompts of exact counts


@pytest.mark.parametrize(("name", "rows", "total"), [("image-distinct", 256, 294), ("image-large", 2304, 2342)])
def test_prompts_with_an_image(checkpoint: LoadedCheckpoint, name: str, rows: int, total: int) -> None:
    workload, maker = WORKLOADS[name], maker_for(checkpoint)
    prompts = [expanded(maker.ids(workload, number), IMAGE_PAD, rows) for number in range(512)]
    assert {len(p) for p in prompts} == {total}
    assert len({tuple(p[: rows + 16]) for p in prompts}) == 1
    assert len({p[rows + 16] for p in prompts}) == 512  # nothing can be reused past here
    text = checkpoint.tokenizer.decode(prompts[7])
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("7.<|im_end|>\n<|im_start|>assistant\n")


def test_text_prompts(checkpoint: LoadedCheckpoint) -> None:
    maker = maker_for(checkpoint, media=False)
    prompts = [maker.ids(WORKLOADS["text"], number) for number in range(256)]
    assert {len(p) for p in prompts} == {36}
    assert len({p[14] for p in prompts}) == 256
    assert not {p for ids in prompts for p in ids} & {IMAGE_PAD, 151652, 151653}


def test_counts_hold_with_another_tokenizer() -> None:
    maker = maker_for(open_checkpoint(str(ZOO)))
    prompts = [maker.ids(WORKLOADS["image-reuse"], number) for number in range(256)]
    assert {len(p) - 1 for p in prompts} == {38}
    assert len({tuple(p[:17]) for p in prompts}) == 1
    assert len({p[17] for p in prompts}) == 256


def test_templates_that_do_not_fit_are_refused(checkpoint: LoadedCheckpoint) -> None:
    maker = maker_for(checkpoint)
    long = BenchPrompt("<|im_start|>somebody who is long\n", "<|image_pad|>", "<|im_end|>")
    with pytest.raises(ConfigError, match=r"has 16 \+ 22 tokens of text.*Use --dataset"):
        PromptMaker(maker.tokenizer, long, IMAGE_PAD, maker.marks).ids(WORKLOADS["latency"], 0)
    twice = BenchPrompt("", "<|image_pad|><|image_pad|>", "")
    with pytest.raises(ConfigError, match="has 2 placeholders"):
        PromptMaker(maker.tokenizer, twice, IMAGE_PAD, maker.marks).ids(WORKLOADS["latency"], 0)
    with pytest.raises(ConfigError, match="3 ordinary tokens"):
        PromptMaker(maker.tokenizer, maker.pieces, IMAGE_PAD, [1, 2, 3]).ids(WORKLOADS["latency"], 3)


# --- the workloads themselves


def test_workloads_are_those_of_the_table() -> None:
    table = {
        "image-distinct": (256, 256, 448, 128), "image-reuse": (256, 16, 448, 128),
        "image-reuse-warm": (256, 16, 448, 128), "image-large": (32, 32, 1344, 64), "text": (256, 0, 448, 256),
        "latency": (20, 20, 448, 129),
    }  # fmt: skip
    found = {n: (w.requests, w.items, w.image_size, w.output_tokens) for n, w in WORKLOADS.items()}
    assert found == table
    assert [w.name for w in select("text, image-reuse")] == ["text", "image-reuse"]


@pytest.mark.parametrize(("names", "fault"), [("text,fly", "'fly' is no workload"), ("text,text", "named twice")])
def test_unknown_and_repeated_names(names: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"{fault}.*There are: image-distinct"):
        select(names)


def test_other_sizes_keep_the_share_of_images() -> None:
    reuse = resized(WORKLOADS["image-reuse"], 64, 5, None)
    assert (reuse.requests, reuse.items, reuse.output_tokens, reuse.rows) == (64, 4, 5, 256)
    assert resized(WORKLOADS["image-reuse"], 3, None, None).items == 1
    distinct = resized(WORKLOADS["image-distinct"], 7, None, 112)
    assert (distinct.items, distinct.image_size, distinct.rows) == (7, 112, None)
    assert resized(WORKLOADS["text"], 9, None, 112).items == 0


def test_noise_depends_on_name_seed_and_index_only() -> None:
    first, again = (noise_images("a", 3, 28, 5) for _ in range(2))
    assert [i.tobytes() for i in first] == [i.tobytes() for i in again]
    others = [*noise_images("b", 1, 28, 5), *noise_images("a", 1, 28, 6)]
    assert len({i.tobytes() for i in [*first, *others]}) == 5
    histogram = first[0].histogram()
    assert sum(1 for count in histogram if count) > 600  # of 3 × 256 values


def test_requests_share_images_and_differ_in_questions(checkpoint: LoadedCheckpoint) -> None:
    workload = resized(WORKLOADS["image-reuse-warm"], 32, 2, 28)
    requests: list[BenchRequest] = make_requests(workload, maker_for(checkpoint), 0, 1, first=32, media="others")
    images = [r.prompt.multi_modal_data["image"][0].tobytes() for r in requests]
    assert len(set(images)) == 2
    assert images[0] == images[2] != images[1]
    assert images[:2] == [i.tobytes() for i in noise_images("others", 2, 28, 0)]
    assert len({tuple(r.prompt.prompt_token_ids) for r in requests}) == 32
    assert {(r.expected_tokens, r.expected_rows) for r in requests} == {(39, 1)}
    text = BenchWorkload("text", 2, 0, 3, rows=None, shared=14)
    assert make_requests(text, maker_for(checkpoint, media=False), 0, 0)[0].expected_tokens == 36
