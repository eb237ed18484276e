"""mm-core's conformance kit on a tiny Qwen2-Audio, beside transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from transformers import (
    AutoProcessor,
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from mm_core.testing import Answer, Case, Conformance, greedy, randomize_, sound, tiny_tokenizer, write_json

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"]
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
SECONDS, RATE = 5, 16000


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@cache
def model_and_processor(path: Path) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    return Qwen2AudioForConditionalGeneration.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


class TestQwen2Audio(Conformance):
    cases = (
        Case("audio", turn(f"{AUDIO}What does the speaker say?"), {"audio": sound(1, 1.37)}),
        Case("two sounds", turn(f"{AUDIO}And{AUDIO}this?"), {"audio": [sound(2, 0.4), sound(3, 2.0)]}),
        Case("short", turn(f"{AUDIO}What do you hear?"), {"audio": sound(4, 0.1)}),
        Case("whole window", turn(f"{AUDIO}What do you hear?"), {"audio": sound(5, SECONDS)}),
        Case("text", "The quick brown fox jumps over the lazy dog"),
    )

    def checkpoint(self, directory: Path) -> Path:
        tokenizer = tiny_tokenizer(SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")
        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
        config = Qwen2AudioConfig(
            audio_config={
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "num_mel_bins": 16,
                "max_source_positions": SECONDS * 50,
            },
            text_config={
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
            },
            audio_token_index=ids["<|AUDIO|>"],
        )
        model = Qwen2AudioForConditionalGeneration(config)
        randomize_(model, seed=4, quiet_rows=range(min(ids.values()), len(tokenizer)))
        model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
        model.save_pretrained(directory)
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
        Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(directory)
        return directory

    def reference(self, path: Path, case: Case) -> Answer:
        model, processor = model_and_processor(path)
        sounds = [samples for samples, _ in case.items.get("audio", [])]
        media = {"audio": sounds, "sampling_rate": RATE} if sounds else {}
        return greedy(model, processor(text=str(case.prompt), return_tensors="pt", **media), self.max_tokens)


class TestHubLayout(TestQwen2Audio):
    """The same checkpoint with its settings where the hub's have them."""

    rungs = ("parity", "keys")

    def checkpoint(self, directory: Path) -> Path:
        path = super().checkpoint(directory)
        nested = json.loads((path / "processor_config.json").read_text())["feature_extractor"]
        write_json(path / "preprocessor_config.json", {**nested, "processor_class": "Qwen2AudioProcessor"})
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
        write_json(path / "config.json", config)
        for name in ("processor_config.json", "chat_template.jinja"):
            (path / name).unlink()
        return path
