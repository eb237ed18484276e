# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""uint8 pictures to normalised patches: one launch for a pack of any sizes."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
COLUMNS = 5  # of the table of pictures: address, frames, groups down, groups across, first element of the output


@triton.jit
def patchify_kernel(
    out_ptr,
    pictures_ptr,
    values_ptr,
    P: tl.constexpr,
    DEPTH: tl.constexpr,
    MERGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK neighbouring elements of one picture's patches."""
    SIZE: tl.constexpr = 3 * DEPTH * P * P
    entry = pictures_ptr + tl.program_id(1) * COLUMNS
    frames = tl.load(entry + 1).to(tl.int32)
    rows = tl.load(entry + 2).to(tl.int32)
    cols = tl.load(entry + 3).to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    count = tl.cdiv(frames, DEPTH).to(tl.int64) * (rows * cols * (MERGE * MERGE * SIZE))
    if first >= count:
        return
    pixels = tl.load(entry).to(tl.pointer_type(tl.uint8))
    base = out_ptr + tl.load(entry + 4)
    # Patches counted from the one that the program begins in, so that each lane's arithmetic fits 32 bits.
    lane = (first % SIZE).to(tl.int32) + tl.arange(0, BLOCK)
    patch = (first // SIZE).to(tl.int32) + lane // SIZE
    place = lane % SIZE  # channel, frame, y, x
    x = place % P
    y = place // P % P
    slot = place // (P * P) % DEPTH
    channel = place // (DEPTH * P * P)
    group = patch // (MERGE * MERGE)
    inside = patch % (MERGE * MERGE)
    line = group // cols
    x += (group % cols * MERGE + inside % MERGE) * P
    y += (line % rows * MERGE + inside // MERGE) * P
    frame = tl.minimum(line // rows * DEPTH + slot, frames - 1)
    width = cols * (MERGE * P)
    at = frame.to(tl.int64) * (rows * (MERGE * P) * width * 3) + ((y * width + x) * 3 + channel)
    used = first + tl.arange(0, BLOCK) < count
    value = tl.load(pixels + at, mask=used, other=0).to(tl.int32)
    result = tl.load(values_ptr + channel * 256 + value, mask=used)
    tl.store(base + first + tl.arange(0, BLOCK), result, mask=used)


def patchify(pixels: Sequence[Tensor], values: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """See `mm_core.kernels.patchify`."""
    side, size = patch * merge, 3 * temporal * patch * patch
    entries, total, largest = [], 0, 0
    for picture in pixels:
        frames, height, width = picture.shape[:3]
        rows, cols = height // side, width // side
        count = -(-frames // temporal) * rows * cols * merge * merge * size
        entries.append((picture.data_ptr(), frames, rows, cols, total))
        total, largest = total + count, max(largest, count)
    device = values.device
    out = torch.empty((total // size, size), dtype=values.dtype, device=device)
    if total:
        table = torch.tensor(entries, dtype=torch.int64)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        patchify_kernel[(triton.cdiv(largest, BLOCK), len(entries))](
            out, table, values, P=patch, DEPTH=temporal, MERGE=merge, COLUMNS=COLUMNS, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
