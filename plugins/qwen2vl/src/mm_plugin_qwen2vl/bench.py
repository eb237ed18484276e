"""What `mm bench` needs of the family: prompts, configs of real sizes, the encoder's arithmetic. No torch.

Sizes and special tokens are those of the published Qwen2-VL-2B-Instruct and -7B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.benchspecs import BenchFamily, BenchModel, BenchPrompt
from mm_core.hookspecs import hookimpl

SPECIAL_TOKENS: Mapping[str, int] = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_TEXT_2B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
_TEXT_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
_TEXT_SHARED = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": 32768, "use_cache": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
}  # fmt: skip
_IDS = {
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
}  # fmt: skip
_PREPROCESSOR = {
    "min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}  # fmt: skip


def _model(text: Mapping[str, Any]) -> BenchModel:
    vision = {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14,
        "hidden_size": text["hidden_size"], "spatial_merge_size": 2, "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }  # fmt: skip
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **_TEXT_SHARED, **text, **_IDS,
        "vision_config": vision,
    }  # fmt: skip
    generation = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    tokenizer = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 32768}
    return BenchModel(
        files={
            "config.json": config,
            "preprocessor_config.json": _PREPROCESSOR,
            "generation_config.json": generation,
            "tokenizer_config.json": tokenizer,
        },
        special_tokens=SPECIAL_TOKENS,
    )


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int, int, int]:
    """Depth, width, weights of a block, of the merger, of the patch projection, and merge²."""
    from mm_plugin_qwen2vl.encoder import VisionConfig

    vision = VisionConfig.from_config(config)
    dim, merged = vision.dim, vision.dim * vision.merge_size**2
    block = 4 * dim * dim + (3 if vision.gated else 2) * dim * vision.intermediate
    merger = merged * merged + merged * vision.out
    patch = vision.channels * vision.temporal_patch_size * vision.patch_size**2 * dim
    return vision.depth, dim, block, merger, patch, vision.merge_size**2


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: blocks, merger, patch projection."""
    depth, _, block, merger, patch, _ = _sizes(config)
    return depth * block + merger + patch


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:
    """Two operations a weight and patch (or merged row), and 4 · n² · width a block for attention over
    the n patches of each frame; windowed blocks (2.5) see at most a window's patches."""
    from mm_plugin_qwen2vl.encoder import VisionConfig

    depth, dim, block, merger, patch, group = _sizes(config)
    vision = VisionConfig.from_config(config)
    frames, height, width = info["grid_thw"]
    patches, seen = frames * height * width, height * width
    window = min(seen, group * vision.window**2) if vision.window else seen
    full = len(vision.full_blocks) if vision.window else depth
    attention = 4 * dim * patches * (full * seen + (depth - full) * window)
    return float(2 * patches * (depth * block + patch) + 2 * patches // group * merger + attention)


@hookimpl
def mm_bench(family: str) -> BenchFamily:  # noqa: ARG001
    """Prompts, real sizes and the encoder's arithmetic for `mm bench`."""
    return BenchFamily(
        prompt=BenchPrompt(
            head="<|im_start|>user\n",
            media="<|vision_start|><|image_pad|><|vision_end|>",
            tail="<|im_end|>\n<|im_start|>assistant\n",
        ),
        models={"qwen2-vl-2b": _model(_TEXT_2B), "qwen2-vl-7b": _model(_TEXT_7B)},
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
    )
