"""LlamaDecoder equals transformers' Llama, Mistral, Qwen2 and the Qwen2-VL text model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import transformers
from support.loading import load_renamed, renamed
from support.tiny import randomize_

from mm_core.decoders.default import mm_decoder
from mm_core.decoders.llama import PREFIXES, LlamaConfig, LlamaDecoder, llama_weight_map
from mm_core.errors import ConfigError, NotBuiltError
from mm_core.hookspecs import BuildContext
from mm_core.layers import AttentionMetadata, ForwardContext, LayerCache, RopeConfig, rope_inv_freq

TOLERANCE = 5e-4  # of logits, in float32
BLOCK = 16
SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama-head-dim": ("Llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama3": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 10000.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-in-window": ("Mistral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-unused-window": ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}),
}  # fmt: skip


def flat(config: transformers.PreTrainedConfig) -> dict[str, object]:
    """The text settings as Checkpoint.text_config spells them."""
    values = config.to_dict()
    rope = values.pop("rope_parameters")
    return {**values, "rope_theta": rope["rope_theta"], "rope_scaling": rope}


class Batch:
    """Paged caches for some sequences, their blocks dealt in random order."""

    def __init__(self, decoder: LlamaDecoder, lengths: Sequence[int], seed: int = 0) -> None:
        (spec,) = decoder.kv_specs
        counts = [-(-n // BLOCK) for n in lengths]
        free = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(free)
        self.tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        shape = (sum(counts) + 3, BLOCK, spec.kv_heads, spec.head_dim)
        # NaN where nothing was written: reading it shows
        self.caches = [LayerCache(*torch.full((2, *shape), torch.nan)) for _ in range(spec.layers)]
        self.decoder = decoder
        self.done = [0] * len(lengths)

    def step(self, chunks: Sequence[torch.Tensor], positions: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Run one chunk of each sequence; returns its logits [len(chunk), vocab] by sequence."""
        hidden = self.hidden(chunks, positions)
        return list(self.decoder.logits(hidden).split([len(c) for c in chunks]))

    def hidden(
        self,
        chunks: Sequence[torch.Tensor],
        positions: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The decoder's output for one chunk of each sequence."""
        counts = [len(c) for c in chunks]
        index = [torch.arange(d, d + n) for d, n in zip(self.done, counts, strict=True)]
        slots = [self.tables[s, i // BLOCK].long() * BLOCK + i % BLOCK for s, i in enumerate(index)]
        self.done = [d + n for d, n in zip(self.done, counts, strict=True)]
        meta = AttentionMetadata(
            block_tables=self.tables.clamp(min=0),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
            kv_lens=torch.tensor(self.done, dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            max_q_len=max(counts),
            max_kv_len=max(self.done),
        )
        if positions is None:
            positions = torch.cat(index).int().expand(self.decoder.position_axes, -1)
        embeds = self.decoder.embed(torch.cat(list(chunks)))
        kept = embeds.clone()
        hidden = self.decoder(embeds, positions, ForwardContext({"self": meta}, {"self": self.caches}, rows))
        assert torch.equal(embeds, kept)
        return hidden


def build(case: str) -> tuple[torch.nn.Module, LlamaDecoder]:
    name, extra = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra})
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize_(reference, seed=3)
    ours = LlamaConfig.from_text_config(flat(config))
    decoder = LlamaDecoder(ours, BuildContext(torch.device("cpu"), torch.float32, 256))
    assert not load_renamed(decoder, reference.state_dict(), llama_weight_map(tied=ours.tied))
    return reference, decoder


def prompts(lengths: Sequence[int], vocab: int = SIZES["vocab_size"]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_the_reference_in_every_way_of_stepping(case: str) -> None:
    reference, decoder = build(case)
    lengths = [37, 1, 70, 16]
    ids = prompts(lengths)
    wanted = [reference(i[None]).logits[0] for i in ids]

    whole = Batch(decoder, lengths).step(ids)
    for got, want in zip(whole, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)

    # Chunks that end inside and at the end of blocks; shorter sequences are finished earlier
    batch, parts = Batch(decoder, lengths, seed=1), [[] for _ in ids]
    for start, end in ((0, 16), (16, 29), (29, 70)):
        for part, logits in zip(parts, batch.step([i[start:end] for i in ids]), strict=True):
            part.append(logits)
    for got, want in zip(parts, wanted, strict=True):
        torch.testing.assert_close(torch.cat(got), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["llama3", "qwen2-tied"])
@torch.inference_mode()
def test_decoding_token_by_token_equals_the_reference(case: str) -> None:
    reference, decoder = build(case)
    ids = prompts([44, 20, 31])
    prefilled = [40, 3, 17]
    batch = Batch(decoder, [len(i) for i in ids])
    last = batch.step([i[:n] for i, n in zip(ids, prefilled, strict=True)])
    got = [[p[-1]] for p in last]
    for step in range(4):
        for row, logits in enumerate(
            batch.step([i[n + step : n + step + 1] for i, n in zip(ids, prefilled, strict=True)])
        ):
            got[row].append(logits[0])
    for row, (i, n) in enumerate(zip(ids, prefilled, strict=True)):
        want = reference(i[None, : n + 4]).logits[0, n - 1 :]
        torch.testing.assert_close(torch.stack(got[row]), want, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_wanted_rows_alone_are_the_same_rows() -> None:
    _, decoder = build("qwen2")
    ids = prompts([37, 5, 20])
    rows = torch.tensor([61, 3, 36])
    whole, batch = Batch(decoder, [40, 5, 20]), Batch(decoder, [40, 5, 20])
    want = whole.hidden(ids)[rows]
    torch.testing.assert_close(batch.hidden(ids, rows=rows), want, atol=1e-5, rtol=0)
    none = [torch.zeros(1, dtype=torch.int64), ids[1][:0], ids[2][:0]]
    assert batch.hidden(none, rows=rows[:0]).shape == (0, decoder.hidden_size)  # a chunk inside a prompt
    whole.hidden(none)
    # Keys and values of the others are there all the same
    for ours, theirs in zip(batch.caches, whole.caches, strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("case", ["llama-head-dim", "qwen2-tied"])
@torch.inference_mode()
def test_packed_weights_give_the_same_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.layers.packing.MIN_ELEMENTS", 1)
    reference, decoder = build(case)
    for _ in range(2):  # a second time changes nothing
        for module in decoder.modules():
            getattr(module, "finish_loading", lambda: None)()
    assert decoder.layers[0].self_attn.qkv_proj.weight.numel() == 0
    assert (decoder.packed_head is not None) == decoder.config.tied
    (ids,) = prompts([33])
    (got,) = Batch(decoder, [33]).step([ids])
    torch.testing.assert_close(got, reference(ids[None]).logits[0], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_mrope_positions_equal_the_reference() -> None:
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2VLTextConfig(**SIZES, rope_parameters=rope)
    reference = transformers.Qwen2VLTextModel(config).eval()
    randomize_(reference, seed=4)
    decoder = LlamaDecoder(
        LlamaConfig.from_text_config(flat(config), tied=True),
        BuildContext(torch.device("cpu"), torch.float32, 256),
    )
    load_renamed(
        decoder,
        {f"model.language_model.{k}": v for k, v in reference.state_dict().items()},
        llama_weight_map(tied=True),
    )
    assert decoder.position_axes == 3
    (ids,) = prompts([50])
    positions = torch.randint(300, (3, 50), generator=torch.Generator().manual_seed(2))  # past max_model_len too
    want = reference(input_ids=ids[None], position_ids=positions[:, None], use_cache=False).last_hidden_state[0]
    (got,) = Batch(decoder, [50]).step([ids], positions.int())
    torch.testing.assert_close(got, decoder.logits(want), atol=TOLERANCE, rtol=0)
    (plain,) = Batch(decoder, [50]).step([ids])
    assert (plain - got).abs().max() > 0.1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weight_map_knows_every_prefix(prefix: str) -> None:
    names = llama_weight_map()
    assert renamed(f"{prefix}layers.11.self_attn.k_proj.bias", names) == ("layers.11.self_attn.qkv_proj.bias", 1)
    assert renamed(f"{prefix}layers.0.mlp.up_proj.weight", names) == ("layers.0.mlp.gate_up_proj.weight", 1)
    assert renamed(f"{prefix}layers.0.mlp.down_proj.weight", names) == ("layers.0.mlp.down_proj.weight", None)
    assert renamed(f"{prefix}embed_tokens.weight", names) == ("embed_tokens.weight", None)
    assert renamed(f"{prefix}norm.weight", names) == ("norm.weight", None)
    assert renamed(f"{prefix}layers.0.self_attn.rotary_emb.inv_freq", names) is None


def test_weight_map_leaves_other_modules_alone() -> None:
    names = llama_weight_map()
    assert renamed("lm_head.weight", names) == ("lm_head.weight", None)
    assert renamed("language_model.lm_head.weight", names) == ("lm_head.weight", None)
    for name in ("visual.blocks.0.norm1.weight", "model.visual.merger.ln_q.weight", "vision_tower.layers.0.x"):
        assert renamed(name, names) is None
    assert llama_weight_map(tied=True).tied == {"lm_head.weight": "embed_tokens.weight"}


def test_a_window_that_would_matter_is_refused() -> None:
    config = LlamaConfig.from_text_config({**SIZES, "model_type": "mistral", "sliding_window": 64})
    with pytest.raises(NotBuiltError, match="max_model_len=64"):
        LlamaDecoder(config, BuildContext(torch.device("meta"), torch.float32, 65))
    LlamaDecoder(config, BuildContext(torch.device("cpu"), torch.float32, 64))


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, None),
        ({"model_type": "llama", "sliding_window": 64, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_a_window_counts_where_a_layer_uses_it(settings: dict[str, object], window: int | None) -> None:
    assert LlamaConfig.from_text_config({**SIZES, **settings}).sliding_window == window


def test_rope_types_that_are_not_built_are_named() -> None:
    with pytest.raises(ConfigError, match="'yarn'"):
        rope_inv_freq(RopeConfig.from_text_config({"rope_scaling": {"type": "yarn", "factor": 4.0}}), 32)
    with pytest.raises(ConfigError, match="'factor'"):
        rope_inv_freq(RopeConfig(10000.0, "linear"), 32)


class _Checkpoint:
    """As much of a checkpoint as the default hook reads."""

    def __init__(self, text_config: dict[str, object]) -> None:
        self.text_config = text_config


def test_the_default_hook_knows_its_types_and_no_others() -> None:
    spec = mm_decoder("any", _Checkpoint({**SIZES, "model_type": "qwen2", "tie_word_embeddings": True}))
    assert spec is not None
    assert spec.max_model_len == 256
    assert spec.weight_map.tied == {"lm_head.weight": "embed_tokens.weight"}
    decoder = spec.build(BuildContext(torch.device("cpu"), torch.bfloat16, 128))
    assert decoder.lm_head is None
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert mm_decoder("any", _Checkpoint({"model_type": "gpt2"})) is None
