"""Nougat for mm-core."""

from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Processor, hookimpl
from mm_core.types import ModelFamily
from mm_plugin_nougat.bench import mm_bench as mm_bench
from mm_plugin_nougat.decoding import mm_decoder as mm_decoder
from mm_plugin_nougat.decoding import mm_fusion as mm_fusion
from mm_plugin_nougat.pdf import mm_tasks as mm_tasks


@hookimpl
def mm_families() -> list[ModelFamily]:
    """One family: a Donut-Swin encoder and an mBART decoder."""
    return [ModelFamily("nougat", ("VisionEncoderDecoderModel",), ("image",))]


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:  # noqa: ARG001
    """A page to pixels."""
    from mm_plugin_nougat.processor import NougatProcessor

    return NougatProcessor(checkpoint)


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # noqa: ARG001
    """The Swin tower, with the pixels' normalisation."""
    from mm_plugin_nougat.encoder import SwinConfig, SwinEncoder
    from mm_plugin_nougat.processor import Settings

    return SwinEncoder(SwinConfig.from_config(checkpoint.config), Settings.from_checkpoint(checkpoint).norm, context)
