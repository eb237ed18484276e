"""Sounds of any length in windows, and what of a window's answer is kept: transformers' long-form rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from mm_plugin_whisper.encoder import LogMel
from mm_plugin_whisper.processor import Samples, framed
from mm_plugin_whisper.settings import Sound

STAMP_SECONDS = 0.02  # a timestamp's step: two frames
_SHORTEST_CUT = 2 / 3  # of a window: where the search for a quiet place begins
_QUIET_SECONDS = 0.2


@dataclass(frozen=True)
class Window:
    """Media and processor arguments of one request. frames: of the sound that are in it, silence that continues
    it included; start, end: of the sound itself, in seconds."""

    audio: tuple[Samples, int]
    kwargs: dict[str, Any] | None
    frames: int
    start: float
    end: float


class Clip:
    """A whole sound. Shorter than a window it is continued by silence to a whole one."""

    def __init__(self, samples: Samples, sound: Sound) -> None:
        self._samples = samples
        self._sound = sound
        self._total = max(len(samples), sound.chunk)
        self.frames = self._total // sound.hop
        self.duration = len(samples) / sound.sampling_rate

    @cached_property
    def _peak(self) -> float:
        """The loudest log10 power of any band: windows are normalised by that of the whole sound."""
        mel, step = LogMel(self._sound, torch.device("cpu")), self._sound.frames
        parts = [(first, min(step, self.frames - first)) for first in range(0, self.frames, step)]
        samples = (framed(self._samples, self._total, *part, self._sound) for part in parts)
        return max(float(mel.powers(torch.from_numpy(part)[None]).max()) for part in samples)

    def over(self, seek: int) -> bool:
        """Whether nothing of the sound comes after frame `seek`."""
        return seek >= self.frames or seek * self._sound.hop >= len(self._samples)

    def window(self, seek: int) -> Window:
        """From frame `seek` on."""
        rate = self._sound.sampling_rate
        frames = min(self._sound.frames, self.frames - seek)
        start = seek * STAMP_SECONDS / 2
        span = (start, min(start + frames / self._sound.frames_per_second, self.duration))
        if not seek and self._total == self._sound.chunk:
            return Window((self._samples, rate), None, frames, *span)
        samples = framed(self._samples, self._total, seek, frames, self._sound)
        return Window((samples, rate), {"frames": frames, "peak": self._peak}, frames, *span)

    def chunks(self) -> list[Window]:
        """The sound cut at its quietest places, the last third of a window being where a cut may be."""
        chunk, rate = self._sound.chunk, self._sound.sampling_rate
        windows: list[Window] = []
        begin = 0
        while begin < len(self._samples):
            end = len(self._samples)
            if end - begin > chunk:
                earliest = begin + int(chunk * _SHORTEST_CUT)
                end = earliest + quietest(self._samples[earliest : begin + chunk], int(_QUIET_SECONDS * rate))
            part = self._samples[begin:end]
            windows.append(Window((part, rate), None, len(part) // self._sound.hop, begin / rate, end / rate))
            begin = end
        return windows


def quietest(samples: Samples, width: int) -> int:
    """The middle of the `width` samples that have the least energy together."""
    energy = np.concatenate(([0.0], np.cumsum(np.square(samples, dtype=np.float64))))
    return int(np.argmin(energy[width:] - energy[:-width])) + width // 2


class Piece(NamedTuple):
    """Tokens between two timestamps, these included; start and end in seconds from the window's begin."""

    start: float
    end: float
    tokens: tuple[int, ...]


def split(tokens: Sequence[int], stamps: int, frames: int, *, whole: bool = False) -> tuple[list[Piece], int]:
    """An answer (without its end token) to pieces, and by how many frames to go on.

    Two timestamps in a row end a piece. Where the answer ends with a single one, nothing is said after it;
    where it ends in the middle of a piece, that piece is heard again from its begin, unless `whole`: then it is
    kept, up to the window's end. stamps: id of `<|0.00|>`; frames: of the window that are sound.
    Source: `_retrieve_segment` of transformers.
    """
    is_stamp = [token >= stamps for token in tokens]
    ends = [i + 1 for i in range(len(tokens) - 1) if is_stamp[i] and is_stamp[i + 1]]
    until_end = int(frames * 0.01 / STAMP_SECONDS)  # with the reference's rounding
    if not ends:
        last = next((token - stamps for token in reversed(tokens) if token >= stamps), 0) or until_end
        return [Piece(0.0, last * STAMP_SECONDS, tuple(tokens))], frames

    def piece(begin: int, end: int, until: int) -> Piece:
        return Piece((tokens[begin] - stamps) * STAMP_SECONDS, until * STAMP_SECONDS, tuple(tokens[begin:end]))

    pieces = [piece(begin, end, tokens[end - 1] - stamps) for begin, end in pairwise([0, *ends])]
    rest = ends[-1]
    if is_stamp[-2:] == [False, True]:
        return [*pieces, piece(rest, len(tokens), tokens[-1] - stamps)], frames
    if whole and rest < len(tokens) - 1:
        return [*pieces, piece(rest, len(tokens), until_end)], frames
    # The second of the last two stays with the piece, so that it can be seen that there were two.
    pieces[-1] = pieces[-1]._replace(tokens=(*pieces[-1].tokens, tokens[rest]))
    return pieces, frames if whole else (tokens[rest - 1] - stamps) * 2
