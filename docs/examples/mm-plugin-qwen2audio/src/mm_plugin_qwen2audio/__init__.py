"""Qwen2-Audio for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Fusion, Processor, hookimpl
from mm_core.types import ModelFamily


@hookimpl
def mm_families() -> list[ModelFamily]:
    """Told without torch: `mm plugins` asks every plugin."""
    return [ModelFamily("qwen2audio", ("Qwen2AudioForConditionalGeneration",), ("audio",))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:
    """Text and sound to features."""
    from mm_plugin_qwen2audio.processor import Qwen2AudioProcessor

    return Qwen2AudioProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:
    """Spectrograms to rows. The decoder, a Qwen2, is mm-core's own."""
    from mm_plugin_qwen2audio.encoder import Qwen2AudioEncoder

    return Qwen2AudioEncoder(checkpoint, context)


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:
    """Rows replace placeholders."""
    from mm_plugin_qwen2audio.fusion import Qwen2AudioFusion

    return Qwen2AudioFusion()
