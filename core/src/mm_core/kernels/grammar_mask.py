"""Scores of tokens that a grammar does not allow."""

import math

import numpy as np
import torch
from torch import Tensor


def mask_(scores: Tensor, rows: Tensor, masks: Tensor, places: Tensor) -> None:
    """Sets scores to -inf in place where the bit of a row's mask is 0; other rows stay as they are.

    scores: float32 [R, V]. rows: int64 [n], no row twice. masks: int32 [M, W], contiguous, with W ≥ V / 32: bit v % 32
    of word v // 32 is token v's. places: int64 [n], which of the masks.
    """
    run = mask_triton if scores.device.type == "cuda" else _mask_cpu
    run(scores, rows, masks, places)


def mask_triton(scores: Tensor, rows: Tensor, masks: Tensor, places: Tensor) -> None:
    """`mask_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import grammar_mask as impl

    impl.mask_(scores, rows, masks, places)


def _mask_cpu(scores: Tensor, rows: Tensor, masks: Tensor, places: Tensor) -> None:
    width = scores.shape[1]
    words = ~masks.numpy()
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        bits = np.unpackbits(words[place].view(np.uint8), count=width, bitorder="little")
        scores[row].masked_fill_(torch.from_numpy(bits.view(np.bool_)), -math.inf)
