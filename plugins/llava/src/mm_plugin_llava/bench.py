"""What `mm bench` needs of the family: prompts, a config of real sizes, the encoder's arithmetic. No torch.

Sizes and special tokens are those of the published llava-1.5-7b-hf, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.benchspecs import BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.hookspecs import hookimpl

_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
_TEXT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "vocab_size": 32064, "torch_dtype": "bfloat16",
}  # fmt: skip
_CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "text_config": _TEXT, "vision_config": _VISION,
}  # fmt: skip
_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_FILES: Mapping[str, Mapping[str, Any]] = {
    "config.json": _CONFIG,
    "preprocessor_config.json": _PREPROCESSOR,
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}


def _weights(config: Mapping[str, Any]) -> tuple[Any, int, int, int, int]:
    """The tower's sizes, its layers that run, and the weights of a layer, of the projector, of the patches."""
    from mm_plugin_llava.config import LlavaConfig

    llava = LlavaConfig.from_config(config, config.get("text_config") or {})
    tower, text, indexes = llava.tower, llava.text_width, llava.tower.layer_indexes(llava.layers)
    width = tower.hidden_size
    projector = width * len(indexes) * text + text**2
    layer = 4 * width**2 + 2 * width * tower.intermediate_size
    return tower, max(indexes), layer, projector, 3 * tower.patch_size**2 * width


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: layers that run, projector, patches."""
    _, depth, layer, projector, patches = _weights(config)
    return depth * layer + projector + patches


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:
    """Two operations a weight and row, and 4 · n² · width a layer for attention over the n rows of each tile."""
    tower, depth, layer, projector, patches = _weights(config)
    rows = tower.num_tokens
    attention = 4 * depth * rows**2 * tower.hidden_size
    one = 2 * (rows * depth * layer + tower.num_patches * (projector + patches)) + attention
    return float(info["tiles"] * one)


@hookimpl
def mm_bench(family: str) -> BenchFamily:
    """Prompts, real sizes and the encoder's arithmetic for `mm bench`."""
    chat = BenchPrompt(head="<|im_start|>user ", media="<image>", tail="<|im_end|><|im_start|>assistant\n")
    if family != "llava":
        return BenchFamily(prompt=chat, models={}, encoder_flops=encoder_flops, encoder_params=encoder_params)
    shared: dict[str, Any] = {"requests": 256, "output_tokens": 128, "rows": 576, "shared": 26}
    return BenchFamily(
        prompt=BenchPrompt(head="<s>USER: ", media="<image>\n", tail=" ASSISTANT:"),
        models={"llava-1.5-7b": BenchModel(files=_FILES, special_tokens=_SPECIAL)},
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
        workloads=(
            BenchWorkload("llava-distinct", items=256, **shared),
            BenchWorkload("llava-reuse", items=16, **shared),
        ),
    )
