"""Who answers: transformers, or mm-core. Both take (pictures, question) pairs and return the answers' texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .preprocess import patches

Asked = tuple[Sequence[Image.Image], str]
Answer = Callable[[list[Asked]], list[str]]
MAX_TOKENS = 24


def transformers_backend(folder: Path, device: str = "cpu", batch: int = 48) -> Answer:
    """Greedy decoding by transformers in float32, with our own preprocessing (no torchvision needed)."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad, image_token = tokenizer.pad_token_id, model.config.image_token_id

    def encode(
        images: Sequence[Image.Image], question: str
    ) -> tuple[list[int], list[np.ndarray], list[tuple[int, int, int]]]:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pixels, grids = zip(*(patches(image) for image in images), strict=True)
        ids: list[int] = []
        counts = iter(grid[1] * grid[2] // 4 for grid in grids)
        for token in tokenizer(text).input_ids:
            ids.extend([token] * (next(counts) if token == image_token else 1))
        return ids, list(pixels), list(grids)

    @torch.inference_mode()
    def answer(asked: list[Asked]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(asked), batch):
            rows = [encode(*one) for one in asked[start : start + batch]]
            longest = max(len(row[0]) for row in rows)
            ids = torch.tensor([[pad] * (longest - len(row[0])) + row[0] for row in rows], device=device)
            seen = torch.tensor([[0] * (longest - len(row[0])) + [1] * len(row[0]) for row in rows], device=device)
            made = model.generate(
                input_ids=ids,
                attention_mask=seen,
                mm_token_type_ids=(ids == image_token).int(),
                pixel_values=torch.from_numpy(np.concatenate([p for row in rows for p in row[1]])).to(device),
                image_grid_thw=torch.tensor([grid for row in rows for grid in row[2]], device=device),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
            texts += tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return texts

    return answer


def mm_backend(folder: Path, device: str = "cpu", batch: int = 256, kv_dtype: str = "auto") -> Answer:
    """Greedy decoding by mm-core, with keys and values kept in kv_dtype."""
    from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

    engine = Engine.from_pretrained(folder, device=device, kv_cache_config=KvCacheConfig(dtype=kv_dtype))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)

    def answer(asked: list[Asked]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(asked), batch):
            prompts = [
                TextPrompt(prompt=question, multi_modal_data={"image": list(images)})
                for images, question in asked[start : start + batch]
            ]
            texts += [output.text for output in engine.generate(prompts, sampling)]
        return texts

    return answer


BACKENDS = {"transformers": transformers_backend, "mm": mm_backend}
