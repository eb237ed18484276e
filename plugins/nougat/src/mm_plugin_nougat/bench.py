"""What `mm bench` needs of the family: prompts, a config of real size, arithmetic. No torch.

Sizes are those of facebook/nougat-base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mm_core.benchspecs import BenchDecoder, BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.hookspecs import hookimpl

SPECIAL_TOKENS: Mapping[str, int] = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "[END]": 49999}
_ENCODER = {
    "model_type": "donut-swin", "image_size": [896, 672], "patch_size": 4, "num_channels": 3, "embed_dim": 128,
    "depths": [2, 2, 14, 2], "num_heads": [4, 8, 16, 32], "window_size": 7, "mlp_ratio": 4.0, "qkv_bias": True,
    "hidden_act": "gelu", "hidden_size": 1024, "use_absolute_embeddings": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
_DECODER = {
    "model_type": "mbart", "d_model": 1024, "decoder_layers": 10, "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096, "vocab_size": 50000, "max_position_embeddings": 3584, "scale_embedding": True,
    "activation_function": "gelu", "add_final_layer_norm": True, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_CONFIG = {
    "architectures": ["VisionEncoderDecoderModel"], "model_type": "vision-encoder-decoder", "encoder": _ENCODER,
    "decoder": _DECODER, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_PREPROCESSOR = {
    "image_processor_type": "NougatImageProcessor", "size": {"height": 896, "width": 672}, "resample": 2,
    "do_align_long_axis": False, "do_crop_margin": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
    "do_resize": True, "do_thumbnail": True, "rescale_factor": 1 / 255, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
_ROWS = 588


def _stages(config: Mapping[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """For each stage its patches, width, blocks and places of a window."""
    swin = config["encoder"]
    height, width = (side // swin["patch_size"] for side in swin["image_size"])
    for stage, depth in enumerate(swin["depths"]):
        yield height * width, swin["embed_dim"] * 2**stage, depth, swin["window_size"] ** 2
        height, width = -(-height // 2), -(-width // 2)


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: blocks and patch merging."""
    ratio = 4 + 2 * config["encoder"]["mlp_ratio"]
    return int(sum(depth * ratio * width**2 + 2 * width**2 for _, width, depth, _ in _stages(config)))


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:  # noqa: ARG001
    """Two operations a weight and patch, and 4 · n · width a patch for attention over a window's n places."""
    ratio = 4 + 2 * config["encoder"]["mlp_ratio"]
    work = (
        patches * (2 * depth * ratio * width**2 + 4 * width**2 + 4 * depth * window * width)
        for patches, width, depth, window in _stages(config)
    )
    return float(sum(work))


def decoder(config: Mapping[str, Any]) -> BenchDecoder:
    """The decoder's sizes, for its floor."""
    mbart = config["decoder"]
    heads = mbart["decoder_attention_heads"]
    return BenchDecoder(
        layers=mbart["decoder_layers"],
        hidden=mbart["d_model"],
        heads=heads,
        kv_heads=heads,
        head_dim=mbart["d_model"] // heads,
        intermediate=mbart["decoder_ffn_dim"],
        vocab=mbart["vocab_size"],
        mlp_matrices=2,
        cross=True,
    )


@hookimpl
def mm_bench(family: str) -> BenchFamily:  # noqa: ARG001
    """Prompts, a real size and arithmetic for `mm bench`."""
    pages: dict[str, Any] = {"requests": 64, "output_tokens": 256, "rows": _ROWS, "image_size": 896}
    return BenchFamily(
        prompt=BenchPrompt(complete="<s>"),
        models={
            "nougat-base": BenchModel(
                files={
                    "config.json": _CONFIG,
                    "preprocessor_config.json": _PREPROCESSOR,
                    "generation_config.json": {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
                    "tokenizer_config.json": {
                        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                        "model_max_length": 3584,
                    },
                },
                special_tokens=SPECIAL_TOKENS,
            )
        },
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
        decoder=decoder,
        workloads=(BenchWorkload("pages", items=64, shared=0, own=1, **pages),),
    )  # fmt: skip
