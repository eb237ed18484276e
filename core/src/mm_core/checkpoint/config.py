"""A checkpoint's settings and tokenizer. Nothing of a checkpoint is ever executed."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.checkpoint.files import sample_file
from mm_core.checkpoint.json_files import read_json_object, strip_code
from mm_core.checkpoint.source import Source, locate, sub_checkpoints
from mm_core.errors import CheckpointError, ConfigError
from mm_core.hashing import encode_fields, get_hasher

if TYPE_CHECKING:
    import torch

_PARTS = ("image_processor", "video_processor", "feature_extractor")
_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class LoadedCheckpoint:
    """A checkpoint that was found: implements `hookspecs.Checkpoint`.

    name: as the user gave it. path: its directory. identity: digest of config.json, of the
    weight files' headers and samples of their content, and of the revision; it enters every
    cache key. config: config.json without the keys that name code. parts: folders with a config.json and
    weights of their own (`source.sub_checkpoints`); the settings of one are `config["<part>_cfg"]`, and
    tokenizer, generation and processor settings are looked for there where the checkpoint itself has none.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.path = source.path
        self.revision = source.revision
        config = self._require_config()
        self.parts = sub_checkpoints(self.path, config)
        own = {f"{part}_cfg": self._read(folder / "config.json") for part, folder in self.parts.items()}
        self.config: Mapping[str, Any] = {**config, **own}
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def _require_config(self) -> Mapping[str, Any]:
        config = self.read_json("config.json")
        if config is None:
            raise CheckpointError(f"'{self.name}' has no config.json.")
        return config

    @property
    def architectures(self) -> tuple[str, ...]:
        """The `architectures` of config.json, by which a plugin is chosen."""
        value = self.config.get("architectures")
        if not isinstance(value, list) or not value or not all(isinstance(a, str) for a in value):
            raise CheckpointError(
                f"config.json of '{self.name}' has no usable `architectures` (found {value!r}); mm-core chooses the "
                'plugin by it. Add it, e.g. "architectures": ["Qwen2VLForConditionalGeneration"].'
            )
        return tuple(value)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """Settings of the language model in the flat spelling, whichever layout holds them."""
        return flat_text_config(self.config)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or an empty mapping."""
        return self._first_json("generation_config.json") or {}

    @cached_property
    def processor_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Preprocessing settings by part; "processor" holds what belongs to no part."""
        return split_processor_config(
            self._first_json("processor_config.json"),
            self._first_json("preprocessor_config.json"),
            self._first_json("video_preprocessor_config.json"),
        )

    @cached_property
    def identity(self) -> bytes:
        """Digest of what the checkpoint is; reads a few hundred kilobytes, not the weights."""
        fields: list[bytes | str | int] = [self.revision, *_identity_of(self.path)]
        for part, folder in self.parts.items():
            fields += [part, *_identity_of(folder)]
        return get_hasher("sha256")(encode_fields(fields))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use, once, by transformers' AutoTokenizer."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _load_tokenizer(self.name, self._tokenizer_folder())
            return self._tokenizer

    def read_json(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object beside config.json, without keys that name code; None where it is absent."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"'{name}' lies outside the checkpoint. Give a file name inside it.")
        return self._read(self.path / name)

    def _read(self, file: Path) -> Mapping[str, Any] | None:
        return strip_code(read_json_object(file)) if file.is_file() else None

    def _first_json(self, name: str) -> Mapping[str, Any] | None:
        """The file beside config.json, else the first part's that has one."""
        found = (self._read(folder / name) for folder in (self.path, *self.parts.values()))
        return next((settings for settings in found if settings is not None), None)

    def _tokenizer_folder(self) -> Path:
        for folder in (self.path, *self.parts.values()):
            if any((folder / name).is_file() for name in _TOKENIZER_FILES):
                return folder
        return self.path


def _identity_of(folder: Path) -> list[bytes | str]:
    index = folder / "model.safetensors.index.json"
    fields: list[bytes | str] = [
        (folder / "config.json").read_bytes(),
        index.read_bytes() if index.is_file() else b"",
    ]
    for file in sorted(folder.glob("*.safetensors")):
        fields += [file.name, sample_file(file)]
    return fields


def open_checkpoint(name: str, *, revision: str | None = None, show_progress: bool = True) -> LoadedCheckpoint:
    """Open a checkpoint directory, or download a hub id's settings, tokenizer and safetensors."""
    return LoadedCheckpoint(locate(name, revision=revision, show_progress=show_progress))


def flat_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, flat, with `rope_theta` and `rope_scaling`.

    Qwen2-VL on the hub keeps them at the top; transformers 5 writes `text_config`, with
    `rope_parameters`. Where both say whether embeddings are tied, the top level decides, as in
    transformers. The part `llm` of a checkpoint that is kept in parts is a complete model's settings.
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping) and isinstance(config.get("llm_cfg"), Mapping):
        nested, config = config["llm_cfg"], {}
    if not isinstance(nested, Mapping):
        nested = {key: value for key, value in config.items() if key not in ("vision_config", "audio_config")}
    flat = dict(nested)
    for key in ("dtype", "torch_dtype"):
        if flat.get(key) is None and config.get(key) is not None:
            flat[key] = config[key]
    if config.get("tie_word_embeddings") is not None:
        flat["tie_word_embeddings"] = config["tie_word_embeddings"]
    _flatten_rope(flat)
    return flat


