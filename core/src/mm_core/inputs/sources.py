"""What the decoder reads, and where: in its prompt, or by cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_core.errors import InvalidPromptError, PluginError
from mm_core.hashing import Field, Hasher, encode_fields
from mm_core.hookspecs import Fusion
from mm_core.inputs.prompt import guarded
from mm_core.types import Modality, PlaceholderRange, Source


@dataclass(frozen=True)
class Parts:
    """A request's prompt and media, put where the decoder reads them; fields as in `PreparedRequest`."""

    token_ids: tuple[int, ...]
    ranges: tuple[PlaceholderRange, ...]
    kv_context: bytes = b""
    source: Source | None = None


@dataclass(frozen=True)
class SourceMaker:
    """Splits requests as the family's fusion has it. family: its name."""

    fusion: Fusion
    family: str
    modalities: tuple[Modality, ...]
    vocab_size: int
    hasher: Hasher

    def __post_init__(self) -> None:
        begin = getattr(self.fusion, "decoder_prompt", ())
        if self.fusion.kind == "encoder_decoder" and not (begin and all(0 <= i < self.vocab_size for i in begin)):
            raise PluginError(
                f"Fusion of plugin {self.family!r}: decoder_prompt is {begin!r}; kind 'encoder_decoder' needs at "
                f"least one token id, from 0 to {self.vocab_size - 1}. Report it to the plugin's author."
            )

    def check(self, counts: Mapping[Modality, int]) -> None:
        """Raise InvalidPromptError where the decoder would have nothing to attend to."""
        if self.fusion.kind == "cross_attention" and not counts:
            kinds = " or ".join(self.modalities)
            raise InvalidPromptError(
                f"Family {self.family!r} answers about media: a request needs {kinds}. Pass it as multi_modal_data, "
                "or as a part of the messages.",
                param="multi_modal_data",
            )

    def instruction(self, text: Callable[[], str]) -> tuple[int, ...]:
        """Token ids that `Fusion.condition` reads; text: gives the request's prompt, if it is asked for."""
        call: Callable[[str], Sequence[int]] | None = getattr(self.fusion, "instruction", None)
        if call is None:
            return ()
        prompt = text()
        ids: tuple[int, ...] = guarded(self.family, "instruction", lambda: tuple(int(i) for i in call(prompt)))
        return ids

    def split(
        self,
        namespace: bytes,
        ids: Sequence[int],
        ranges: tuple[PlaceholderRange, ...],
        instruction: tuple[int, ...],
    ) -> Parts:
        """ids, ranges: the expanded prompt. namespace: see `hashing.media_key`."""
        kind = self.fusion.kind
        wrong = next((r for r in ranges if (r.length == 0) is not (kind == "cross_attention")), None)
        if wrong is not None:
            raise PluginError(
                f"Processor of plugin {self.family!r}: expand() gave {wrong.length} ids for an item, the fusion being "
                f"of kind {kind!r}. Report it to the plugin's author."
            )
        if kind == "embed":
            return Parts(tuple(ids), ranges, _packed(instruction))
        text = tuple(ids) if kind == "encoder_decoder" else ()
        count = len(text) if text else sum(r.feature.num_placed for r in ranges)
        fields: list[Field] = [namespace, kind, _packed(text), _packed(instruction)]
        for r in ranges:
            fields += [r.feature.key, r.offset]
        key = self.hasher(encode_fields(fields))
        prompt: Any = self.fusion.decoder_prompt if text else ids  # type: ignore[attr-defined]
        return Parts(tuple(prompt), (), key, Source(key, count, text, ranges))


def _packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<i8").tobytes() if ids else b""
