"""A tiny random Nougat checkpoint, and transformers as its reference."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from support.tiny import make_tiny_tokenizer, randomize_

SIZE = {"height": 96, "width": 64}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _tokenizer() -> Any:
    """A byte-level vocabulary with Nougat's special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import NougatTokenizer

    source = json.loads(make_tiny_tokenizer(320).backend_tokenizer.to_str())["model"]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for token in sorted(source["vocab"], key=source["vocab"].get):
        vocab.setdefault(token, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in source["merges"]], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return NougatTokenizer(tokenizer_object=backend, model_max_length=512, **_SPECIAL)


def make_tiny_nougat(root: Path, layout: str = "hub", width: int = 32, seed: int = 0, **swin: Any) -> Path:
    """Write a complete checkpoint; `width` is the decoder's (the encoder's is 32). layout: what the hub holds,
    or what transformers 5 writes. swin: settings of the encoder."""
    from transformers import (
        DonutSwinConfig,
        GenerationConfig,
        MBartConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
    )

    path = root / f"nougat-{layout}-{width}-{seed}-{'-'.join(map(str, swin.values()))}"
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, **swin}
    encoder = DonutSwinConfig(image_size=[SIZE["height"], SIZE["width"]], patch_size=4, **sizes)
    decoder = MBartConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16, d_model=width, decoder_layers=2, encoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=256, scale_embedding=True,
        add_final_layer_norm=True, is_decoder=True, add_cross_attention=True, forced_eos_token_id=None,
        tie_word_embeddings=False, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, tie_word_embeddings=False)
    config.decoder_start_token_id = 0
    config.pad_token_id = 1
    model = VisionEncoderDecoderModel(config=config).eval()
    model.decoder.config.tie_word_embeddings = False
    randomize_(model, seed, quiet_rows=range(4))
    generation = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, decoder_start_token_id=0)
    model.generation_config = generation
    tokenizer.save_pretrained(path)
    settings = {"image_processor_type": "NougatImageProcessor", "size": SIZE, "resample": 2}
    if layout == "tf5":
        model.save_pretrained(path)
        (path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
        return path
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, "size": [SIZE["height"], SIZE["width"]]}))
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["VisionEncoderDecoderModel"]}))
    generation.save_pretrained(path)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path / "model.safetensors")
    return path


class NougatReference:
    """Greedy answers of transformers in fp32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.models.nougat.image_processing_pil_nougat import NougatImageProcessorPil

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.processor = NougatImageProcessorPil(size=SIZE)
            self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def generate(
        self, image: Image.Image, max_tokens: int = 16, prompt: tuple[int, ...] = (0,)
    ) -> tuple[list[int], torch.Tensor]:
        out = self.model.generate(
            pixel_values=self.pixels(image), decoder_input_ids=torch.tensor([prompt]), do_sample=False, num_beams=1,
            max_new_tokens=max_tokens, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
