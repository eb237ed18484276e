"""A family with cross-attention, a text encoder or conditioned rows, the whole engine, beside its dense form."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import fake_cross
from support.e2e import settle
from support.tiny import make_tiny_tokenizer, randomize_

from mm_core import BatchError, Engine, KvCacheConfig, SamplingParams, TextPrompt, hookimpl
from mm_core.errors import CheckpointError, PluginError
from mm_core.hookspecs import BuildContext, DecoderSpec, SamplingDefaults, WeightMap
from mm_core.types import MediaFeature, ModelFamily

PICTURE = "<|image_pad|>"
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
BROKEN = 66  # width of a picture that no encoder reads


class Processor:
    """A picture of width w has w / 2 rows of noise."""

    modalities = ("image",)
    settings_key = b""
    add_special_tokens = False

    def __init__(self, tokenizer: Any, reads_text: bool, conditions: bool) -> None:
        self.tokenizer = tokenizer
        self._reads_text = reads_text
        self._num_fused = 2 if conditions else None

    def placeholder(self, modality: str) -> str | None:
        return PICTURE if self._reads_text else None

    def placeholder_id(self, modality: str) -> int | None:
        return self.tokenizer.convert_tokens_to_ids(PICTURE) if self._reads_text else None

    def apply_chat_template(self, messages: Any) -> str:
        raise NotImplementedError

    def accepts_verbatim(self, prompt: str, counts: Any) -> bool:
        return True

    def check_kwargs(self, kwargs: Any) -> None:
        pass

    def variant(self, item: Any, request: Any) -> bytes:
        return b""

    def prepare(self, item: Any, variant: bytes) -> MediaFeature:
        width = item.info["width"]
        info = {"broken": True} if width == BROKEN else {}
        return MediaFeature("image", width // 2, {"rows": rows_of(width)}, info, num_fused=self._num_fused)

    def expand(self, feature: MediaFeature) -> Any:
        count = feature.num_placed if self._reads_text else 0
        return [self.placeholder_id("image")] * count, [True] * count

    def default_sampling(self) -> SamplingDefaults:
        return SamplingDefaults()

    def finish(self, text: str, token_ids: Any) -> str:
        return text


def rows_of(width: int) -> torch.Tensor:
    return torch.randn(width // 2, fake_cross.ENCODED, generator=torch.Generator().manual_seed(width))


class Plugin:
    """A family of one kind; its text encoder always reads conditioned rows, which are as wide as its embeddings."""

    def __init__(self, kind: str, vocab_size: int) -> None:
        self.kind = kind
        self.reads_text = kind == "encoder_decoder"
        self.vocab_size = vocab_size

    @hookimpl
    def mm_families(self) -> list[ModelFamily]:
        return [ModelFamily("fake", ("FakeCross",), ("image",))]

    @hookimpl
    def mm_processor(self, checkpoint: Any) -> Processor:
        return Processor(checkpoint.tokenizer, self.reads_text, self.reads_text)

    @hookimpl
    def mm_encoder(self) -> Any:
        return fake_cross.RowsEncoder()

    @hookimpl
    def mm_fusion(self, context: BuildContext | None) -> Any:
        if not self.reads_text:
            return fake_cross.Plain(self.kind)
        fusion = fake_cross.Condition(self.kind)
        fusion.instruction = lambda text: (len(text),)  # type: ignore[assignment]
        fusion.weight_map = WeightMap(rename=((r"fusion\.", ""),))
        return fusion if context is None else fusion.to(context.device)

    @hookimpl
    def mm_decoder(self) -> DecoderSpec:
        return DecoderSpec(self.build, WeightMap(rename=((r"decoder\.", ""),)), fake_cross.LENGTH)

    def build(self, context: BuildContext) -> fake_cross.CrossDecoder:
        return self.decoder().to(context.device)

    def decoder(self) -> fake_cross.CrossDecoder:
        return fake_cross.CrossDecoder(reads_text=self.reads_text, vocab_size=self.vocab_size)


def make_checkpoint(path: Path, kind: str) -> tuple[Path, Plugin]:
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(path)
    plugin = Plugin(kind, len(tokenizer))
    (path / "config.json").write_text(json.dumps({"architectures": ["FakeCross"], "torch_dtype": "float32"}))
    tensors = {}
    for name, module in (("decoder", plugin.decoder()), ("fusion", plugin.mm_fusion(None))):
        if isinstance(module, torch.nn.Module):
            randomize_(module)
            tensors |= {f"{name}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    return path, plugin


KINDS = ("cross_attention", "encoder_decoder")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WHERE = [
    *(pytest.param((kind, "cpu"), id=kind) for kind in KINDS),
    *(pytest.param((kind, "cuda"), id=f"{kind}-gpu", marks=ON_GPU) for kind in KINDS),
]


@pytest.fixture(scope="module", params=WHERE)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """On a GPU with graphs."""
    kind, device = request.param
    path, plugin = make_checkpoint(tmp_path_factory.mktemp(kind), kind)
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "kv_cache_config": KvCacheConfig(num_blocks=16)}
    settings |= {"overlap": True, "record_timeline": True}
    with Engine.from_pretrained(path, plugins=[plugin], device=device, **settings) as made:
        yield made


def ask(engine: Engine, width: int, text: str) -> TextPrompt:
    placeholder = engine._frontend.model.processor.placeholder("image") or ""
    return TextPrompt(prompt=placeholder + text, multi_modal_data={"image": [Image.new("RGB", (width, 20))]})


@torch.inference_mode()
def expected(engine: Engine, width: int, text: str, count: int = 8) -> list[int]:
    """Greedy tokens by dense attention over all that went before, one at a time."""
    model = engine._frontend.model
    decoder: Any = copy.deepcopy(model.decoder).cpu()
    prompt = model.processor.tokenizer.encode(text, add_special_tokens=False)
    rows, ids = rows_of(width), list(prompt)
    if model.modules.reads_text:
        fusion: Any = copy.deepcopy(model.fusion).cpu()
        (placed,) = fusion.condition([rows], [(len(text),)])
        embeds = torch.cat([placed, decoder.embed(torch.tensor(prompt, dtype=torch.long))])
        rows = decoder.encode_source(embeds, torch.tensor([0, len(embeds)], dtype=torch.int32), len(embeds))
        ids = list(fusion.decoder_prompt)
    begin = len(ids)
    for _ in range(count):
        ids.append(int(decoder.logits(decoder.dense(ids, rows)[-1:]).argmax()))
    return ids[begin:]


def test_answers_are_those_of_dense_attention(engine: Engine) -> None:
    """More requests than may run, some of them alike, in a cache that is too small to keep all sources."""
    asked = [(20 + 10 * (i % 9), ("What is this?", "Describe the picture in one sentence.")[i % 2]) for i in range(24)]
    before = engine.stats()["computed_sources"]
    outputs = engine.generate([ask(engine, *each) for each in asked], GREEDY)
    found = [list(output.token_ids) for output in outputs]
    assert found == [expected(engine, *each) for each in asked]
    assert len({tuple(tokens) for tokens in found}) > 4, "the pictures do not matter"
    different = 18 if engine._frontend.model.modules.reads_text else 9
    assert different <= engine.stats()["computed_sources"] - before <= 24
    assert engine.stats()["block_evictions"] > 0
    settle(engine)


def test_a_source_that_is_there_is_not_computed_again(engine: Engine) -> None:
    stats = engine.stats()
    prompt = ask(engine, 104, "What is the cat doing in the picture?")
    first = engine.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, n=3))[0]
    again = engine.generate(prompt, GREEDY)[0]
    assert engine.stats()["computed_sources"] == stats["computed_sources"] + 1
    assert {o.token_ids for o in first.outputs} == {again.token_ids}
    runner = engine._frontend._core.runner
    calls = runner.sources.calls
    assert engine.generate(prompt, GREEDY)[0].token_ids == again.token_ids
    assert runner.sources.calls == calls


def test_the_timeline_tells_what_is_projected_and_read(engine: Engine) -> None:
    engine.timeline()
    engine.generate(ask(engine, 122, "Is it a cat?"), GREEDY)
    spans = engine.timeline()
    (source,) = [s for s in spans if s.track == "decoder" and s.name == "source"]
    steps = [s for s in spans if s.track == "decoder" and s.name in ("prefill", "decode")]
    rows = source.args["projected"]
    assert rows >= 2
    assert steps
    assert {s.args["source_tokens"] for s in steps} == {rows}


def test_a_failing_source_or_item_ends_its_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = engine._frontend.model.decoder
    fine = ask(engine, 48, "What is this?")
    wanted = engine.generate(fine, GREEDY)[0].token_ids
    text = "The cat sleeps."
    length = len(engine._frontend.model.processor.tokenizer.encode(text, add_special_tokens=False))
    monkeypatch.setattr(decoder, "broken", {2 + length if engine._frontend.model.modules.reads_text else 29})
    prompts = [ask(engine, BROKEN, "What?"), ask(engine, 58, text), ask(engine, 46, "What is this picture?"), fine]
    with pytest.raises(BatchError) as caught:
        engine.generate(prompts, GREEDY)
    failed = caught.value.errors
    assert set(failed) == {0, 1}
    assert all(isinstance(error, PluginError) for error in failed.values())
    monkeypatch.setattr(decoder, "broken", set())
    assert list(engine.generate(prompts[1], GREEDY)[0].token_ids) == expected(engine, 58, text)
    assert engine.generate(fine, GREEDY)[0].token_ids == wanted
    settle(engine)


def test_a_fusions_weights_are_loaded_and_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, plugin = make_checkpoint(tmp_path, "encoder_decoder")
    tensors = load_file(path / "model.safetensors")
    with Engine.from_pretrained(path, plugins=[plugin], device="cpu") as engine:
        fusion: Any = engine._frontend.model.fusion
        assert not fusion.training
        torch.testing.assert_close(fusion.proj.weight, tensors["fusion.proj.weight"])
    save_file({k: v for k, v in tensors.items() if k != "fusion.proj.bias"}, path / "model.safetensors")
    with caplog.at_level(logging.CRITICAL), pytest.raises(CheckpointError, match=r"proj\.bias"):
        Engine.from_pretrained(path, plugins=[plugin], device="cpu")


def test_parts_that_do_not_fit_are_refused_at_load(tmp_path: Path) -> None:
    path, plugin = make_checkpoint(tmp_path, "cross_attention")
    plugin.mm_fusion = hookimpl(lambda: SimpleNamespace(kind="embed", positions=lambda ids, ranges: None))  # type: ignore[method-assign]
    with pytest.raises(PluginError, match="Family 'fake' fuses by 'embed'"):
        Engine.from_pretrained(path, plugins=[plugin], device="cpu")
