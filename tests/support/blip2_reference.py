"""transformers as the reference: greedy tokens and logits of a BLIP-2 or InstructBLIP checkpoint, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Answer:
    """prompt_ids: image tokens included. token_ids: greedy. logits: [tokens, vocab]."""

    prompt_ids: list[int]
    token_ids: list[int]
    logits: torch.Tensor


class Reference:
    def __init__(self, path: Path) -> None:
        import transformers
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        self.model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.is_t5 = self.model.config.text_config.model_type == "t5"
        self.images = BlipImageProcessorPil.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        count = self.model.config.num_query_tokens
        if self.model.config.model_type == "instructblip":
            reader = transformers.AutoTokenizer.from_pretrained(path / "qformer_tokenizer")
            self.processor: Any = transformers.InstructBlipProcessor(self.images, tokenizer, reader, count)
        else:
            self.processor = transformers.Blip2Processor(self.images, tokenizer, count)

    @torch.inference_mode()
    def generate(self, prompt: str, image: Image.Image | None, max_tokens: int = 12) -> Answer:
        """Without a picture, which the models do not run without: the language model alone."""
        options = {
            "do_sample": False, "max_new_tokens": max_tokens, "return_dict_in_generate": True, "output_logits": True,
        }  # fmt: skip
        if image is None:
            inputs = self.processor.tokenizer([prompt], return_tensors="pt")
            inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            out = self.model.language_model.generate(**inputs, **options)
        else:
            inputs = self.processor(images=image, text=prompt, return_tensors="pt")
            out = self.model.generate(**inputs, **options)
        count = len(out.logits)
        return Answer(inputs["input_ids"][0].tolist(), out.sequences[0, -count:].tolist(), torch.cat(out.logits))
