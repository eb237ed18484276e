"""What `mm bench` needs of the family: prompts, a config of real size, the encoder's arithmetic. No torch.

The settings of the published NVILA-8B could not be read: the tower is SigLIP so400m, the language model
Qwen2-7B, tiling and projector (`dynamic_s2`, `mlp_downsample`) are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from mm_core.benchspecs import BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.hookspecs import hookimpl

SPECIAL_TOKENS: Mapping[str, int] = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<vila/sentinel>": 151646,
    "<image>": 151647,
    "<vila/video>": 151648,
}
_TEXT = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151680,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "use_sliding_window": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
_VISION = {
    "model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"], "hidden_size": 1152,
    "image_size": 448, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_CONFIG = {
    "architectures": ["NVILAForConditionalGeneration"], "model_type": "nvila", "hidden_size": 3584,
    "image_aspect_ratio": "dynamic_s2", "s2": True, "s2_scales": "448,896,1344", "s2_max_split_size": 448,
    "s2_resize_output_to_scale_idx": -1, "max_tiles": 12, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "cls_patch", "num_video_frames": 8, "llm_cfg": _TEXT, "vision_tower_cfg": _VISION,
    "mm_projector_cfg": {"mm_projector_type": "mlp_downsample", "model_type": "v2l_projector"},
    "text_config": _TEXT, "vision_config": _VISION, "torch_dtype": "bfloat16",
}  # fmt: skip
_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": 448, "width": 448}, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
_SCALES = 3
_ROWS = 2304  # of a square picture: 3 × 3 tiles of 256


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Layers that are run, width, weights of a layer, of the patch projection, of the projector."""
    vision, text = config["vision_tower_cfg"], config["llm_cfg"]
    width, hidden = vision["hidden_size"], text["hidden_size"]
    block = 4 * width * width + 2 * width * vision["intermediate_size"]
    projector = 4 * _SCALES * width * hidden + hidden * hidden
    return vision["num_hidden_layers"] - 1, width, block, 3 * vision["patch_size"] ** 2 * width, projector


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: layers, patch projection, projector."""
    layers, _, block, patch, projector = _sizes(config)
    return layers * block + patch + projector


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:
    """Two operations a weight and patch (or projected row), and 4 · n² · width a layer and tile for attention."""
    layers, width, block, patch, projector = _sizes(config)
    patches = (config["vision_tower_cfg"]["image_size"] // config["vision_tower_cfg"]["patch_size"]) ** 2
    tower = 2 * patches * (layers * block + patch) + 4 * layers * width * patches**2
    rows = patches // 4 * prod(info["block"])
    return float(info["tiles"] * tower + 2 * rows * projector)


@hookimpl
def mm_bench(family: str) -> BenchFamily:  # noqa: ARG001
    """Prompts, a real size and the encoder's arithmetic for `mm bench`."""
    shared: dict[str, Any] = {"requests": 64, "output_tokens": 128, "rows": _ROWS, "beside": 1, "shared": 32}
    return BenchFamily(
        prompt=BenchPrompt(
            head="<|im_start|>user\n", media="<image>", tail="<|im_end|>\n<|im_start|>assistant\n"
        ),
        models={
            "nvila-8b": BenchModel(
                files={
                    "config.json": _CONFIG,
                    "preprocessor_config.json": _PREPROCESSOR,
                    "generation_config.json": {"bos_token_id": 151643, "eos_token_id": [151645, 151643]},
                    "tokenizer_config.json": {
                        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 32768,
                    },
                },
                special_tokens=SPECIAL_TOKENS,
            )
        },
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
        workloads=(
            BenchWorkload("nvila-distinct", items=64, **shared),
            BenchWorkload("nvila-reuse", items=8, **shared),
        ),
    )  # fmt: skip
