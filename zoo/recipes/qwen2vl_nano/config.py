"""The checkpoint's configuration, in the layout that the hub holds for this family (flat, mrope scaling)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from .layouts import MAX_PIXELS, MIN_PIXELS

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 192, 5, 6, 2, 512
VISION_WIDTH, VISION_DEPTH, VISION_HEADS = 192, 6, 6
ROPE_THETA, MROPE_SECTION = 10.0, [4, 6, 6]  # positions stay under a hundred: a small base tells cells apart
EPSILON = 1e-6
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def model_config(tokenizer: Tokenizer) -> dict[str, object]:
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 4096,
        "max_window_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": VISION_DEPTH,
            "embed_dim": VISION_WIDTH,
            "hidden_act": "quick_gelu",
            "hidden_size": HIDDEN,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": VISION_HEADS,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def preprocessor_config() -> dict[str, object]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


def write_configs(tokenizer: Tokenizer, folder: Path) -> None:
    token = tokenizer.token_to_id
    generation = {
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": [token("<|im_end|>"), token("<|endoftext|>")],
        "pad_token_id": token("<|endoftext|>"),
        "do_sample": False,
    }
    for name, content in (
        ("config.json", model_config(tokenizer)),
        ("generation_config.json", generation),
        ("preprocessor_config.json", preprocessor_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
