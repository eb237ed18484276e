"""CostModel: what it takes to compute, and to copy back, in seconds. Measured by the engine; no clock here."""

from __future__ import annotations

from dataclasses import dataclass, replace

_WEIGHT = 1 / 8  # of the latest observation


@dataclass(frozen=True)
class CostModel:
    """Seconds a prompt token, a unit of the encoder's cost, and a byte on its way back take; restore_seconds: what
    every restore takes besides, some of it a step's length. 0.0: not measured yet."""

    token_seconds: float = 0.0
    encoder_seconds: float = 0.0
    byte_seconds: float = 0.0
    restore_seconds: float = 0.0

    def recompute(self, tokens: float, encoder_cost: float = 0.0) -> float:
        """Seconds to compute so many tokens, and to encode what they need."""
        return tokens * self.token_seconds + encoder_cost * self.encoder_seconds

    def restore(self, nbytes: int) -> float:
        """Seconds to bring so many bytes back."""
        return self.restore_seconds + nbytes * self.byte_seconds

    def observe_step(self, tokens: int, encoder_cost: int, seconds: float) -> CostModel:
        """A step of so many tokens ended, so long after the one before it. Few tokens tell nothing of many."""
        if tokens < 64:
            return self
        if not encoder_cost:
            return replace(self, token_seconds=_mean(self.token_seconds, seconds / tokens))
        left = max(seconds - tokens * self.token_seconds, 0.0)
        return replace(self, encoder_seconds=_mean(self.encoder_seconds, left / encoder_cost))

    def observe_restore(self, nbytes: int, seconds: float) -> CostModel:
        """A restore of so many bytes took so long."""
        return self if not nbytes else replace(self, byte_seconds=_mean(self.byte_seconds, seconds / nbytes))


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + (new - old) * _WEIGHT
