"""Tiny random LLaVA checkpoints of every kind, and transformers' answers from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from mm_core.testing import Answer, greedy, randomize_, tiny_tokenizer, write_json

TILE, PATCH = 38, 7  # 5 patches a side, and 3 pixels that none covers
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
GRIDS = [[a * TILE, b * TILE] for a in range(1, 5) for b in range(1, 5) if a * b <= 6]
NORM = {"image_mean": [0.45, 0.5, 0.41], "image_std": [0.27, 0.26, 0.3]}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": TILE,
    "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "sliding_window": None, "rope_theta": 10000.0,
}  # fmt: skip
PICTURES = {
    "CLIP": {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}},
    "Siglip": {"size": {"height": TILE, "width": TILE}},
    "Llava": {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, "do_pad": True},
    "LlavaNext": {
        "size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": GRIDS,
    },
    "LlavaOnevision": {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": GRIDS},
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """kind: model_type. pictures: the image processor, without its ending. layout: "hub", what transformers 5
    saves ("tf5"), or what 4.52 did ("tf4"). config: settings at the top of config.json."""

    kind: str = "llava"
    tower: str = "clip"
    text: str = "llama"
    pictures: str = "CLIP"
    layout: str = "hub"
    config: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    seed: int = 0

    def write(self, path: Path) -> Path:
        """The whole checkpoint."""
        tokenizer = llama_tokenizer() if self.text != "qwen2" else qwen_tokenizer()
        model = self._model(tokenizer)
        tokenizer.save_pretrained(path)
        self._write_pictures(path)
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0
        )
        if self.layout == "tf5":
            model.save_pretrained(path)
            return path
        model.generation_config.save_pretrained(path)
        write_json(path / "config.json", self._config(tokenizer))
        rename = _hub_name if self.layout == "hub" else str
        tensors = {rename(name): value.contiguous().clone() for name, value in model.state_dict().items()}
        if self.tied:
            tensors = {name: value for name, value in tensors.items() if not name.endswith("lm_head.weight")}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    def _config(self, tokenizer: Any) -> dict[str, Any]:
        vision = {**VISION, "model_type": f"{self.tower}_vision_model"}
        if self.tower == "siglip":
            vision["vision_use_head"] = False
        size = -(-len(tokenizer) // 16) * 16
        text = {**TEXT, "model_type": self.text, "vocab_size": size, "tie_word_embeddings": self.tied}
        media = {f"{m}_token_index": tokenizer.convert_tokens_to_ids(f"<{m}>") for m in ("image", "video")}
        grids = {} if self.kind == "llava" else {"image_grid_pinpoints": GRIDS}
        return {
            "architectures": [f"{CLASSES[self.kind]}ForConditionalGeneration"], "model_type": self.kind,
            "vision_config": vision, "text_config": text, **media, **grids, **self.config,
        }  # fmt: skip

    def _model(self, tokenizer: Any) -> Any:
        name = CLASSES[self.kind]
        settings = {k: v for k, v in self._config(tokenizer).items() if k not in ("architectures", "model_type")}
        model = getattr(transformers, f"{name}ForConditionalGeneration")(
            getattr(transformers, f"{name}Config")(**settings)
        ).eval()
        randomize_(model, self.seed)
        # Rarely chosen: special tokens, and bytes, a run of which is text only as a whole.
        words = [t for t in tokenizer.get_vocab() if not t.startswith("<0x")]
        quiet = set(range(model.config.text_config.vocab_size)) - set(tokenizer.convert_tokens_to_ids(words))
        model.lm_head.weight.data[sorted(quiet | set(tokenizer.all_special_ids))] *= 0.1
        if self.kind != "llava":  # as large as an embedding
            model.model.image_newline.data.sub_(1).mul_(2.5)
        return model

    def _write_pictures(self, path: Path) -> None:
        part = {"image_processor_type": f"{self.pictures}ImageProcessor", **NORM, **PICTURES[self.pictures]}
        if self.layout == "hub":
            write_json(path / "preprocessor_config.json", part)
        else:
            write_json(path / "processor_config.json", {"image_processor": part, "image_token": "<image>"})


def _hub_name(name: str) -> str:
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


@cache
def qwen_tokenizer() -> Any:
    """Without a start token."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    return tiny_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")


@cache
def llama_tokenizer() -> Any:
    """With a start token, which the tokenizer adds, and words that begin with their space."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = "describe these images in one sentence what is in the picture USER ASSISTANT the quick brown fox jumps"
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False,
        initial_alphabet=sorted(set(words)),
    )  # fmt: skip
    trained.train_from_iterator([words] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = transformers.LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], pad_token="<unk>", add_bos_token=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer


class Reference:
    """transformers' model and PIL image processor; a video is prepared here a second time."""

    def __init__(self, path: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.config = self.model.config
        self.pictures = pictures_of(path)

    def media(self, images: Sequence[Image.Image], videos: Sequence[np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
        """The model's inputs beside ids."""
        given: dict[str, torch.Tensor] = {}
        if images:
            nested = [list(images)] if self.config.model_type == "llava_onevision" else list(images)
            given = dict(self.pictures(images=nested, return_tensors="pt"))
            if "batch_num_images" in given:
                given["batch_num_images"] = torch.tensor([len(images)])
        if videos:
            given["pixel_values_videos"] = torch.stack([prepared_video(v) for v in videos])
        return given

    @torch.inference_mode()
    def counts(self, given: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
        """Rows that the model makes of every item, a video's as its processor counts them."""
        found: dict[str, list[int]] = {"<image>": [], "<video>": []}
        if "pixel_values" in given:
            images = {k: v for k, v in given.items() if k != "pixel_values_videos"}
            rows = self.model.model.get_image_features(**images, return_dict=True).pooler_output
            found["<image>"] = [len(r) for r in rows]
        for frames in given.get("pixel_values_videos", ()):
            found["<video>"].append(len(frames) * math.ceil(TILE // PATCH / 2) ** 2 + 1)  # pooled, and a newline
        return found

    def answer(
        self, prompt: str, images: Sequence[Image.Image] = (), videos: Sequence[Any] = (), max_tokens: int = 12
    ) -> Answer:
        """Greedy tokens of a prompt that holds a placeholder an item."""
        given = self.media(images, videos)
        for text, counts in self.counts(given).items():
            pieces = prompt.split(text)
            assert len(pieces) == len(counts) + 1, "the test's prompt and media do not match"
            prompt = "".join(p + text * n for p, n in zip(pieces, [*counts, 0], strict=True))
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return greedy(self.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}, max_tokens)


def pictures_of(path: Path) -> Any:
    """transformers' PIL image processor of a checkpoint."""
    file = path / "preprocessor_config.json"
    if file.is_file():
        part = json.loads(file.read_text())
    else:
        part = json.loads((path / "processor_config.json").read_text())["image_processor"]
    name = part.pop("image_processor_type").removesuffix("ImageProcessor")
    module = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_").replace("c_l_i_p", "clip")
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}ImageProcessorPil")(**part)


def prepared_video(frames: np.ndarray[Any, Any]) -> torch.Tensor:
    """[frames, 3, TILE, TILE]: resized by Pillow, scaled and normalised by numpy, as transformers' PIL path would."""
    resized = [np.asarray(Image.fromarray(f).resize((TILE, TILE), Image.Resampling.BICUBIC)) for f in frames]
    values = (np.stack(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.asarray(NORM[f"image_{k}"], np.float32) for k in ("mean", "std"))
    return torch.from_numpy(((values - mean) / std).transpose(0, 3, 1, 2).copy())
