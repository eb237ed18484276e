"""OPTDecoder equals transformers' OPT, with norms before and after the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from support.loading import load_renamed, renamed
from support.paged import PagedBatch
from support.tiny import randomize_

from mm_core.decoders import OPTConfig, OPTDecoder, opt_weight_map
from mm_core.decoders.default import mm_decoder
from mm_core.decoders.opt import OPT_PREFIXES
from mm_core.errors import CheckpointError, ConfigError
from mm_core.hookspecs import BuildContext

TOLERANCE = 5e-4  # of logits, in float32
SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "ffn_dim": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CASES: Mapping[str, dict[str, Any]] = {
    "before": {},
    "after": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 48, "do_layer_norm_before": False},
    "projected-before": {"word_embed_proj_dim": 48},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
}


def build(case: str) -> tuple[Any, OPTDecoder]:
    config = transformers.OPTConfig(**{**SIZES, **CASES[case]})
    reference = transformers.OPTForCausalLM(config).eval()
    randomize_(reference, seed=3)
    ours = OPTConfig.from_text_config(config.to_dict())
    decoder = OPTDecoder(ours, BuildContext(torch.device("cpu"), torch.float32, 128))
    unused = load_renamed(decoder, reference.state_dict(), opt_weight_map(tied=ours.tied))
    assert not unused
    return reference, decoder


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SIZES["vocab_size"], (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_the_reference_in_every_way_of_stepping(case: str) -> None:
    reference, decoder = build(case)
    ids = prompts(37, 1, 70, 16)
    wanted = [reference(i[None]).logits[0] for i in ids]
    whole = PagedBatch(decoder, [len(i) for i in ids]).logits(ids)
    batch, parts = PagedBatch(decoder, [len(i) for i in ids], seed=1), [[] for _ in ids]
    for start, end in ((0, 16), (16, 29), (29, 69), (69, 70)):
        for part, logits in zip(parts, batch.logits([i[start:end] for i in ids]), strict=True):
            part.append(logits)
    for got, pieces, want in zip(whole, parts, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(torch.cat(pieces), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["before", "projected"])
@torch.inference_mode()
def test_wanted_rows_alone_are_the_same_rows(case: str) -> None:
    _, decoder = build(case)
    ids = prompts(37, 5, 20)
    rows = torch.tensor([61, 3, 36])
    whole, batch = PagedBatch(decoder, [37, 5, 20]), PagedBatch(decoder, [37, 5, 20])
    want = whole.hidden(ids)[rows]
    torch.testing.assert_close(batch.hidden(ids, rows), want, atol=1e-5, rtol=0)
    for ours, theirs in zip(batch.caches["self"], whole.caches["self"], strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2], atol=1e-5, rtol=0, equal_nan=True)


@torch.inference_mode()
def test_packed_weights_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.layers.packing.MIN_ELEMENTS", 1)
    reference, decoder = build("before")
    for module in decoder.modules():
        getattr(module, "finish_loading", lambda: None)()
    assert decoder.packed_head is not None
    (ids,) = prompts(33)
    (got,) = PagedBatch(decoder, [33]).logits([ids])
    torch.testing.assert_close(got, reference(ids[None]).logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", OPT_PREFIXES)
def test_weight_map_knows_every_prefix(prefix: str) -> None:
    names = opt_weight_map()
    assert renamed(f"{prefix}layers.11.self_attn.k_proj.bias", names) == ("layers.11.self_attn.qkv_proj.bias", 1)
    assert renamed(f"{prefix}layers.0.fc1.weight", names) == ("layers.0.fc1.weight", None)
    assert renamed(f"{prefix}final_layer_norm.weight", names) == ("final_layer_norm.weight", None)
    assert renamed(f"{prefix}embed_positions.weight", names) == ("embed_positions.weight", None)
    for other in ("vision_model.encoder.layers.0.mlp.fc1.weight", "qformer.encoder.layer.0.x", "model.layers.0.x"):
        assert renamed(other, names) is None


def test_settings_that_make_no_sense_are_named() -> None:
    with pytest.raises(ConfigError, match="'swish'"):
        OPTConfig.from_text_config({**SIZES, "activation_function": "swish"})
    with pytest.raises(CheckpointError, match="hidden_size 64"):
        OPTConfig.from_text_config({**SIZES, "num_attention_heads": 5})


class _Checkpoint:
    """As much of a checkpoint as the default hook reads."""

    text_config: Mapping[str, Any] = {**SIZES, "model_type": "opt"}


def test_the_default_hook_knows_opt() -> None:
    spec = mm_decoder("any", _Checkpoint())  # type: ignore[arg-type]
    assert spec is not None
    assert spec.max_model_len == 128
    decoder = spec.build(BuildContext(torch.device("cpu"), torch.bfloat16, 64))
    assert isinstance(decoder, OPTDecoder)
    assert decoder.lm_head is None
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