def _flatten_rope(flat: dict[str, Any]) -> None:
    """Rewrite `rope_parameters` (transformers 5) and `rope_scaling` (before) to one spelling."""
    scaling: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = flat.pop(key, None)
        if isinstance(found, Mapping):
            scaling.update(found)
    theta = scaling.pop("rope_theta", None)
    if flat.get("rope_theta") is None and theta is not None:
        flat["rope_theta"] = theta
    kind = scaling.pop("rope_type", None)
    kind = scaling.pop("type", None) or kind or "default"
    if scaling.get("mrope_section") is not None and kind == "default":
        kind = "mrope"  # transformers calls an M-RoPE without length scaling "default"
    flat["rope_scaling"] = None if kind == "default" and not scaling else {"type": kind, **scaling}


def split_processor_config(
    processor: Mapping[str, Any] | None, preprocessor: Mapping[str, Any] | None, video: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Settings by part. What processor_config.json nests wins over the older files, as in transformers."""
    parts: dict[str, dict[str, Any]] = {}
    if preprocessor:
        parts[_part_of(preprocessor)] = dict(preprocessor)
    if video:
        parts["video_processor"] = dict(video)
    rest: dict[str, Any] = {}
    for key, value in (processor or {}).items():
        if key in _PARTS and isinstance(value, Mapping):
            parts[key] = dict(value)
        else:
            rest[key] = value
    if rest:
        parts["processor"] = rest
    return parts


def _part_of(preprocessor: Mapping[str, Any]) -> str:
    """Which part a flat preprocessor_config.json describes."""
    audio = "feature_extractor_type" in preprocessor or "sampling_rate" in preprocessor
    return "feature_extractor" if audio and "image_processor_type" not in preprocessor else "image_processor"


def _load_tokenizer(name: str, path: Path) -> Any:
    """AutoTokenizer over a copy that holds no Python and no `auto_map`.

    `trust_remote_code=False` alone is not relied on: published advisories show it bypassed.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="mm-core-tokenizer-") as folder:
        _stage_tokenizer(path, Path(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0].replace(folder, name)[:200]
            raise CheckpointError(
                f"The tokenizer of '{name}' cannot be loaded ({type(error).__name__}: {reason}). The checkpoint needs "
                "its tokenizer files (tokenizer.json, tokenizer_config.json, …) and a tokenizer class that "
                "transformers knows; code inside checkpoints is not run."
            ) from error
    tokenizer.name_or_path = name
    return tokenizer


def _stage_tokenizer(path: Path, folder: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for file in path.iterdir():
        if not file.is_file() or file.suffix in (".py", ".safetensors", ".bin", ".pt", ".pth"):
            continue
        if file.name == "config.json" and read_json_object(file).get("model_type") not in CONFIG_MAPPING_NAMES:
            continue  # AutoTokenizer would take no more of it than a reason to warn
        if file.suffix == ".json" and file.name != "tokenizer.json" and b"auto_map" in file.read_bytes():
            cleaned = strip_code(read_json_object(file))
            (folder / file.name).write_text(json.dumps(cleaned), encoding="utf-8")
        else:
            (folder / file.name).symlink_to(file.resolve())


def resolve_dtype(setting: str, checkpoint: LoadedCheckpoint, device: torch.device | str) -> torch.dtype:
    """The dtype weights are held and computed in.

    "auto" is the checkpoint's own on a GPU (bfloat16 where it names none) and float32 on a CPU,
    where half precision is slower; any other setting is taken at its word.
    """
    import torch

    if setting != "auto":
        if setting not in _DTYPES:
            raise ConfigError(f"dtype={setting!r} is unknown. Use 'auto', {', '.join(map(repr, _DTYPES))}.")
        return _torch_dtype(setting)
    if torch.device(device).type == "cpu":
        return torch.float32
    text = checkpoint.text_config
    found = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    found = str(found).removeprefix("torch.")
    if found not in _DTYPES:
        raise CheckpointError(
            f"config.json of '{checkpoint.name}' asks for dtype {found!r}, which mm-core does not compute in. "
            "Give dtype='bfloat16' (or 'float16', 'float32')."
        )
    return _torch_dtype(found)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
