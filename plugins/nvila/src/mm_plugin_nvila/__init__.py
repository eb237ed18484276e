"""NVILA, NVILA-Lite and VILA-1.5 for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, DecoderSpec, Encoder, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_nvila.bench import mm_bench as mm_bench
from mm_plugin_nvila.fusion import mm_fusion as mm_fusion


@hookimpl
def mm_families() -> list[ModelFamily]:
    """One family."""
    architectures = (
        "LlavaLlamaModel", "NVILAForConditionalGeneration", "NVILALiteForConditionalGeneration",
        "VILAForConditionalGeneration",
    )  # fmt: skip
    return [ModelFamily("nvila", architectures, ("image", "video"))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """Text and pixels to features."""
    from mm_plugin_nvila.processor import VilaProcessor

    return VilaProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """Vision tower, merging of scales, projector."""
    from mm_plugin_nvila.encoder import VilaEncoder

    return VilaEncoder(checkpoint, context)


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec:  # noqa: ARG001
    """Core's Llama decoder under the names `llm.*`."""
    from mm_plugin_nvila.decoder import decoder_spec

    return decoder_spec(checkpoint)
