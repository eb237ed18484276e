"""Seq2SeqDecoder equals transformers' Whisper and mBART decoders, in every way of stepping."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
import transformers
from support.loading import load_renamed, renamed
from support.tiny import randomize_

from mm_core.decoders import Seq2SeqConfig, Seq2SeqDecoder, seq2seq_weight_map
from mm_core.errors import CheckpointError, ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.layers import AttentionMetadata, ForwardContext, LayerCache

TOLERANCE = 5e-4  # of logits, in float32
BLOCK = 16
VOCAB = 199
COMMON = {"vocab_size": VOCAB, "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4,
          "decoder_ffn_dim": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WHISPER = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "max_source_positions": 50,
           "num_mel_bins": 8, "max_target_positions": 96, "begin_suppress_tokens": None}  # fmt: skip
CASES = {
    "whisper": ("Whisper", {}),
    "whisper-relu-untied": ("Whisper", {"activation_function": "relu", "tie_word_embeddings": False}),
    "mbart": ("MBart", {"scale_embedding": True, "tie_word_embeddings": False}),
    "mbart-tied": ("MBart", {}),
}
NAMES = {"Whisper": ("model.decoder.", "proj_out."), "MBart": ("model.decoder.", "lm_head.")}


class Batch:
    """One pool of blocks for sequences and sources, dealt in random order; sources are written at once."""

    def __init__(self, decoder: Seq2SeqDecoder, lengths: Sequence[int], sources: Sequence[torch.Tensor]) -> None:
        spec = decoder.kv_specs[0]
        sizes = [*lengths, *(len(s) for s in sources)]
        counts = [-(-n // BLOCK) for n in sizes]
        free = list(range(sum(counts) + 3))
        random.Random(len(sizes)).shuffle(free)
        tables = torch.zeros((len(sizes), max(counts)), dtype=torch.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        self.tables = {"self": tables[: len(lengths)], "cross": tables[len(lengths) :]}
        shape = (sum(counts) + 3, BLOCK, spec.kv_heads, spec.head_dim)
        # NaN where nothing was written: reading it shows
        pool = [LayerCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(spec.layers)]
        self.caches = {"self": pool, "cross": pool}
        self.decoder = decoder
        self.done = [0] * len(lengths)
        self.source_lens = [len(s) for s in sources]
        slots = torch.cat([self._slots("cross", i, range(len(s))) for i, s in enumerate(sources)])
        meta = self._meta("cross", [0] * len(sources), self.source_lens, slots)
        decoder.write_source(torch.cat(list(sources)), ForwardContext({"cross": meta}, self.caches))

    def _slots(self, table: str, row: int, places: range) -> torch.Tensor:
        index = torch.arange(places.start, places.stop)
        return self.tables[table][row, index // BLOCK].long() * BLOCK + index % BLOCK

    def _meta(
        self, table: str, queries: Sequence[int], keys: Sequence[int], slots: torch.Tensor | None
    ) -> AttentionMetadata:
        return AttentionMetadata(
            block_tables=self.tables[table],
            cu_seqlens_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
            kv_lens=torch.tensor(keys, dtype=torch.int32),
            slot_mapping=slots,
            max_q_len=max(queries),
            max_kv_len=max(keys),
            causal=table == "self",
        )

    def step(self, chunks: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states after one chunk of each sequence."""
        counts = [len(c) for c in chunks]
        places = [range(d, d + n) for d, n in zip(self.done, counts, strict=True)]
        slots = torch.cat([self._slots("self", i, p) for i, p in enumerate(places)])
        self.done = [p.stop for p in places]
        tables = {
            "self": self._meta("self", counts, self.done, slots),
            "cross": self._meta("cross", counts, self.source_lens, None),
        }
        positions = torch.cat([torch.arange(p.start, p.stop) for p in places]).int()[None]
        embeds = self.decoder.embed(torch.cat(list(chunks)))
        kept = embeds.clone()
        hidden = self.decoder(embeds, positions, ForwardContext(tables, self.caches, rows))
        assert torch.equal(embeds, kept)
        return hidden


def build(case: str) -> tuple[torch.nn.Module, Seq2SeqDecoder]:
    name, extra = CASES[case]
    sizes = WHISPER if name == "Whisper" else {"max_position_embeddings": 96, "encoder_layers": 1}
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **sizes, **extra})
    reference = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomize_(reference, seed=3)
    ours = Seq2SeqConfig.from_config(config.to_dict())
    decoder = Seq2SeqDecoder(ours, BuildContext(torch.device("cpu"), torch.float32, 96))
    names = seq2seq_weight_map(*NAMES[name], tied=ours.tied)
    unused = load_renamed(decoder, reference.state_dict(), names)
    assert not [n for n in unused if "decoder" in n]
    return reference, decoder


