"""Log-mel spectrograms against transformers' feature extractor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sampling import DEVICES, no_synchronisation

from mm_core.media import log_mel, mel_filters

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 30_000).astype(np.float32)


@pytest.mark.parametrize(
    ("n_mels", "n_fft", "hop", "rate"), [(80, 400, 160, 16000), (128, 400, 160, 16000), (64, 512, 128, 22050)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_log_mel_equals_transformers(n_mels: int, n_fft: int, hop: int, rate: int, device: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.WhisperFeatureExtractor(
        feature_size=n_mels, sampling_rate=rate, hop_length=hop, chunk_length=2, n_fft=n_fft
    )
    filters = mel_filters(n_mels, n_fft, rate)
    if rate == 16000:  # transformers' filters end at 8 kHz, whatever the rate
        assert np.abs(filters.numpy().T - reference.mel_filters).max() < 1e-7
    sound = np.resize(NOISE * np.linspace(0, 1, len(NOISE), dtype=np.float32), 2 * rate)
    quiet = np.concatenate([sound[:rate], np.zeros(rate, np.float32)])
    reference.mel_filters = filters.numpy().T.astype(np.float64)
    wanted = reference([sound, quiet], sampling_rate=rate, return_tensors="pt", truncation=False).input_features
    batch, on_device = torch.from_numpy(np.stack([sound, quiet])).to(device), filters.to(device)
    with no_synchronisation(torch.device(device)):
        found = log_mel(batch, on_device, n_fft=n_fft, hop_length=hop)
    assert found.shape == (2, n_mels, 2 * rate // hop)
    assert (found.cpu() - wanted).abs().max() < 1e-4
    for one, alone in zip(found, batch, strict=True):
        assert torch.allclose(one, log_mel(alone[None], on_device, n_fft=n_fft, hop_length=hop)[0], atol=1e-6)
    window = torch.hann_window(n_fft, device=device)
    assert torch.equal(found, log_mel(batch, on_device, n_fft=n_fft, hop_length=hop, window=window))


@pytest.mark.gpu
def test_log_mel_can_be_captured() -> None:
    filters = mel_filters(80).cuda()
    batch = torch.from_numpy(np.stack([NOISE, NOISE[::-1]])).cuda()
    log_mel(batch, filters)  # makes the plan of the transform
    graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(batch)
    with torch.cuda.graph(graph):
        found = log_mel(held, filters)
    held.copy_(batch)
    graph.replay()
    assert torch.allclose(found, log_mel(batch, filters), atol=1e-6)
