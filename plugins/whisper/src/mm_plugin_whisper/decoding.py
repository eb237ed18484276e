"""How the encoder's rows become text: the fusion, the decoder, the task. No torch until a hook is called."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from mm_core.hookspecs import Checkpoint, DecoderSpec, Fusion, Task, hookimpl
from mm_core.types import PlaceholderRange


class WhisperFusion:
    """hookspecs.Fusion: the decoder attends to the encoder's rows."""

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "cross_attention"

    def positions(self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]) -> None:
        """0…n-1."""


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:  # noqa: ARG001
    """Cross-attention."""
    return WhisperFusion()


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec:  # noqa: ARG001
    """Core's decoder with the checkpoint's sizes."""
    from mm_core.decoders import Seq2SeqConfig, Seq2SeqDecoder, seq2seq_weight_map

    config = Seq2SeqConfig.from_config(checkpoint.config)
    return DecoderSpec(
        build=partial(Seq2SeqDecoder, config),
        weight_map=seq2seq_weight_map(tied=config.tied),
        max_model_len=config.max_positions,
    )


@hookimpl
def mm_tasks(family: str, checkpoint: Checkpoint) -> Mapping[str, Task]:  # noqa: ARG001
    """`transcribe`."""
    from mm_plugin_whisper.transcribe import Transcriber

    return {"transcribe": Transcriber(checkpoint)}
