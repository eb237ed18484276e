"""Tiny random checkpoints that prove something, and transformers' answers from them.

Weights are scaled so that greedy output neither repeats itself nor ignores the media: fan-in scaled
matrices, norms and biases that are not trivial, a query and key gain of 1.5, embeddings of std 0.25. The
text model's last norm flips signs at random: otherwise a tied model repeats its last token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_core.testing.case import Answer

_SENTENCES = (
    "Describe this image. What is in the picture? Describe these images in one sentence.",
    "What does the speaker say? Write down what you hear, and who says it.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun.",
    "A system reads images, video and sound beside text and tells what there is to see and hear.",
)
_LAST_NORMS = ("model.norm.weight", "language_model.norm.weight")


def randomize_(model: nn.Module, seed: int = 0, *, quiet_rows: range = range(0)) -> None:
    """Fill every parameter in place with well-scaled noise that depends on seed and order only.

    quiet_rows: token ids whose embedding and output rows are made small, so that they are rarely chosen:
    special tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(_scaled(name, noise).to(param.dtype))
            if ("embed_tokens" in name or "lm_head" in name) and len(quiet_rows):
                param[quiet_rows.start : quiet_rows.stop] *= 0.1


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Noise of std 1 to the values of the parameter `name`."""
    if "embed_tokens" in name:
        return noise * 0.25
    if name.endswith("bias"):
        return noise * 0.1
    if noise.dim() == 1 and name.endswith(_LAST_NORMS):
        return noise.sign() + noise * 0.1
    if noise.dim() == 1:
        return 1.0 + noise * 0.1
    gain = 2.0 if "lm_head" in name else 1.5 if any(p in name for p in ("q_proj", "k_proj", "qkv")) else 1.0
    return noise * gain / math.sqrt(noise[0].numel())


def tiny_tokenizer(special_tokens: Sequence[str], *, eos: str, pad: str, vocab_size: int = 400) -> Any:
    """A byte-level BPE tokenizer of Qwen2's class, trained on a few sentences, then the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, eos_token=eos, pad_token=pad, model_max_length=32768
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A settings file of a checkpoint."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def greedy(model: Any, inputs: Mapping[str, Any], max_tokens: int, **options: Any) -> Answer:
    """The greedy answer of a transformers model.

    inputs: what its processor gives. options: more arguments of `generate`. With an encoder-decoder model the
    decoder's prompt is what `generate` begins with.
    """
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_tokens, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip
    ids = out.sequences[0].tolist()
    count = len(out.logits)
    return Answer(ids[len(ids) - count :], torch.cat(out.logits), ids[: len(ids) - count])
