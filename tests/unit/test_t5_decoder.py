"""T5Decoder equals transformers' T5 and Flan-T5: text encoder, cross-attention, relative positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from support.loading import load_renamed, renamed
from support.paged import PagedBatch
from support.tiny_blip2 import randomize_t5_

from mm_core.decoders import T5Config, T5Decoder, t5_weight_map
from mm_core.decoders.default import mm_decoder
from mm_core.decoders.relative import bucket
from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext

TOLERANCE = 1e-3  # of logits, in float32
SIZES: Mapping[str, Any] = {
    "vocab_size": 199,
    "d_model": 48,
    "d_kv": 16,  # 4 heads of 16 are wider than the model
    "d_ff": 72,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
CASES: Mapping[str, dict[str, Any]] = {
    "t5": {},
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "few-buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "gated-silu": {"feed_forward_proj": "gated-silu"},
}
SOURCES = (40, 1, 150, 17)  # longer than the 128 tokens within which distances differ
ANSWERS = (20, 9, 140, 1)


def build(case: str, dtype: torch.dtype = torch.float32) -> tuple[Any, T5Decoder]:
    config = transformers.T5Config(**{**SIZES, **CASES[case]})
    reference = transformers.T5ForConditionalGeneration(config).eval()
    randomize_t5_(reference, seed=3, own_head=case == "flan")
    ours = T5Config.from_text_config(config.to_dict())
    assert ours.tied == (case != "flan")
    decoder = T5Decoder(ours, BuildContext(torch.device("cpu"), dtype, 160))
    assert not load_renamed(decoder, reference.state_dict(), t5_weight_map(tied=ours.tied))
    decoder.decoder.finish_loading()
    return reference, decoder


def prompts(lengths: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SIZES["vocab_size"], (n,), generator=generator) for n in lengths]


def encode(decoder: T5Decoder, sources: list[torch.Tensor]) -> torch.Tensor:
    bounds = torch.tensor([0, *map(len, sources)]).cumsum(0).int()
    return decoder.encode_source(decoder.embed(torch.cat(sources)), bounds, max(map(len, sources)))


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_text_encoder_equals_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, decoder = build(case)
    sources = prompts(SOURCES, 1)
    wanted = torch.cat([reference.encoder(s[None]).last_hidden_state[0] for s in sources])
    torch.testing.assert_close(encode(decoder, sources), wanted, atol=1e-4, rtol=0)
    monkeypatch.setattr("mm_core.decoders.t5.SCORES", 1)  # one source at a time
    torch.testing.assert_close(encode(decoder, sources), wanted, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_sources_without_tokens_change_nothing() -> None:
    _, decoder = build("flan")
    sources = prompts((9, 4), 1)
    embeds, want = decoder.embed(torch.cat(sources)), encode(decoder, sources)
    for bounds in ([0, 0, 9, 13], [0, 9, 9, 13], [0, 9, 13, 13]):
        torch.testing.assert_close(decoder.encode_source(embeds, torch.tensor(bounds).int(), 9), want)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_the_reference_in_every_way_of_stepping(case: str) -> None:
    reference, decoder = build(case)
    sources, answers = prompts(SOURCES, 1), prompts(ANSWERS, 2)
    wanted = [
        reference(input_ids=s[None], decoder_input_ids=a[None]).logits[0] for s, a in zip(sources, answers, strict=True)
    ]
    other = reference(input_ids=sources[1][None], decoder_input_ids=answers[0][None]).logits[0]
    assert (other - wanted[0]).abs().max() > 0.1, "the source does not matter: this proves nothing"
    rows = encode(decoder, sources)
    whole = PagedBatch(decoder, ANSWERS, sources=SOURCES)
    whole.write_sources(rows)
    stepped, parts = PagedBatch(decoder, ANSWERS, seed=1, sources=SOURCES), [[] for _ in answers]
    stepped.write_sources(rows)
    for start, end in ((0, 1), (1, 2), (2, 18), (18, 139), (139, 140)):
        for part, logits in zip(parts, stepped.logits([a[start:end] for a in answers]), strict=True):
            part.append(logits)
    for got, pieces, want in zip(whole.logits(answers), parts, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(torch.cat(pieces), want, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_wanted_rows_alone_are_the_same_rows() -> None:
    _, decoder = build("flan")
    sources, answers = prompts(SOURCES, 1), prompts(ANSWERS, 2)
    rows = encode(decoder, sources)
    whole, batch = (PagedBatch(decoder, ANSWERS, sources=SOURCES) for _ in range(2))
    for made in (whole, batch):
        made.write_sources(rows)
    wanted = torch.tensor([160, 3, 36])
    torch.testing.assert_close(batch.hidden(answers, wanted), whole.hidden(answers)[wanted], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_stays_finite_and_near(dtype: torch.dtype) -> None:
    reference, _ = build("flan")
    _, decoder = build("flan", dtype)
    with torch.no_grad():  # the feed-forward layers of real checkpoints grow past float16 as well
        for module in (*reference.modules(), *decoder.modules()):
            if hasattr(module, "wo"):
                module.wo.weight.mul_(3e4)
    sources, answers = prompts((30, 12), 1), prompts((10, 7), 2)
    batch = PagedBatch(decoder, (10, 7), sources=(30, 12), dtype=dtype)
    batch.write_sources(encode(decoder, sources))
    for got, source, answer in zip(batch.logits(answers), sources, answers, strict=True):
        want = reference(input_ids=source[None], decoder_input_ids=answer[None]).logits[0]
        assert got.isfinite().all()
        assert (got.float() - want).abs().mean() < 0.05 * want.abs().mean()


@torch.inference_mode()
def test_packed_weights_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.layers.packing.MIN_ELEMENTS", 1)
    reference, decoder = build("t5")
    for module in decoder.modules():
        getattr(module, "finish_loading", lambda: None)()
    assert decoder.packed_head is not None
    (source,), (answer,) = prompts((33,), 1), prompts((5,), 2)
    batch = PagedBatch(decoder, [5], sources=[33])
    batch.write_sources(encode(decoder, [source]))
    want = reference(input_ids=source[None], decoder_input_ids=answer[None]).logits[0]
    torch.testing.assert_close(batch.logits([answer])[0], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (64, 500)])
def test_buckets_equal_the_reference(buckets: int, far: int, bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-600, 601)
    want = T5Attention._relative_position_bucket(distances, bidirectional, buckets, far)
    assert torch.equal(bucket(distances, buckets, far, bidirectional=bidirectional), want)
    # What the layers rely on: all distances from `far` on share a bucket
    assert len(set(want[distances <= -far].tolist())) == len(set(want[distances >= far].tolist())) == 1


def test_weight_map_knows_every_name() -> None:
    names = t5_weight_map()
    for prefix in ("", "language_model.", "model.language_model."):
        for name, want, shard in (
            ("shared.weight", "shared.weight", None),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.bias.weight", None),
            ("encoder.block.11.layer.0.SelfAttention.k.weight", "encoder.layers.11.attn.qkv.weight", 1),
            ("encoder.block.2.layer.0.layer_norm.weight", "encoder.layers.2.attn_norm.weight", None),
            ("encoder.block.2.layer.1.layer_norm.weight", "encoder.layers.2.mlp_norm.weight", None),
            ("decoder.block.2.layer.1.layer_norm.weight", "decoder.layers.2.cross_norm.weight", None),
            ("decoder.block.2.layer.2.layer_norm.weight", "decoder.layers.2.mlp_norm.weight", None),
            ("decoder.block.2.layer.1.EncDecAttention.v.weight", "decoder.layers.2.cross.kv.weight", 1),
            ("decoder.block.2.layer.2.DenseReluDense.wi_1.weight", "decoder.layers.2.mlp.wi.weight", 1),
            ("decoder.final_layer_norm.weight", "decoder.norm.weight", None),
        ):
            assert renamed(prefix + name, names) == (want, shard)
    for other in ("vision_model.encoder.layers.0.x", "qformer.encoder.layer.0.output.dense.bias"):
        assert renamed(other, names) is None
    assert renamed("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", names) is None
    assert names.tied["encoder.embed_tokens.weight"] == names.tied["lm_head.weight"] == "shared.weight"
    assert "lm_head.weight" not in t5_weight_map(tied=False).tied


def test_settings_that_are_not_built_are_named() -> None:
    for setting in ("gated-tanh", "glu-gelu"):
        with pytest.raises(ConfigError, match=setting):
            T5Config.from_text_config({**SIZES, "feed_forward_proj": setting})


class _Checkpoint:
    """As much of a checkpoint as the default hook reads."""

    text_config: Mapping[str, Any] = {**SIZES, "model_type": "t5", "n_positions": 64}


def test_the_default_hook_knows_t5() -> None:
    spec = mm_decoder("any", _Checkpoint())  # type: ignore[arg-type]
    assert spec is not None
    assert spec.max_model_len == 64
    decoder = spec.build(BuildContext(torch.device("cpu"), torch.bfloat16, 32))
    assert isinstance(decoder, T5Decoder)
    assert decoder.decoder.scores.shape == (4, 32, 32)
    assert {s.name for s in decoder.kv_specs} == {"self", "cross"}
