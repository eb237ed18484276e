"""Scores of tokens that a sequence has had already."""

import torch
from torch import Tensor

IN_PROMPT = 2**30
"""Marks a token of the prompt in a table of counts; above any count."""


def penalise_(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Changes some rows of scores in place: repetition as in transformers (Keskar et al. 2019), over prompt and
    output; then frequency and presence as OpenAI defines them, over the output.

    scores: float32 [R, V]. rows: int64 [n], ascending. counts: int32 [P, V], how often each token is in a
    sequence's output, plus IN_PROMPT if it is in the prompt. places: int64 [n], which of the counts.
    repetition, frequency, presence: float64 [n], applied in float32.
    """
    run = penalise_triton if scores.device.type == "cuda" else _penalise_cpu
    run(scores, rows, counts, places, repetition, frequency, presence)


def penalise_triton(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """`penalise_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import penalties as impl

    impl.penalise_(scores, rows, counts, places, repetition, frequency, presence)


def _penalise_cpu(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    own = scores if len(rows) == len(scores) else scores[rows]
    repetition, frequency, presence = (x[:, None].to(scores.dtype) for x in (repetition, frequency, presence))
    found = counts[places]
    output = found & (IN_PROMPT - 1)
    repeated = torch.where(own < 0, own * repetition, own / repetition)
    changed = torch.where(found != 0, repeated, own)
    changed.sub_(frequency * output).sub_(presence * (output > 0))
    scores.index_copy_(0, rows, changed)
