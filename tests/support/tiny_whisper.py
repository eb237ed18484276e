"""Tiny random Whisper checkpoints, complete on disk, and transformers' answers for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from support.tiny import randomize_

RATE = 16000
LANGUAGES = ("en", "de", "fr")
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun.",
    "There is nothing to see and a good deal to hear; who listens hears the whole of it.",
    "Der Hund schläft, und niemand hört ihm zu. Le chat dort au soleil.",
)
_SPECIAL = (
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
    "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray[Any, Any]:
    """Tones, chirps and noise that change every few tenths of a second: float32 [seconds · rate]."""
    rng = np.random.default_rng(seed)
    count = max(int(seconds * rate), 1)
    times = np.arange(count) / rate
    out = np.zeros(count)
    for begin in np.arange(0.0, seconds, 0.35):
        part = slice(int(begin * rate), int((begin + 0.35) * rate))
        inside = times[part] - begin
        pitch, sweep = rng.uniform(80, 3500), rng.uniform(-2000, 2000)
        tone = np.sin(2 * np.pi * (pitch * inside + sweep * inside**2))
        out[part] = rng.uniform(0.02, 0.5) * tone + rng.uniform(0, 0.05) * rng.standard_normal(len(inside))
    return out.astype(np.float32)


def make_tokenizer(vocab_size: int = 320) -> Any:
    """A Whisper tokenizer: byte-level BPE, then special tokens, then 1,501 timestamps."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import WhisperTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL[1:])})
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False) for i in range(1501)])
    return tokenizer


def make_tiny_whisper(
    root: Path,
    *,
    multilingual: bool = True,
    mels: int = 80,
    layout: Literal["hub", "tf5"] = "hub",
    seed: int = 0,
    stamp_scale: float = 0.6,
    **overrides: Any,
) -> Path:
    """Write a complete checkpoint of width 32; returns its directory. overrides: of config.json.

    stamp_scale: size of the timestamps' embeddings beside those of text: how often they are said.
    """
    import transformers

    name = "-".join(str(p) for p in (multilingual, mels, layout, seed, stamp_scale, *sorted(overrides.items())))
    path = root / "".join(c if c.isalnum() or c in "-." else "_" for c in f"whisper-{name}")
    if path.is_dir():
        return path
    path.mkdir(parents=True)
    tokenizer = make_tokenizer()
    config = _config(tokenizer, mels, overrides)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config)).eval()
    randomize_(model, seed)
    _make_lively(model, tokenizer, seed, stamp_scale)
    model.generation_config = _generation(tokenizer, multilingual)
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    if layout == "tf5":
        model.save_pretrained(path)
        transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(path)
        return path
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k != "proj_out.weight"}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = {"architectures": ["WhisperForConditionalGeneration"], "torch_dtype": "float32", **config}
    (path / "config.json").write_text(json.dumps(text), encoding="utf-8")
    model.generation_config.save_pretrained(path)
    extractor.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _config(tokenizer: Any, mels: int, overrides: dict[str, Any]) -> dict[str, Any]:
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in _SPECIAL}
    end = ids["<|endoftext|>"]
    return {
        "model_type": "whisper", "vocab_size": len(tokenizer), "num_mel_bins": mels, "d_model": 32,
        "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 2,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "max_source_positions": 1500,
        "max_target_positions": 448, "activation_function": "gelu", "scale_embedding": False,
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"], "is_encoder_decoder": True, **overrides,
    }  # fmt: skip


def _generation(tokenizer: Any, multilingual: bool) -> Any:
    import transformers

    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in _SPECIAL}
    end = ids["<|endoftext|>"]
    several = {
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
    }
    never = ("<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>")
    return transformers.GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=ids["<|startoftranscript|>"],
        max_length=448, suppress_tokens=[3, 7, *(ids[t] for t in never), ids["<|nospeech|>"]],
        begin_suppress_tokens=[tokenizer.convert_tokens_to_ids("Ġ"), end], is_multilingual=multilingual,
        no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50, return_timestamps=False, **(several if multilingual else {}),
    )  # fmt: skip


@torch.no_grad()
def _make_lively(model: Any, tokenizer: Any, seed: int, stamp_scale: float) -> None:
    """Answers that neither repeat themselves nor consist of timestamps, and that depend on what is heard."""
    decoder = model.model.decoder
    flips = torch.randn(decoder.layer_norm.weight.shape, generator=torch.Generator().manual_seed(seed + 1))
    decoder.layer_norm.weight.mul_(flips.sign())
    table = decoder.embed_tokens.weight
    table.mul_(1.5)
    decoder.embed_positions.weight.mul_(6.0)
    for layer in decoder.layers:
        layer.encoder_attn.q_proj.weight.mul_(1.5)
        layer.encoder_attn.out_proj.weight.mul_(2.5)
    first = tokenizer.convert_tokens_to_ids("<|0.00|>")
    table[first:].mul_(stamp_scale)


@dataclass(frozen=True)
class Heard:
    """token_ids: without the prompt, end token included where there is one; logits: [tokens, vocab], raw."""

    token_ids: list[int]
    logits: torch.Tensor


class WhisperReference:
    """transformers' Whisper in float32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.extractor = AutoFeatureExtractor.from_pretrained(path)
        self.model = AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=torch.float32).eval()

    def features(self, samples: np.ndarray[Any, Any]) -> torch.Tensor:
        """[1, mels, frames]: 3,000, or as many as a longer sound has."""
        whole = {} if len(samples) <= 30 * RATE else {"truncation": False, "padding": "longest"}
        given = self.extractor(samples, sampling_rate=RATE, return_tensors="pt", **whole)
        return given["input_features"]

    @torch.inference_mode()
    def answer(self, samples: np.ndarray[Any, Any], prompt_ids: list[int], max_tokens: int = 24) -> Heard:
        """Greedy, after `prompt_ids` as they stand, under the checkpoint's suppressions."""
        out = self.model.generate(
            self.features(samples), decoder_input_ids=torch.tensor([prompt_ids]), max_new_tokens=max_tokens,
            do_sample=False, return_dict_in_generate=True, output_logits=True, force_unique_generate_call=True,
            language="en" if self.model.generation_config.is_multilingual else None,
        )  # fmt: skip
        return Heard(out.sequences[0, len(prompt_ids) :].tolist(), torch.cat([step.cpu() for step in out.logits]))

    @torch.inference_mode()
    def transcribe(self, samples: np.ndarray[Any, Any], **options: Any) -> list[dict[str, Any]]:
        """Segments of `generate(..., return_timestamps=True)`: start, end, tokens."""
        options = {"return_timestamps": True, "return_segments": True, "do_sample": False, **options}
        out = self.model.generate(self.features(samples), **options)
        return [
            {"start": float(s["start"]), "end": float(s["end"]), "tokens": s["tokens"].tolist()}
            for s in out["segments"][0]
        ]