def wanted(reference: torch.nn.Module, ids: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Logits [len(ids), vocab] of transformers' decoder."""
    states = reference.model.decoder(input_ids=ids[None], encoder_hidden_states=source[None]).last_hidden_state[0]
    head = reference.proj_out if hasattr(reference, "proj_out") else reference.lm_head
    return head(states)


def inputs(lengths: Sequence[int], sources: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]
    return ids, [torch.randn((n, COMMON["d_model"]), generator=generator) for n in sources]


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_the_reference_in_every_way_of_stepping(case: str) -> None:
    reference, decoder = build(case)
    lengths = [37, 4, 70, 16]
    ids, sources = inputs(lengths, [50, 1, 33, 16])
    want = [wanted(reference, i, s) for i, s in zip(ids, sources, strict=True)]
    other = wanted(reference, ids[0], sources[2])
    assert (other - want[0]).abs().max() > 0.1, "the source does not matter: this proves nothing"

    got = decoder.logits(Batch(decoder, lengths, sources).step(ids)).split(lengths)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)

    # Chunks, then token by token; shorter sequences are finished earlier
    batch, parts = Batch(decoder, lengths, sources), [[] for _ in ids]
    for start, end in ((0, 16), (16, 66), (66, 67), (67, 68), (68, 70)):
        chunks = [i[start:end] for i in ids]
        for part, hidden in zip(parts, batch.step(chunks).split([len(c) for c in chunks]), strict=True):
            part.append(decoder.logits(hidden))
    for ours, theirs in zip(parts, want, strict=True):
        torch.testing.assert_close(torch.cat(ours), theirs, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_wanted_rows_alone_are_the_same_rows() -> None:
    _, decoder = build("whisper")
    ids, sources = inputs([37, 5, 20], [20, 30, 40])
    rows = torch.tensor([61, 3, 36])
    whole, batch = Batch(decoder, [40, 5, 20], sources), Batch(decoder, [40, 5, 20], sources)
    torch.testing.assert_close(batch.step(ids, rows), whole.step(ids)[rows], atol=1e-5, rtol=0)
    for ours, theirs in zip(batch.caches["self"], whole.caches["self"], strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("case", ["whisper", "mbart"])
@torch.inference_mode()
def test_packed_weights_give_the_same_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.layers.packing.MIN_ELEMENTS", 1)
    reference, decoder = build(case)
    for module in decoder.modules():
        getattr(module, "finish_loading", lambda: None)()
    assert decoder.layers[0].self_attn.qkv_proj.weight.numel() == 0
    assert (decoder.packed_head is not None) == decoder.config.tied
    (ids,), (source,) = inputs([33], [21])
    got = decoder.logits(Batch(decoder, [33], [source]).step([ids]))
    torch.testing.assert_close(got, wanted(reference, ids, source), atol=TOLERANCE, rtol=0)


def test_both_tables_share_one_shape() -> None:
    _, decoder = build("whisper")
    first, second = decoder.kv_specs
    assert (first.name, second.name) == ("self", "cross")
    assert (first.layers, first.kv_heads, first.head_dim) == (second.layers, second.kv_heads, second.head_dim)


def test_the_weight_map_knows_both_layouts() -> None:
    whisper = seq2seq_weight_map(tied=True)
    nougat = seq2seq_weight_map("decoder.model.decoder.", "decoder.lm_head.", tied=False)
    for prefix, head, names in (
        ("model.decoder.", "proj_out.", whisper),
        ("decoder.model.decoder.", "decoder.lm_head.", nougat),
    ):
        layer = f"{prefix}layers.11."
        assert renamed(f"{layer}self_attn.k_proj.weight", names) == ("layers.11.self_attn.qkv_proj.weight", 1)
        assert renamed(f"{layer}self_attn.v_proj.bias", names) == ("layers.11.self_attn.qkv_proj.bias_2", None)
        assert renamed(f"{layer}encoder_attn.v_proj.bias", names) == ("layers.11.encoder_attn.kv_proj.bias_1", None)
        assert renamed(f"{layer}encoder_attn.q_proj.bias", names) == ("layers.11.encoder_attn.q_proj.bias", None)
        assert renamed(f"{prefix}layer_norm.weight", names) == ("layer_norm.weight", None)
        assert renamed(f"{head}weight", names) == ("lm_head.weight", None)
        assert renamed("model.encoder.layers.0.fc1.weight", names) is None


def test_settings_that_make_no_sense_are_named() -> None:
    with pytest.raises(ConfigError, match="model_type='bart'"):
        Seq2SeqConfig.from_config({"model_type": "bart"})
    with pytest.raises(ConfigError, match="'swish2'"):
        Seq2SeqConfig.from_config({"model_type": "whisper", "activation_function": "swish2"})
    with pytest.raises(CheckpointError, match="multiple"):
        Seq2SeqConfig.from_config({"model_type": "whisper", "d_model": 100, "decoder_attention_heads": 6})
