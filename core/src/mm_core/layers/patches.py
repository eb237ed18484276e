"""Pictures to patches, on the device that multiplies them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.patchify import patchify
from mm_core.media.patchify import Normalisation, PatchLayout, normalise
from mm_core.media.patchify import patchify as patchify_array


class Patchify:
    """uint8 pictures to the normalised patches of `media.patchify`, rounded to `dtype`.

    On a GPU one launch for all pictures, from a table of what the 256 levels of each channel become,
    which the host computed: bit for bit what the CPU makes of them.
    """

    def __init__(self, layout: PatchLayout, norm: Normalisation, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self.norm = norm
        self.dtype = dtype
        levels = normalise(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1), norm)
        self._values = torch.from_numpy(np.ascontiguousarray(levels.T)).to(device, dtype)

    def __call__(self, pixels: Sequence[Tensor]) -> Tensor:
        """Contiguous uint8 [frames, height, width, 3] each → [patches, 3 · temporal · patch²], in order."""
        layout = self.layout
        if self._values.device.type == "cuda":
            return patchify(pixels, self._values, patch=layout.patch, temporal=layout.temporal, merge=layout.merge)
        # Arithmetic is twice as fast as a table on a CPU.
        arrays = [patchify_array(p.numpy(), layout, self.norm)[0] for p in pixels]
        parts = [torch.from_numpy(a).to(self.dtype) for a in arrays]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
