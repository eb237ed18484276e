"""How Nougat's decoder meets the page: core's decoder for encoder-decoder models, and cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from mm_core.hookspecs import Checkpoint, DecoderSpec, Fusion, hookimpl
from mm_core.types import PlaceholderRange


class NougatFusion:
    """`hookspecs.Fusion`: the decoder attends to the page's rows."""

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "cross_attention"

    def positions(self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]) -> None:
        """0…n-1."""


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:  # noqa: ARG001
    """The decoder attends to the page."""
    return NougatFusion()


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec:  # noqa: ARG001
    """mBART's decoder as Nougat has it, which keeps its tensors below `decoder.`."""
    from mm_core.decoders import Seq2SeqConfig, Seq2SeqDecoder, seq2seq_weight_map
    from mm_plugin_nougat.encoder import SwinConfig

    config = Seq2SeqConfig.from_config(checkpoint.config["decoder"])
    encoder = SwinConfig.from_config(checkpoint.config)
    config = replace(config, source_size=encoder.out or encoder.width, max_source_len=encoder.num_rows)
    return DecoderSpec(
        build=partial(Seq2SeqDecoder, config),
        weight_map=seq2seq_weight_map("decoder.model.decoder.", "decoder.lm_head.", tied=config.tied),
        max_model_len=config.max_positions,
    )
