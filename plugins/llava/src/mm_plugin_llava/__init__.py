"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Fusion, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_llava.bench import mm_bench as mm_bench
from mm_plugin_llava.decoder import mm_decoder as mm_decoder


@hookimpl
def mm_families() -> list[ModelFamily]:
    """Two: only OneVision reads video. Both share all code."""
    pictures = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
    return [
        ModelFamily("llava", pictures, ("image",)),
        ModelFamily("llava_onevision", ("LlavaOnevisionForConditionalGeneration",), ("image", "video")),
    ]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """Text and pixels to features."""
    from mm_plugin_llava.processor import LlavaProcessor

    return LlavaProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """Tower and projector."""
    from mm_plugin_llava.encoder import LlavaEncoder

    return LlavaEncoder.from_checkpoint(checkpoint, context)


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:  # noqa: ARG001
    """Rows replace placeholders."""
    from mm_plugin_llava.encoder import LlavaFusion

    return LlavaFusion()
