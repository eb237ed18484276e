"""Log-mel spectrograms as Whisper defines them, on whatever device the samples are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_LINEAR_HZ = 200.0 / 3  # Hz a mel below the break
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27  # 27 mels from 1000 to 6400 Hz


def mel_filters(n_mels: int, n_fft: int = 400, sampling_rate: int = 16000) -> Tensor:
    """Triangular filters of equal area, evenly spaced in mel from 0 Hz to half the rate: float32
    [n_mels, n_fft // 2 + 1], computed in float64.

    Source of scale and areas: Slaney's Auditory Toolbox (1998), as `librosa.filters.mel` has them by default.
    """
    import torch

    half = sampling_rate / 2
    edges = _to_hz(np.linspace(_to_mel(0.0), _to_mel(half), n_mels + 2))  # each filter's ends are its neighbours' tops
    bins = np.linspace(0.0, half, n_fft // 2 + 1)
    below, top, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - below) / (top - below), (above - bins) / (above - top)
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (above - below))
    return torch.from_numpy(filters).to(torch.float32)


def _to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return float(_BREAK_MEL + np.log(hz / _BREAK_HZ) / _LOG_STEP)


def _to_hz(mels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mels, _BREAK_MEL) - _BREAK_MEL))
    hz: np.ndarray[Any, Any] = np.where(mels < _BREAK_MEL, mels * _LINEAR_HZ, logarithmic)
    return hz


def log_mel(
    samples: Tensor, filters: Tensor, *, n_fft: int = 400, hop_length: int = 160, window: Tensor | None = None
) -> Tensor:
    """float32 [B, n] → float32 [B, n_mels, n // hop_length]; each item for itself.

    filters: `mel_filters`, on the samples' device. window: [n_fft], a periodic Hann window where it is None.
    Powers below 1e-10 count as 1e-10, and those 80 dB below the item's loudest as that. Waits for no device.
    Source: `log_mel_spectrogram` of openai/whisper, audio.py.
    """
    import torch

    if window is None:
        window = torch.hann_window(n_fft, device=samples.device)
    spectrum = torch.stft(samples, n_fft, hop_length, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square()  # [B, bins, frames]; the last frame is left out
    logs = (filters @ power).clamp_(min=1e-10).log10_()
    floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
    return torch.maximum(logs, floor).add_(4.0).div_(4.0)
