"""Tiny random BLIP-2 and InstructBLIP checkpoints, complete on disk, that transformers loads and generates from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from support.tiny import randomize_

Kind = Literal["blip2", "instructblip"]
Text = Literal["opt", "t5", "llama"]
Layout = Literal["hub", "tf5", "old"]

IMAGE_SIZE, PATCH, QUERIES = 56, 14, 6
SENTENCES = (
    "Question: what is in the picture? Answer: a brown fox and a lazy dog in the warm sun.",
    "Describe this image in one sentence. How many cats are there? The user asks, the model answers.",
    "a photo of the quick brown fox that jumps over the lazy dog while the cat sleeps",
)
NORM = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def randomize_t5_(model: Any, seed: int = 0, *, own_head: bool = False) -> None:
    """`randomize_` for T5, whose names and sizes are its own; own_head: Flan-T5's, which is not the embedding."""
    if own_head:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    randomize_(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "relative_attention_bias" in name:
                param.copy_(noise)
            elif name.endswith(("Attention.q.weight", "Attention.k.weight")):
                # Scores are not scaled: the queries are, as in T5's own initialisation.
                scale = model.config.d_kv**-0.25 * 1.5
                param.copy_(noise * scale / math.sqrt(param.shape[1]))
            elif name.endswith("shared.weight"):
                param.copy_(noise)
            elif name.endswith("decoder.final_layer_norm.weight"):
                # Otherwise a tied model repeats its last token.
                param.copy_(noise.sign() + noise * 0.1)


def make_tiny_blip2(root: Path, kind: Kind, text: Text, layout: Layout = "hub", seed: int = 0) -> Path:
    """Write a checkpoint; returns its directory. layout: what the hub holds, what transformers 5 writes, or what the
    hub held before image tokens had an id."""
    import transformers

    path = root / f"{kind}-{text}-{layout}-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(text)
    image_id = len(tokenizer)
    vocab_size = -(-(image_id + 1) // 16) * 16
    if layout != "old":
        tokenizer.add_tokens([transformers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    name = {"blip2": "Blip2", "instructblip": "InstructBlip"}[kind]
    config = _config(kind, text, tokenizer, vocab_size)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**json.loads(json.dumps({**config, "image_token_index": image_id})))
    ).eval()
    _randomize(model, text, seed, quiet=range(image_id, vocab_size))
    _write_processor(path, kind, layout, tokenizer)
    if layout == "tf5":
        model.save_pretrained(path)
        return path
    index = {} if layout == "old" else {"image_token_index": image_id}
    _write_json(path / "config.json", {**config, **index, "architectures": [type(model).__name__]})
    tensors = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    if text == "t5":  # the hub's repeat the embedding
        for stack in ("encoder", "decoder"):
            tensors[f"language_model.{stack}.embed_tokens.weight"] = tensors["language_model.shared.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _config(kind: Kind, text: Text, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """config.json as the hub holds it; a BLIP-2 one says of its parts what transformers 4 said."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": IMAGE_SIZE, "patch_size": PATCH, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
    }  # fmt: skip
    qformer = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
        "encoder_hidden_size": 32, "cross_attention_frequency": 2, "max_position_embeddings": 40,
        "vocab_size": 160, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    return {
        "model_type": {"blip2": "blip-2", "instructblip": "instructblip"}[kind],
        "vision_config": vision,
        "qformer_config": qformer,
        "text_config": _text_config(text, tokenizer, vocab_size),
        "num_query_tokens": QUERIES,
        "use_decoder_only_language_model": text != "t5",
        "torch_dtype": "float32",
    }


def _text_config(text: Text, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    shared = {"vocab_size": vocab_size, "pad_token_id": tokenizer.pad_token_id, "torch_dtype": "float32"}
    if text == "t5":
        return {
            **shared, "model_type": "t5", "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
            "eos_token_id": 1, "n_positions": 128, "is_encoder_decoder": True,
        }  # fmt: skip
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if text == "opt":  # which ends at a line's end, not at its eos token
        return {
            **shared, **sizes, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 48, "bos_token_id": 2,
            "eos_token_id": tokenizer.encode("\n", add_special_tokens=False)[0],
        }  # fmt: skip
    return {
        **shared, **sizes, "model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 4,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _randomize(model: Any, text: Text, seed: int, quiet: range) -> None:
    randomize_(model, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith(("position_embedding", "class_embedding", "query_tokens", "_embeddings.weight")):
                param.copy_(noise)
            elif "crossattention" in name and noise.dim() == 2:  # so that the picture matters
                param.copy_(noise * 3 / math.sqrt(param.shape[1]))
            elif name.endswith("embed_positions.weight"):  # so that answers do not repeat themselves
                param.copy_(noise)
            elif name.endswith("language_projection.weight"):
                param.copy_(noise * 2 / math.sqrt(param.shape[1]))
            elif name.endswith("model.decoder.final_layer_norm.weight"):
                param.copy_(noise.sign() + noise * 0.1)
        language = model.language_model
        if text == "t5":
            randomize_t5_(language, seed, own_head=True)
        rows = language.get_output_embeddings().weight
        stop = language.config.eos_token_id
        for row in (stop, language.config.pad_token_id, *quiet):
            rows[row] *= 0.1


def make_tokenizer(text: Text) -> Any:
    """A small tokenizer of the class that the family's checkpoints have."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if text == "t5":  # made by hand: training a unigram model gives another one every time
        words = sorted({f"▁{word}" for sentence in SENTENCES for word in sentence.split()})
        letters = [chr(c) for c in range(33, 127) if chr(c) != "<"]
        pieces = [*((word, -4.0) for word in words), *((letter, -6.0) for letter in letters)]
        special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
        return transformers.T5Tokenizer(vocab=[*special, *pieces], extra_ids=4)
    special = ["<s>", "<pad>", "</s>", "<unk>"] if text == "opt" else ["<unk>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    byte_level = text == "opt"
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=340 if byte_level else 200, special_tokens=special,
                                       initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    if byte_level:
        return transformers.GPT2Tokenizer(
            vocab=trained["vocab"], merges=merges, bos_token="</s>", eos_token="</s>", unk_token="</s>",
            pad_token="<pad>", add_bos_token=True,
        )  # fmt: skip
    return transformers.LlamaTokenizer(vocab=trained["vocab"], merges=merges, pad_token="<unk>", add_bos_token=True)


def make_qformer_tokenizer() -> Any:
    """A small BERT tokenizer, made by hand as training gives another one every time."""
    import transformers

    words = sorted({word for sentence in SENTENCES for word in re.findall(r"[a-z]+", sentence.lower())})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?:.,!", *words, *letters, *(f"##{c}" for c in letters)]
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})


def _write_processor(path: Path, kind: Kind, layout: Layout, tokenizer: Any) -> None:
    tokenizer.save_pretrained(path)
    if kind == "instructblip":
        make_qformer_tokenizer().save_pretrained(path / "qformer_tokenizer")
    image = {
        "do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, **NORM, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_processor_type": "BlipImageProcessor",
    }  # fmt: skip
    name = {"blip2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}[kind]
    if layout == "tf5":
        both = {"image_processor": image, "num_query_tokens": QUERIES, "processor_class": name}
        _write_json(path / "processor_config.json", both)
        return
    _write_json(path / "preprocessor_config.json", {**image, "processor_class": name})
    if layout == "hub":
        _write_json(path / "processor_config.json", {"num_query_tokens": QUERIES, "processor_class": name})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
