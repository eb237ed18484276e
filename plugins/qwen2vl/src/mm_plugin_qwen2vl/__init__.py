"""Qwen2-VL and Qwen2.5-VL for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Fusion, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_qwen2vl.bench import mm_bench as mm_bench


@hookimpl
def mm_families() -> list[ModelFamily]:
    """One family: both versions share their processor, their decoder and most of their encoder."""
    architectures = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
    return [ModelFamily("qwen2vl", architectures, ("image", "video"))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """Text and pixels to features."""
    from mm_plugin_qwen2vl.processor import Qwen2VLProcessor

    return Qwen2VLProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """The vision tower. The decoder is core's own: its default hook knows the text models."""
    from mm_plugin_qwen2vl.encoder import Qwen2VLEncoder, VisionConfig
    from mm_plugin_qwen2vl.processor import read_all_settings

    return Qwen2VLEncoder(VisionConfig.from_config(checkpoint.config), read_all_settings(checkpoint), context)


@hookimpl
def mm_fusion(family: str, checkpoint: Checkpoint) -> Fusion:  # noqa: ARG001
    """Rows replace placeholders; positions have three axes."""
    from mm_plugin_qwen2vl.fusion import Qwen2VLFusion

    return Qwen2VLFusion.from_config(checkpoint.config)
