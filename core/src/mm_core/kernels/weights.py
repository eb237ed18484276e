"""Probabilities whose sums no device's order of adding can change."""

import torch
from torch import Tensor

WEIGHT_BITS = 40  # the best token weighs 2^40; a vocabulary of 2^22 tokens still sums within int64


def weights(scores: Tensor, peak: Tensor) -> Tensor:
    """exp(scores - peak) as fixed-point int64: sums of it are exact, whatever their order."""
    return scores.sub(peak).to(torch.float64).exp_().mul_(2.0**WEIGHT_BITS).round_().to(torch.int64)
