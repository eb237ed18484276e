"""Models to measure: directories and hub ids, or checkpoints of real sizes that plugins describe, without weights.

Core knows no model: sizes, special tokens and prompts come from the plugins' `mm_bench` hook.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_core.benchspecs import BenchFamily, BenchModel, BenchPrompt, BenchWorkload
from mm_core.errors import ConfigError, MMError
from mm_core.plugins import PluginRegistry

logger = logging.getLogger(__name__)

_BYTES = 256


def built_in_models(registry: PluginRegistry) -> dict[str, BenchModel]:
    """Models of all plugins, by name."""
    return {name: model for family in _families(registry) for name, model in family.models.items()}


def workloads_of(registry: PluginRegistry) -> list[BenchWorkload]:
    """All plugins' own workloads."""
    return [workload for family in _families(registry) for workload in family.workloads]


def _families(registry: PluginRegistry) -> Iterator[BenchFamily]:
    """What all plugins say; one whose hook fails is passed over with a warning."""
    for owner in registry.owners("mm_bench"):
        try:
            yield registry.call_owner("mm_bench", owner, family=owner.family.name)
        except MMError as error:
            logger.warning("models of plugin '%s' are left out: %s", owner.plugin, error)


def family_of(registry: PluginRegistry, architectures: Sequence[str]) -> BenchFamily | None:
    """What the plugin that serves a checkpoint says about benchmarks; None where it says nothing."""
    owner = registry.resolve(architectures)
    if owner.plugin not in {o.plugin for o in registry.owners("mm_bench")}:
        return None
    family: BenchFamily = registry.call_owner("mm_bench", owner, family=owner.family.name)
    return family


def place_model(name: str, load_format: str, registry: PluginRegistry, folder: Path) -> str:
    """What to hand to the engine for `--model name`; a built-in model is written into `folder`.

    Raises ConfigError for a built-in model with another load format than "dummy": it has no weights.
    """
    models = built_in_models(registry)
    if name not in models or Path(name).is_dir():
        return name
    if load_format != "dummy":
        raise ConfigError(
            f"--model {name} is a built-in size without weights. Add --load-format dummy, or name a checkpoint's "
            "directory or hub id."
        )
    return str(write_model(models[name], folder / name))


def write_checkpoint(name: str, registry: PluginRegistry, path: Path) -> Path:
    """Write a built-in model as a checkpoint that can be chatted with: a user's turn is then the prompt that the
    family's workloads have. Raises ConfigError for a name that is none."""
    for family in _families(registry):
        if (model := family.models.get(name)) is not None:
            write_model(model, path)
            if family.prompt.complete is None:
                (path / "chat_template.jinja").write_text(_chat_template(family.prompt), encoding="utf-8")
            return path
    known = ", ".join(sorted(built_in_models(registry)))
    raise ConfigError(f"{name!r} is no built-in size. There are: {known or 'none; install a plugin'}.")


def _chat_template(prompt: BenchPrompt) -> str:
    """Jinja: every user's turn is head, media, text and tail; answers stand between them as they are."""
    head, media, tail = (json.dumps(piece, ensure_ascii=False) for piece in (prompt.head, prompt.media, prompt.tail))
    return (
        "{%- for message in messages -%}"
        f'{{%- if message.role == "user" -%}}{{{{- {head} -}}}}{{%- endif -%}}'
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
        f'{{%- if part.type == "text" -%}}{{{{- part.text -}}}}{{%- else -%}}{{{{- {media} -}}}}{{%- endif -%}}'
        "{%- endfor -%}{%- endif -%}"
        f'{{%- if message.role == "user" -%}}{{{{- {tail} -}}}}{{%- endif -%}}'
        "{%- endfor -%}"
    )


def write_model(model: BenchModel, path: Path) -> Path:
    """Write a checkpoint directory without weights; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    for file, content in model.files.items():
        if file == "tokenizer_config.json":
            content = {**content, **_tokenizer_settings(model.special_tokens)}
        (path / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    tokenizer = json.dumps(tokenizer_json(model.special_tokens), ensure_ascii=False)
    (path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return path


def _tokenizer_settings(special: Mapping[str, int]) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": sorted(special)}


def tokenizer_json(special: Mapping[str, int]) -> dict[str, Any]:
    """A byte-level tokenizer in the format of `tokenizers`: the special tokens at their own ids, bytes at
    the first 256 others, and words that no text is split into at the rest (so that every id decodes to
    text, as in a real vocabulary of this size)."""
    taken = {index: text for text, index in special.items()}
    count = max(_BYTES + len(taken), max(taken) + 1)
    characters = iter(byte_characters())
    vocab = {taken.get(index) or next(characters, f"Ġw{index}"): index for index in range(count)}
    shape = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for index, text in sorted(taken.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **shape},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **shape},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": [],
        },
    }  # fmt: skip


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(_BYTES, 2 * _BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_BYTES)]
