"""BLIP-2 and InstructBLIP for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Fusion, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_blip2.bench import mm_bench as mm_bench
from mm_plugin_blip2.decoder import mm_decoder as mm_decoder


@hookimpl
def mm_families() -> list[ModelFamily]:
    """One family: all have the same tower, and nearly the same Q-Former."""
    architectures = ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
    return [ModelFamily("blip2", architectures, ("image",))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """Text and pixels to features."""
    from mm_plugin_blip2.processor import Blip2Processor

    return Blip2Processor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """Vision tower, and BLIP-2's Q-Former."""
    from mm_plugin_blip2.encoder import make_encoder

    return make_encoder(checkpoint, context)


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint, context: BuildContext) -> Fusion:  # noqa: ARG001
    """Rows before the prompt; InstructBLIP's Q-Former between."""
    from mm_plugin_blip2.fusion import make_fusion

    return make_fusion(checkpoint, context)
