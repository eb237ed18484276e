"""Qwen2-VL's video preprocessing, written a second time from transformers' description.

Plain and slow: patch by patch, so that it shares no idea with the code under test.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.reference import Video

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def reference_video(frames: np.ndarray, fps: float, min_pixels: int = 56 * 56, max_pixels: int = 64 * 28 * 28) -> Video:
    """frames: [n, height, width, 3] uint8; an odd one out is repeated to fill the last pair."""
    height, width = smart_resize(*frames.shape[1:3], factor=28, min_pixels=min_pixels, max_pixels=max_pixels)
    resized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
    if len(resized) % 2:
        resized.append(resized[-1])
    normal = [((f.astype(np.float64) * (1 / 255)).astype(np.float32) - _MEAN) / _STD for f in resized]
    t, h, w = len(normal) // 2, height // 14, width // 14
    patches = []
    for pair in range(t):
        for block_y in range(0, h, 2):
            for block_x in range(0, w, 2):
                for y in (block_y, block_y + 1):
                    for x in (block_x, block_x + 1):
                        both = [normal[2 * pair + i][14 * y : 14 * y + 14, 14 * x : 14 * x + 14] for i in (0, 1)]
                        patches.append(np.stack(both).transpose(3, 0, 1, 2).ravel())
    return Video(torch.from_numpy(np.stack(patches)), (t, h, w), 2 / fps)
