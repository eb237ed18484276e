"""What `mm bench` needs of the family: prompts, configs of real sizes, arithmetic. No torch.

Sizes and special tokens are those of openai/whisper-large-v3 and openai/whisper-base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.benchspecs import BenchDecoder, BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.hookspecs import hookimpl

_CODES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml "
    "cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am "
    "yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue"
)
_LANGUAGES = tuple(_CODES.split())
_TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
_START = 50258


def _special_tokens(languages: int) -> dict[str, int]:
    """All special tokens of a vocabulary with so many languages; 1,501 timestamps come last."""
    texts = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in _LANGUAGES[:languages])]
    texts += [f"<|{task}|>" for task in _TASKS] + [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    return {text: _START - 1 + index for index, text in enumerate(texts)}


def _model(width: int, layers: int, heads: int, mels: int, languages: int) -> BenchModel:
    tokens = _special_tokens(languages)
    config = {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": width,
        "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width,
        "num_mel_bins": mels, "vocab_size": max(tokens.values()) + 1, "max_source_positions": 1500,
        "max_target_positions": 448, "activation_function": "gelu", "scale_embedding": False,
        "bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": _START,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = {
        "bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": _START,
        "is_multilingual": True, "max_initial_timestamp_index": 50, "max_length": 448,
        "no_timestamps_token_id": tokens["<|notimestamps|>"], "prev_sot_token_id": tokens["<|startofprev|>"],
        "lang_to_id": {f"<|{code}|>": tokens[f"<|{code}|>"] for code in _LANGUAGES[:languages]},
        "task_to_id": {task: tokens[f"<|{task}|>"] for task in ("translate", "transcribe")},
        "suppress_tokens": [], "begin_suppress_tokens": [220, 50257], "return_timestamps": False,
    }  # fmt: skip
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 30, "feature_size": mels,
        "hop_length": 160, "n_fft": 400, "n_samples": 480000, "nb_max_frames": 3000, "padding_side": "right",
        "padding_value": 0.0, "return_attention_mask": False, "sampling_rate": 16000,
    }  # fmt: skip
    tokenizer = {
        "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "model_max_length": 448,
    }  # fmt: skip
    return BenchModel(
        files={
            "config.json": config,
            "preprocessor_config.json": extractor,
            "generation_config.json": generation,
            "tokenizer_config.json": tokenizer,
        },
        special_tokens=tokens,
    )


def encoder_params(config: Mapping[str, Any]) -> int:
    """Weights in matrices: both convolutions, and the layers."""
    width: int = config["d_model"]
    layer = 4 * width * width + 2 * width * config["encoder_ffn_dim"]
    return int(3 * (config["num_mel_bins"] + width) * width + config["encoder_layers"] * layer)


def encoder_flops(config: Mapping[str, Any], info: Mapping[str, Any]) -> float:  # noqa: ARG001
    """Two operations a weight and frame (the first convolution sees twice as many), and 4 · n² · width a layer
    for attention over the n frames."""
    width, frames = config["d_model"], config["max_source_positions"]
    twice = 2 * frames * 3 * config["num_mel_bins"] * width
    attention = 4 * config["encoder_layers"] * frames**2 * width
    return float(2 * frames * encoder_params(config) + twice + attention)


def decoder(config: Mapping[str, Any]) -> BenchDecoder:
    """The decoder's sizes, for its floor."""
    width, heads = config["d_model"], config["decoder_attention_heads"]
    return BenchDecoder(
        layers=config["decoder_layers"],
        hidden=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        intermediate=config["decoder_ffn_dim"],
        vocab=config["vocab_size"],
        mlp_matrices=2,
        cross=True,
    )


@hookimpl
def mm_bench(family: str) -> BenchFamily:  # noqa: ARG001
    """Prompts, real sizes and arithmetic for `mm bench`."""
    clips: dict[str, Any] = {"modality": "audio", "rows": 1500, "shared": 0, "own": 4, "output_tokens": 100}
    return BenchFamily(
        prompt=BenchPrompt(complete="<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"),
        models={
            "whisper-base": _model(512, 6, 8, 80, 99),
            "whisper-large-v3": _model(1280, 32, 20, 128, 100),
        },
        encoder_flops=encoder_flops,
        encoder_params=encoder_params,
        decoder=decoder,
        workloads=(
            BenchWorkload("asr", requests=128, items=128, **clips),
            BenchWorkload("asr-reuse", requests=128, items=8, **clips),
            BenchWorkload("asr-latency", requests=20, items=20, one_by_one=True, **clips),
        ),
    )
