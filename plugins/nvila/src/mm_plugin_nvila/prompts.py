"""Prompt templates: Qwen2's, and the conversations that VILA-1.5 was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_core.errors import ConfigError, InvalidPromptError


@dataclass(frozen=True)
class Template:
    """Texts around messages. system: around the system's message, which is `default` where none is given; user
    and assistant: around theirs. What comes before an assistant's message asks for one."""

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    @property
    def stop(self) -> str:
        """The text that ends an answer."""
        return self.assistant[1].rstrip("\n")

    def render(self, messages: Sequence[Mapping[str, Any]], media: Mapping[Any, str]) -> str:
        """Messages to a prompt that ends where the assistant begins. media: placeholders by part type."""
        system, turns = self.default, list(messages)
        if turns[0]["role"] in ("system", "developer"):
            system = _text(turns.pop(0)["content"], media)
        out = [self.system[0], system, self.system[1]]
        for message in turns:
            around = {"user": self.user, "assistant": self.assistant}.get(message["role"])
            if around is None:
                raise InvalidPromptError(
                    f"This model's template has no place for the role {message['role']!r} here: one system message "
                    "may come first, then user and assistant.",
                    param="messages",
                )
            out += [around[0], _text(message["content"], media), around[1]]
        return "".join([*out, self.assistant[0].rstrip(" ")])


def _text(content: Any, media: Mapping[Any, str]) -> str:
    if isinstance(content, str):
        return content
    return "".join(media[part["type"]] if part["type"] in media else part["text"] for part in content)


QWEN2 = Template(
    "You are a helpful assistant",
    ("<|im_start|>system\n", "<|im_end|>\n"),
    ("<|im_start|>user\n", "<|im_end|>\n"),
    ("<|im_start|>assistant\n", "<|im_end|>\n"),
)
VICUNA_V1 = Template(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ("", " "),
    ("USER: ", " "),
    ("ASSISTANT: ", "</s>"),
)
LLAMA_3 = Template(
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.",
    ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
)
HERMES_2 = Template(
    "Answer the questions.",
    ("<|im_start|>system\n", "<|im_end|>"),
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|im_start|>assistant\n", "<|im_end|>"),
)
TEMPLATES: Mapping[str, Template] = {
    "qwen2": QWEN2, "vicuna_v1": VICUNA_V1, "v1": VICUNA_V1, "llama_3": LLAMA_3, "llama_v3": LLAMA_3,
    "hermes-2": HERMES_2, "hermes_2": HERMES_2,
}  # fmt: skip

_FIELDS = ("conv_template", "conv_version", "conv_mode", "version", "chat_template")
# By which special tokens a Llama-like language model was trained, most telling first.
_BY_TOKEN = (("<|start_header_id|>", LLAMA_3), ("<|im_start|>", HERMES_2), ("</s>", VICUNA_V1))
_BY_NAME = (
    ("vila1.5-3b", VICUNA_V1), ("vila1.5-8b", LLAMA_3), ("vila1.5-13b", VICUNA_V1), ("vila1.5-40b", HERMES_2),
)  # fmt: skip


def choose(
    name: str, config: Mapping[str, Any], text_config: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> Template:
    """The template that config.json (or the language model's) names; else that of a VILA-1.5 size in the
    checkpoint's name; else Qwen2's for its models, and for Llama's the one whose special tokens there are."""
    for settings in (config, text_config):
        for field in _FIELDS:
            named = settings.get(field)
            if isinstance(named, str) and named in TEMPLATES:
                return TEMPLATES[named]
            if isinstance(named, str) and named != "auto" and "{" not in named:
                raise _unknown(f"config.json has {field}={named[:40]!r}")
    for part, template in _BY_NAME:
        if part in name.lower():
            return template
    kind = text_config.get("model_type")
    if kind == "qwen2":
        return QWEN2
    found = next((t for token, t in _BY_TOKEN if token in vocabulary), None) if kind == "llama" else None
    if found is None:
        raise _unknown(f"Which prompt template a language model of type {kind!r} wants is not known")
    return found


def _unknown(text: str) -> ConfigError:
    return ConfigError(f"{text}. Set conv_template in config.json to one of {', '.join(TEMPLATES)}.")
