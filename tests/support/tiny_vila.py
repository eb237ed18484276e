"""Tiny random NVILA, NVILA-Lite and VILA-1.5 checkpoints in every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

from mm_core.testing import randomize_, tiny_tokenizer, write_json
from support.vila_reference import projector

TILE = 28
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": TILE,
    "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
NORM = {"image_mean": [0.45, 0.5, 0.55], "image_std": [0.5, 0.4, 0.45]}
S2 = {"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2": True, "s2_scales": "28,56,84",
      "s2_max_split_size": TILE, "s2_resize_output_to_scale_idx": -1, "num_video_frames": 4}  # fmt: skip
LITE = {"image_aspect_ratio": "dynamic", "max_tiles": 6, "num_video_frames": 4}
STATIC = {"image_aspect_ratio": "resize", "s2": True, "s2_scales": "28,56", "s2_max_split_size": TILE}
PLAIN = {"image_aspect_ratio": "resize", "num_video_frames": 4}


@dataclass(frozen=True)
class Tiny:
    """layout: "parts" (folders, settings in config.json too), "paths" (folders, config.json names them), "flat"
    (one file, `llm_cfg` and friends), "hf" (one file, `text_config` and `vision_config`)."""

    config: Mapping[str, Any] = field(default_factory=lambda: S2)
    projector: str = "mlp_downsample"
    layout: Literal["parts", "paths", "flat", "hf"] = "parts"
    architecture: str = "LlavaLlamaModel"
    text: str = "qwen2"
    tower: str = "siglip"
    tied: bool = False
    media_tokens: bool = True
    size: int = TILE  # of the image processor
    tile: int = TILE
    seed: int = 0

    def write(self, path: Path) -> Path:
        """The whole checkpoint."""
        tokenizer = self._tokenizer()
        llm, vision, layers = self._models(tokenizer)
        text = {**llm.config.to_diff_dict(), "model_type": self.text, **self._text(tokenizer)}
        tower = {**self._vision(), "model_type": f"{self.tower}_vision_model"}
        head = {"architectures": [self.architecture], "model_type": "llava_llama", **self.config}
        tensors = {
            "llm": {n: t for n, t in llm.state_dict().items() if not (self.tied and n == "lm_head.weight")},
            "vision_tower": _named(vision.state_dict()),
            "mm_projector": {self._layer(n): t for n, t in layers.state_dict().items()},
        }
        settings: dict[str, Any] = {
            "llm": text, "vision_tower": tower,
            "mm_projector": {"mm_projector_type": self.projector, "model_type": "v2l_projector"},
        }  # fmt: skip
        if self.layout in ("parts", "paths"):
            self._write_parts(path, head, settings, tensors)
        else:
            self._write_flat(path, head, settings, tensors)
        root = self.layout in ("flat", "hf")
        tokenizer.save_pretrained(path if root else path / "llm")
        generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        write_json((path if root else path / "llm") / "generation_config.json", generation)
        part = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": self.size, "width": self.size},
            **NORM,
        }
        write_json((path if root else path / "vision_tower") / "preprocessor_config.json", part)
        return path

    def _write_parts(self, path: Path, head: Any, settings: Any, tensors: Any) -> None:
        for name, own in settings.items():
            (path / name).mkdir()
            write_json(path / name / "config.json", own)
            if tensors[name]:
                _save(tensors[name], path / name / "model.safetensors")
            head[f"{name}_cfg"] = own if self.layout == "parts" else f"/home/somebody/checkpoints/{name}"
        write_json(path / "config.json", head)

    def _write_flat(self, path: Path, head: Any, settings: Any, tensors: Any) -> None:
        if self.layout == "hf":
            head |= {"text_config": settings["llm"], "vision_config": settings["vision_tower"]}
            head["tie_word_embeddings"] = True  # of a class that ties nothing itself
            if self.architecture == "VILAForConditionalGeneration":
                head["mm_projector_cfg"] = settings["mm_projector"]
        else:
            head |= {f"{name}_cfg": own for name, own in settings.items()}
        write_json(path / "config.json", head)
        _save({f"{p}.{n}": t for p, own in tensors.items() for n, t in own.items()}, path / "model.safetensors")

    def _layer(self, name: str) -> str:
        return "layers." + (name.removeprefix("0.") if self.projector == "linear" else name)

    def _tokenizer(self) -> Any:
        return llama_tokenizer() if self.text == "llama" else qwen_tokenizer(self.media_tokens)

    def _vision(self) -> dict[str, Any]:
        head = {"vision_use_head": False} if self.tower == "siglip" else {}
        return {**VISION, **head, "image_size": self.tile}

    def _text(self, tokenizer: Any) -> dict[str, Any]:
        return {**TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": self.tied}

    def _models(self, tokenizer: Any) -> tuple[Any, Any, Any]:
        text = transformers.AutoConfig.for_model(self.text, **self._text(tokenizer))
        llm = transformers.AutoModelForCausalLM.from_config(text)
        special = min(tokenizer.all_special_ids) if self.text != "llama" else 0
        randomize_(llm, self.seed, quiet_rows=range(special, len(tokenizer)) if special else range(3))
        name = {"siglip": "Siglip", "clip": "CLIP"}[self.tower]
        settings = getattr(transformers, f"{name}VisionConfig")(**self._vision())
        vision = getattr(transformers, f"{name}VisionModel")(settings)
        randomize_(vision, self.seed + 1)
        s2 = (
            self.config.get("s2")
            or self.config.get("dynamic_s2")
            or self.architecture == "NVILAForConditionalGeneration"
        )
        scales = len(str(self.config.get("s2_scales", "1,2,3")).split(",")) if s2 else 1
        layers = projector(self.projector, VISION["hidden_size"] * scales, TEXT["hidden_size"])
        randomize_(layers, self.seed + 2)
        return llm, vision, layers


def _named(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names that checkpoints have, whatever this version of transformers calls them."""
    prefix = "" if any(n.startswith("vision_model.") for n in state) else "vision_model."
    return {prefix + n: t for n, t in state.items() if "position_ids" not in n}


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, file, metadata={"format": "pt"})


@cache
def qwen_tokenizer(media_tokens: bool = True) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<vila/sentinel>", "<image>", "<vila/video>"] if media_tokens else []
    return tiny_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")


@cache
def llama_tokenizer() -> Any:
    """With a start token that it adds itself, without media tokens, and not one id to spare."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = "A chat between a curious user and an artificial intelligence assistant describe the picture USER ASSISTANT"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False, initial_alphabet=sorted(set(words)),
    )  # fmt: skip
    trained.train_from_iterator([words] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    return transformers.LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], add_bos_token=True
    )
