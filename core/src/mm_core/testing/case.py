"""What a plugin's author hands to the kit: requests, and what a reference answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mm_core.types import Modality, TextPrompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One request that the rungs run on.

    name: in the tests' names. prompt: as `Engine.generate` takes it, text or token ids. media: one value or a
    list of them by modality: PIL images, frames (`testing.clip`), `(samples, rate)`. parity: whether the
    reference answers it too. processor_kwargs, chat_template: as in `TextPrompt` and `Engine.generate`.
    """

    name: str
    prompt: str | Sequence[int] = ""
    media: Mapping[Modality, Any] = field(default_factory=dict)
    parity: bool = True
    processor_kwargs: Mapping[str, Any] | None = None
    chat_template: bool | None = None

    def __repr__(self) -> str:
        return f"Case({self.name!r})"

    @property
    def items(self) -> dict[Modality, list[Any]]:
        """Values by modality, each in order; modalities without values are absent."""
        lists = {m: list(v) if isinstance(v, list) else [v] for m, v in self.media.items()}
        return {m: values for m, values in lists.items() if values}

    def text_prompt(self, cache_salt: str | None = None) -> TextPrompt:
        """The request itself."""
        text = isinstance(self.prompt, str)
        return TextPrompt(
            prompt=self.prompt if text else None,  # type: ignore[arg-type]
            prompt_token_ids=None if text else self.prompt,  # type: ignore[arg-type]
            multi_modal_data={str(modality): values for modality, values in self.items.items()},
            mm_processor_kwargs=self.processor_kwargs,
            cache_salt=cache_salt,
        )

    def with_items(self, items: Mapping[Modality, Sequence[Any]], name: str = "") -> Case:
        """The same request about other media."""
        return replace(self, media={m: list(v) for m, v in items.items()}, name=f"{self.name} {name}".rstrip())

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it has, in the support matrix's words: "image", "several images", "video", "audio"; else "text"."""
        found = [f"several {m}s" if len(v) > 1 and m == "image" else m for m, v in self.items.items()]
        return tuple(str(kind) for kind in found) or ("text",)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a reference gives: greedy token ids, the one that ends the answer included.

    logits: [tokens, vocab] before every token, and prompt_ids: the expanded prompt; each is compared where given.
    """

    token_ids: Sequence[int]
    logits: Tensor | None = None
    prompt_ids: Sequence[int] | None = None
