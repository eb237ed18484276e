"""What `mm bench` needs of the family: prompts, a config of real size, the encoder's arithmetic. No torch.

Sizes and special tokens are those of Salesforce/blip2-opt-2.7b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.benchspecs import BenchDecoder, BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.hookspecs import hookimpl

SPECIAL_TOKENS: Mapping[str, int] = {"<pad>": 1, "</s>": 2, "<image>": 50265}
_VISION = {
    "model_type": "blip_2_vision_model", "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}  # fmt: skip
_QFORMER = {
    "model_type": "blip_2_qformer", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "encoder_hidden_size": 1408, "cross_attention_frequency": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "vocab_size": 30522,
}  # fmt: skip
_TEXT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 2560, "word_embed_proj_dim": 2560,
    "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50304,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "activation_function": "relu",
    "enable_bias": True, "layer_norm_elementwise_affine": True, "tie_word_embeddings": True, "bos_token_id": 2,
    "eos_token_id": 50118, "pad_token_id": 1, "torch_dtype": "float16",
}  # fmt: skip
_CONFIG = {
    "architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2", "num_query_tokens": 32,
    "image_token_index": 50265, "use_decoder_only_language_model": True, "text_config": _TEXT,
    "vision_config": _VISION, "qformer_config": _QFORMER, "torch_dtype": "bfloat16",
}  # fmt: skip
_PREPROCESSOR = {
    "image_processor_type": "BlipImageProcessor", "size": {"height": 224, "width": 224}, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Patches with the class token, queries, and the weights that see each: of the tower, of the Q-Former."""
    vision, former = config["vision_config"], config["qformer_config"]
    width, inner = vision["hidden_size"], former["hidden_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    block = 4 * width * width + 2 * width * vision["intermediate_size"]
    tower = vision["num_hidden_layers"] * block + 3 * vision["patch_size"] ** 2 * width
    crosses = -(-former["num_hidden_layers"] // former["cross_attention_frequency"])
    layer = 4 * inner * inner + 2 * inner * former["intermediate_size"]
    queries = former["num_hidden_layers"] * layer + crosses * 2 * inner * inner
    queries += inner * config["text_config"]["hidden_size"]
    # Keys and values of cross-attention are made of the tower's rows.
    return patches, config["num_query_tokens"], tower + crosses * 2 * width * inner, queries


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: tower, Q-Former, language projection."""
    _, _, tower, former = _sizes(config)
    return tower + former


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:  # noqa: ARG001
    """Two operations a weight and patch (or query), and 4 · n² · width a layer of the tower for attention."""
    patches, queries, tower, former = _sizes(config)
    vision = config["vision_config"]
    attention = 4 * vision["num_hidden_layers"] * vision["hidden_size"] * patches**2
    return float(2 * patches * tower + 2 * queries * former + attention)


def decoder(config: Mapping[str, Any]) -> BenchDecoder:
    """OPT's sizes, for its floor."""
    text = config["text_config"]
    heads = text["num_attention_heads"]
    return BenchDecoder(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=text["hidden_size"] // heads,
        intermediate=text["ffn_dim"],
        vocab=text["vocab_size"],
        mlp_matrices=2,
    )


@hookimpl
def mm_bench(family: str) -> BenchFamily:  # noqa: ARG001
    """Prompts, a real size and arithmetic for `mm bench`."""
    shared: dict[str, Any] = {"requests": 256, "output_tokens": 128, "rows": 32}
    return BenchFamily(
        prompt=BenchPrompt(media="<image></s>", tail=" Answer:"),
        models={
            "blip2-opt-2.7b": BenchModel(
                files={
                    "config.json": _CONFIG,
                    "preprocessor_config.json": _PREPROCESSOR,
                    "generation_config.json": {"bos_token_id": 2, "eos_token_id": 50118, "pad_token_id": 1},
                    "tokenizer_config.json": {
                        "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>",
                        "model_max_length": 2048,
                    },
                },
                special_tokens=SPECIAL_TOKENS,
            )
        },
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
        decoder=decoder,
        workloads=(
            BenchWorkload("blip2-distinct", items=256, **shared),
            BenchWorkload("blip2-reuse", items=16, **shared),
        ),
    )  # fmt: skip
