"""Pictures as they come from the decoder to the patches that an encoder multiplies."""

from collections.abc import Sequence

from torch import Tensor


def patchify(pixels: Sequence[Tensor], values: Tensor, *, patch: int, temporal: int, merge: int) -> Tensor:
    """values[channel, pixel] of every pixel, patch by patch, all pictures one after another.

    pixels: contiguous uint8 [frames, height, width, 3] each, height and width multiples of patch · merge.
    values: [3, 256], what each of the 256 levels becomes; its dtype is the result's.
    Returns [patches, 3 · temporal · patch²]. Order of rows: time, then blocks of merge × merge patches row by
    row, then the patches inside a block. Inside a row: channel, frame, y, x. Missing frames of the last step
    repeat the last one. One launch on a GPU; nothing waits.
    """
    if values.device.type == "cuda":
        return patchify_triton(pixels, values, patch=patch, temporal=temporal, merge=merge)
    from mm_core.kernels import reference

    return reference.patchify(pixels, values, patch=patch, temporal=temporal, merge=merge)


def patchify_triton(pixels: Sequence[Tensor], values: Tensor, *, patch: int, temporal: int, merge: int) -> Tensor:
    """`patchify` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import patchify as impl

    return impl.patchify(pixels, values, patch, temporal, merge)
