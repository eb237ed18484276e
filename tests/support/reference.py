"""transformers as the reference: greedy tokens and logits of a Qwen2-VL checkpoint, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Answer:
    """prompt_ids: expanded. token_ids: greedy, stop token included. logits: [tokens, vocab]."""

    prompt_ids: list[int]
    token_ids: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Video:
    """Preprocessed by an independent implementation (transformers' own needs torchvision)."""

    pixel_values: torch.Tensor
    grid_thw: tuple[int, int, int]
    second_per_grid: float


class Reference:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()
        self.merge = self.processor.merge_size**2

    def inputs(self, prompt: str, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()) -> dict[str, Any]:
        """What transformers' Qwen2VLProcessor gives: every pad token repeated, then tokenized."""
        given: dict[str, Any] = {}
        if images:
            given = dict(self.processor(images=[[i] for i in images], return_tensors="pt"))
        grids = given["image_grid_thw"].tolist() if images else []
        text = self._expand(prompt, "<|image_pad|>", [int(np.prod(g)) // self.merge for g in grids])
        text = self._expand(text, "<|video_pad|>", [int(np.prod(v.grid_thw)) // self.merge for v in videos])
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        kinds = torch.zeros_like(ids)
        kinds[ids == self.model.config.image_token_id] = 1
        kinds[ids == self.model.config.video_token_id] = 2
        if videos:
            given["pixel_values_videos"] = torch.cat([v.pixel_values for v in videos])
            given["video_grid_thw"] = torch.tensor([v.grid_thw for v in videos])
            if "Qwen2_5" in type(self.model).__name__:
                given["second_per_grid_ts"] = torch.tensor([v.second_per_grid for v in videos])
        media = {"mm_token_type_ids": kinds} if images or videos else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media, **given}

    def _expand(self, text: str, pad: str, counts: list[int]) -> str:
        pieces = text.split(pad)
        assert len(pieces) == len(counts) + 1, "the test's prompt and media do not match"
        return "".join(p + pad * n for p, n in zip(pieces, [*counts, 0], strict=True))

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        max_tokens: int = 16,
    ) -> Answer:
        inputs = self.inputs(prompt, images, videos)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        prompt_ids = inputs["input_ids"][0].tolist()
        return Answer(prompt_ids, out.sequences[0, len(prompt_ids) :].tolist(), torch.cat(out.logits))
