"""Chat templates of checkpoints, and the family's own for those without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.hookspecs import Checkpoint

_PARTS = "{% for part in message['content'] | selectattr('type', 'equalto', '"
_IMAGES = _PARTS + "image') %}{{ '<image>\\n' }}{% endfor %}"
_TEXTS = _PARTS + "text') %}{{ part['text'] }}{% endfor %}"
# By the type of the text model, as the published checkpoints of it were trained.
_OWN: Mapping[str, str] = {
    "llama": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
        "{% endif %}" + _IMAGES + _TEXTS + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}" + _IMAGES + _TEXTS
        + "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' }}" + _TEXTS + "{{ '</s> ' }}"
        "{% else %}{{ '<<SYS>>\\n' }}" + _TEXTS + "{{ '\\n<</SYS>>\\n\\n' }}{% endif %}{% endfor %}"
    ),
    "qwen2": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        + _PARTS + "image') %}{{ '<image>' }}{% endfor %}" + _PARTS + "video') %}{{ '<video>' }}{% endfor %}"
        "{{ '\\n' }}" + _TEXTS + "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}  # fmt: skip


def chat_template(checkpoint: Checkpoint, text_type: str) -> str:
    """The checkpoint's template: chat_template.jinja or .json, the processor's, the tokenizer's where it knows
    pictures (a text model's does not); else the family's own for the text model."""
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    tokenizers: Any = getattr(checkpoint.tokenizer, "chat_template", None)
    for found in (
        (checkpoint.read_json("chat_template.json") or {}).get("chat_template"),
        checkpoint.processor_config.get("processor", {}).get("chat_template"),
        tokenizers if "image" in str(tokenizers) else None,
    ):
        if isinstance(found, str) and found:
            return found
    return _OWN[text_type]
