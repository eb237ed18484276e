"""Encoder rows on their way into the decoder: as they are, or as `Fusion.condition` makes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mm_core.errors import MMError, PluginError
from mm_core.hookspecs import Decoder, Encoder, Fusion, WeightMap
from mm_core.runner.batch import FusedItem
from mm_core.runner.memory import common_spec, is_lost, is_out_of_memory
from mm_core.runner.upload import upload
from mm_core.types import MediaFeature

logger = logging.getLogger(__name__)

_QUESTION = "What is in this picture, and what is it for?"  # that a made-up item is asked with


@dataclass(frozen=True)
class Modules:
    """What a family's plugin built, as far as it runs on the device. fusion: None for plain `embed`."""

    family: str
    decoder: Decoder
    encoder: Encoder
    fusion: Fusion | None = None

    @property
    def has_cross(self) -> bool:
        """Whether the decoder attends to a source."""
        return any(spec.name == "cross" for spec in self.decoder.kv_specs)

    @property
    def reads_text(self) -> bool:
        """Whether a text encoder makes the source."""
        return self.fusion is not None and self.fusion.kind == "encoder_decoder"

    @property
    def conditions(self) -> bool:
        """Whether the fusion has a `condition`."""
        return callable(getattr(self.fusion, "condition", None))

    @property
    def instruction(self) -> tuple[int, ...]:
        """What a made-up item is asked with; nothing where no instruction is read."""
        ask = getattr(self.fusion, "instruction", None) if self.conditions else None
        return () if ask is None else tuple(ask(_QUESTION))

    def source_len(self, max_model_len: int, longest_item: int = 0) -> int:
        """Keys of the longest source that graphs and measurements are made for, 0 without cross-attention: what
        the decoder says, else as long as a prompt or the longest known item. Longer ones run without graphs."""
        if not self.has_cross:
            return 0
        return int(getattr(self.decoder, "max_source_len", 0)) or max(max_model_len, longest_item)


def check_modules(modules: Modules) -> None:
    """Raise PluginError where the parts of a family do not fit together, naming what is missing."""
    common_spec(modules.decoder.kv_specs)
    names = {spec.name for spec in modules.decoder.kv_specs}
    fusion, decoder = modules.fusion, modules.decoder
    kind = "embed" if fusion is None else fusion.kind
    wanted = {"self"} if kind == "embed" else {"self", "cross"}
    missing = []
    if names != wanted:
        missing.append(f"kv_specs named {sorted(wanted)} in its decoder (it has {sorted(names)})")
    if kind != "embed" and not callable(getattr(decoder, "write_source", None)):
        missing.append("a decoder with write_source")
    if kind == "encoder_decoder" and not callable(getattr(decoder, "encode_source", None)):
        missing.append("a decoder with encode_source")
    if kind == "encoder_decoder" and not getattr(fusion, "decoder_prompt", ()):
        missing.append("a fusion with decoder_prompt")
    if modules.conditions and not (isinstance(fusion, nn.Module) and isinstance(fusion.weight_map, WeightMap)):
        missing.append("a fusion that is an nn.Module with weight_map, because it has condition")
    if missing:
        raise PluginError(
            f"Family {modules.family!r} fuses by {kind!r}, which needs {'; '.join(missing)}. Report it to the "
            "plugin's author."
        )


class Conditioner:
    """Calls `Fusion.condition` for all items of a step, and one by one where that fails."""

    def __init__(self, modules: Modules, slab: Tensor) -> None:
        self._modules = modules
        self._slab = slab

    def run(self, items: Sequence[FusedItem]) -> tuple[Tensor, dict[int, MMError]]:
        """Placed rows of all items, one after another; sequences whose items failed, which have zeros there."""
        failed: dict[int, MMError] = {}
        rows = self._together(items, failed)
        return torch.cat(rows) if len(rows) > 1 else rows[0], failed

    def _together(self, items: Sequence[FusedItem], failed: dict[int, MMError]) -> list[Tensor]:
        try:
            return self._condition(items)
        except Exception as error:
            if is_out_of_memory(error) or is_lost(error):  # no item's fault
                raise
            if len(items) > 1:
                return [rows for item in items for rows in self._together([item], failed)]
            failed[items[0].seq_id] = explain(error, f"Fusion.condition of family {self._modules.family!r}")
            width = self._modules.decoder.hidden_size
            return [torch.zeros((items[0].num_placed, width), dtype=self._slab.dtype, device=self._slab.device)]

    def _condition(self, items: Sequence[FusedItem]) -> list[Tensor]:
        (places,) = upload([np.concatenate([item.places for item in items])], self._slab.device)
        given = self._slab.index_select(0, places).split_with_sizes([len(item.places) for item in items])
        fusion, width = self._modules.fusion, self._modules.decoder.hidden_size
        found: list[Tensor] = fusion.condition(given, [item.instruction for item in items])  # type: ignore[union-attr]
        wanted = [(item.num_placed, width) for item in items]
        if (shapes := [tuple(rows.shape) for rows in found]) != wanted:
            raise PluginError(
                f"Fusion.condition of family {self._modules.family!r} gave rows of shapes {shapes} where {wanted} "
                "were promised. Report it to the plugin's author."
            )
        return found


def made_up_items(feature: MediaFeature, instruction: tuple[int, ...], tokens: int, rows: int) -> list[FusedItem]:
    """As many such items as a step has tokens for, or the encoder's cache rows."""
    count = max(min(tokens // max(feature.num_placed, 1), rows // feature.num_tokens), 1)
    places = np.arange(count * feature.num_tokens, dtype=np.int32).reshape(count, -1) % rows
    return [FusedItem(-1, place, instruction, feature.num_placed) for place in places]


def explain(error: Exception, what: str) -> MMError:
    """The error of a request for which a plugin's `what` failed."""
    if isinstance(error, MMError):
        return error
    logger.error("%s failed", what, exc_info=error)
    fault = PluginError(
        f"{what} failed with {type(error).__name__}. The log has the details; report it to the plugin's author."
    )
    fault.__cause__ = error
    return fault
