"""Public helpers for processors: bounded decoding, resizing, normalisation, patches, video frames, sound."""

from __future__ import annotations

from mm_core.media.audio import Audio, decode_audio, load_audio, samples_to_audio
from mm_core.media.decode import MediaLimits, array_to_image, decode_image, to_rgb
from mm_core.media.mel import log_mel, mel_filters
from mm_core.media.patchify import Normalisation, PatchLayout, normalise, patchify
from mm_core.media.resize import resize_frames, resize_image, smart_resize
from mm_core.media.video import Video, VideoSampling, decode_video, frames_to_video, sample_indices

__all__ = [
    "Audio",
    "MediaLimits",
    "Normalisation",
    "PatchLayout",
    "Video",
    "VideoSampling",
    "array_to_image",
    "decode_audio",
    "decode_image",
    "decode_video",
    "frames_to_video",
    "load_audio",
    "log_mel",
    "mel_filters",
    "normalise",
    "patchify",
    "resize_frames",
    "resize_image",
    "sample_indices",
    "samples_to_audio",
    "smart_resize",
    "to_rgb",
]
