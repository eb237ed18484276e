"""Pictures and videos for tests: noise over gradients, so that every patch differs."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 112, height: int = 84) -> Image.Image:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = rng.integers(0, 75, (height, width, 3))
    return Image.fromarray((ramp + noise + rng.integers(0, 60, 3)).clip(0, 255).astype(np.uint8))


def frames(seed: int = 0, count: int = 5, width: int = 84, height: int = 56) -> np.ndarray:
    """[count, height, width, 3] uint8."""
    return np.stack([np.asarray(picture(1000 * seed + i, width, height)) for i in range(count)])
