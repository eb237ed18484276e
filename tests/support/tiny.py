"""Tiny random Qwen2-VL checkpoints, complete on disk, that transformers loads and generates from."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from mm_core.testing import randomize_ as randomize_

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SENTENCES = (
    "Describe this image. What is in the picture? Describe these images in one sentence.",
    "You are a helpful assistant. The user asks, the assistant answers.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun.",
    "A system reads images, video and sound beside text and tells what there is to see and hear.",
)
_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


def make_tiny_tokenizer(vocab_size: int = 400) -> Any:
    """A Qwen2 tokenizer: byte-level BPE trained on a few sentences, then the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def make_tiny_qwen2vl(
    tmp_path: Path,
    version: Literal["2", "2.5"] = "2",
    layout: Literal["hub", "tf5"] = "hub",
    tied: bool = True,
    seed: int = 0,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a complete Qwen2-VL or Qwen2.5-VL checkpoint of about 200k parameters; returns its directory.

    layout: what the hub holds (flat config, `visual.*` and `model.layers.*` names,
    preprocessor_config.json), or what transformers 5 writes. overrides: `vision_<name>` sets a
    vision setting, `min_pixels`/`max_pixels` the image sizes, any other name a text setting.
    """
    import transformers

    variant = f"{zlib.crc32(repr(sorted(overrides.items())).encode()):08x}" if overrides else "plain"
    path = Path(tmp_path) / f"qwen{version}vl-{layout}-{'tied' if tied else 'untied'}-{seed}-{shards}-{variant}"
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer()
    pixels = {k: overrides.pop(k, v) for k, v in (("min_pixels", 56 * 56), ("max_pixels", 64 * 28 * 28))}
    flat = _flat_config(version, tokenizer, tied, overrides)
    config_class = transformers.Qwen2VLConfig if version == "2" else transformers.Qwen2_5_VLConfig
    model_class = getattr(transformers, flat["architectures"][0])
    model = model_class(config_class(**json.loads(json.dumps(flat)))).eval()
    first_special = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    randomize_(model, seed, quiet_rows=range(min(first_special, flat["eos_token_id"]), flat["vocab_size"]))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[flat["eos_token_id"], flat["bos_token_id"]], pad_token_id=flat["bos_token_id"]
    )
    _write_tokenizer(path, tokenizer, layout)
    _write_processor(path, version, layout, pixels)
    if layout == "tf5":
        _save_tf5(model, path, shards)
    else:
        _save_hub(model, path, flat, shards, tied)
    return path


def _flat_config(version: str, tokenizer: Any, tied: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    """config.json as the hub holds it."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    text = {
        "vocab_size": -(-len(tokenizer) // 16) * 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "max_window_layers": 2,
        "use_sliding_window": False,
        "sliding_window": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    vision = _vision_config(version, overrides.get("hidden_size", text["hidden_size"]))
    for key, value in overrides.items():
        if key.startswith("vision_"):
            vision[key.removeprefix("vision_")] = value
        else:
            text[key] = value
    name = {"2": ("Qwen2VL", "qwen2_vl"), "2.5": ("Qwen2_5_VL", "qwen2_5_vl")}[version]
    return {
        "architectures": [f"{name[0]}ForConditionalGeneration"],
        "model_type": name[1],
        **text,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
    }


def _vision_config(version: str, hidden_size: int) -> dict[str, Any]:
    """The vision tower's settings; both spell `in_channels` as the hub does."""
    common = {
        "num_heads": 2, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    if version == "2":
        return {
            **common, "depth": 2, "embed_dim": 32, "mlp_ratio": 2,
            "hidden_size": hidden_size, "hidden_act": "quick_gelu",
        }  # fmt: skip
    return {
        **common, "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": hidden_size,
        "hidden_act": "silu", "tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(path: Path, tokenizer: Any, layout: str) -> None:
    if layout == "tf5":
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        tokenizer.save_pretrained(path)
        return
    tokenizer.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(path / "tokenizer_config.json", {**settings, "chat_template": CHAT_TEMPLATE})
    _write_json(path / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_processor(path: Path, version: str, layout: str, pixels: dict[str, int]) -> None:
    """Preprocessing settings, in preprocessor_config.json (hub) or processor_config.json (tf5)."""
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    norm = {"image_mean": _IMAGE_MEAN, "image_std": _IMAGE_STD}
    name = "Qwen2VLProcessor" if version == "2" else "Qwen2_5_VLProcessor"
    if layout == "hub":
        kind = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": name}
        _write_json(path / "preprocessor_config.json", {**pixels, **patches, **norm, **kind})
        return
    size = {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}
    shared = {
        **patches, **norm, "size": size, "resample": 3, "rescale_factor": 1 / 255,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    }  # fmt: skip
    parts = {
        "image_processor": {**shared, "image_processor_type": "Qwen2VLImageProcessor"},
        "processor_class": name,
        "video_processor": {
            **shared, "video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": True,
            "fps": 2, "min_frames": 4, "max_frames": 768, "return_metadata": False,
        },
    }  # fmt: skip
    _write_json(path / "processor_config.json", parts)


def _save_tf5(model: Any, path: Path, shards: int) -> None:
    """What transformers 5 writes, in about `shards` files."""
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=nbytes * 2 if shards == 1 else -(-nbytes // shards) + 1024)


def _hub_name(name: str) -> str:
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def _save_hub(model: Any, path: Path, config: dict[str, Any], shards: int, tied: bool) -> None:
    """The hub's names: `visual.*`, `model.layers.*`, `lm_head.weight` where it is not tied."""
    tensors = {_hub_name(k): v.contiguous().clone() for k, v in model.state_dict().items()}
    if tied:
        tensors.pop("lm_head.weight")
    _write_json(path / "config.json", config)
    model.generation_config.save_pretrained(path)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
