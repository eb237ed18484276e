"""CostModel: what it takes to compute, and to copy back, in seconds. Measured by the engine; no clock here."""

from __future__ import annotations

from dataclasses import dataclass, replace

ENCODER_UNIT_TOKENS = 1 / 8  # a unit of the encoder's cost in prompt tokens, until measured: towers are smaller
MIN_TOKENS = 64  # a step of fewer prompt tokens tells of the weights' way to the processor, not of the tokens
_LEAST = 1e-9  # seconds a token: below that a clock is wrong
_LONGEST = 3600.0  # seconds a step: the machine slept
_WEIGHT = 1 / 8  # of the latest observation
_PRIOR = 0.01  # weight of the ratio known so far, which alone decides where all steps have the same mixture
_FIRST = 8  # observations that may be far off: some compile, allocate, load
_ODD = 100.0  # how many times dearer, or cheaper, than that guess a unit can be
_MOST = 2.0  # of any later one: how many times more, or less, than expected it may be


@dataclass(frozen=True)
class CostModel:
    """Seconds a prompt token, a unit of the encoder's cost, and a byte on its way back take; restore_seconds: what
    every restore takes besides: until the end of a step is seen that it is there, about one of decodes. 0.0: not
    measured yet.

    moments: decayed sums over the steps seen, of x², xy, y², x and y, where x is a step's tokens and y its encoder
    cost, both a second. counts: such steps, steps of decodes alone, and restores, seen.
    """

    token_seconds: float = 0.0
    encoder_seconds: float = 0.0
    byte_seconds: float = 0.0
    restore_seconds: float = 0.0
    moments: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    counts: tuple[int, int, int] = (0, 0, 0)

    def recompute(self, tokens: float, encoder_cost: float = 0.0) -> float:
        """Seconds to compute so many tokens, and to encode what they need; 0.0 while no step was measured."""
        return tokens * self.token_seconds + encoder_cost * self.encoder_seconds

    def weight(self, tokens: float, encoder_cost: float = 0.0) -> float:
        """As `recompute`, in prompt tokens that take as long: comparable with what was weighed before any step was
        measured, or while others ran beside."""
        return tokens + encoder_cost * self._ratio

    @property
    def _ratio(self) -> float:
        return self.encoder_seconds / self.token_seconds if self.token_seconds else ENCODER_UNIT_TOKENS

    def restore(self, nbytes: int) -> float:
        """Seconds to bring so many bytes back."""
        return self.restore_seconds + nbytes * self.byte_seconds

    def observe_step(self, tokens: int, encoder_cost: float, seconds: float, decodes: int = 0) -> CostModel:
        """A step of so many prompt tokens beside `decodes` sequences with one token each took so long.

        Least squares of the relative error 1 - token_seconds x - encoder_seconds y, the past decaying. Steps that
        took far too long have small x and y, and so hardly count; where steps do not tell tokens from media, the
        ratio stays what it was.
        """
        if not _LEAST * (tokens + encoder_cost) < seconds < _LONGEST or tokens < 0 or encoder_cost < 0:
            return self
        if tokens < MIN_TOKENS and not encoder_cost:
            return self._observe_decodes(seconds) if decodes and not tokens else self
        left = max(seconds - self.restore_seconds, seconds / 10) if decodes else seconds
        expected = self.recompute(tokens, encoder_cost)
        most = _MOST if self.counts[0] >= _FIRST else _ODD
        if expected:
            left = min(max(left, expected / most), expected * most)
        x, y, keep = tokens / left, encoder_cost / left, 1 - _WEIGHT
        latest = (x * x, x * y, y * y, x, y)
        xx, xy, yy, sx, sy = (keep * old + new for old, new in zip(self.moments, latest, strict=True))
        token, encoder = _solve(xx, xy, yy, sx, sy, self._ratio)
        if expected:
            token = min(max(token, self.token_seconds / most), self.token_seconds * most)
            encoder = min(max(encoder, self.encoder_seconds / most), self.encoder_seconds * most)
        return replace(
            self,
            token_seconds=token,
            encoder_seconds=encoder,
            moments=(xx, xy, yy, sx, sy),
            counts=(self.counts[0] + 1, *self.counts[1:]),
        )

    def _observe_decodes(self, seconds: float) -> CostModel:
        steps, decodes, restores = self.counts
        value = _mean(self.restore_seconds, seconds, decodes)
        return replace(self, restore_seconds=value, counts=(steps, decodes + 1, restores))

    def observe_restore(self, nbytes: int, seconds: float) -> CostModel:
        """The copies of a restore of so many bytes took so long."""
        if nbytes <= 0 or not _LEAST < seconds < _LONGEST:
            return self
        steps, decodes, restores = self.counts
        value = _mean(self.byte_seconds, seconds / nbytes, restores)
        return replace(self, byte_seconds=value, counts=(steps, decodes, restores + 1))


def _solve(xx: float, xy: float, yy: float, sx: float, sy: float, ratio: float) -> tuple[float, float]:
    """The two estimates, drawn a little towards encoder = ratio · token, neither of them negative or absurd."""
    pull = _PRIOR * max(xx / ENCODER_UNIT_TOKENS**2, yy)
    a, b, c = xx + pull * ratio**2, xy - pull * ratio, yy + pull
    token, encoder = sx * c - sy * b, sy * a - sx * b  # times the determinant, which is positive
    least, most = ENCODER_UNIT_TOKENS / _ODD, ENCODER_UNIT_TOKENS * _ODD
    ratio = least if encoder <= least * token else most if encoder >= most * token else encoder / token
    token = (sx + ratio * sy) / (xx + 2 * ratio * xy + ratio**2 * yy)
    return token, ratio * token


def _mean(old: float, new: float, count: int) -> float:
    """The least of the first observations; from then on a running mean in which none counts for too much."""
    if count < _FIRST:
        return min(old, new) if count else new
    return old + (min(max(new, old / _MOST), old * _MOST) - old) * _WEIGHT
