"""Whisper for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_whisper.bench import mm_bench as mm_bench
from mm_plugin_whisper.decoding import mm_decoder as mm_decoder
from mm_plugin_whisper.decoding import mm_fusion as mm_fusion
from mm_plugin_whisper.decoding import mm_tasks as mm_tasks


@hookimpl
def mm_families() -> list[ModelFamily]:
    """One family: all sizes, multilingual and English."""
    architectures = ("WhisperForConditionalGeneration",)
    return [ModelFamily("whisper", architectures, ("audio",))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """Task tokens and samples."""
    from mm_plugin_whisper.processor import WhisperProcessor

    return WhisperProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """Samples to rows, the spectrogram included."""
    from mm_plugin_whisper.encoder import AudioConfig, WhisperEncoder

    return WhisperEncoder(AudioConfig.from_checkpoint(checkpoint), context)
