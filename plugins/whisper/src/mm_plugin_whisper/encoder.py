"""Whisper's encoder (Radford et al. 2022): spectrogram, two convolutions, pre-norm layers over all frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.decoders.seq2seq import ACTIVATIONS, PartlyBiasedLinear, seq2seq_weight_map
from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, Checkpoint
from mm_core.kernels import varlen_attention
from mm_core.layers import CapturedPasses, Embedding, LayerNorm, Linear, empty_parameter
from mm_core.media import mel_filters
from mm_core.types import MediaFeature
from mm_plugin_whisper.settings import Sound

NORM_EPS = 1e-5
_TAPS = 3  # of each convolution
_SILENCE = -10.0  # log10 of the least power that counts
_RANGE = 8.0  # powers of ten below the loudest that are told apart
_GRAPHS = 16


@dataclass(frozen=True)
class AudioConfig:
    """Sizes of an encoder."""

    depth: int
    dim: int
    heads: int
    intermediate: int
    activation: str
    sound: Sound

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """From config.json, with transformers' defaults, and the feature extractor's settings."""
        config: Mapping[str, Any] = checkpoint.config
        return cls(
            depth=config.get("encoder_layers", 4),
            dim=config.get("d_model", 384),
            heads=config.get("encoder_attention_heads", 6),
            intermediate=config.get("encoder_ffn_dim", 1536),
            activation=config.get("activation_function", "gelu"),
            sound=Sound.from_checkpoint(checkpoint),
        )

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS or self.dim % self.heads:
            raise ConfigError(
                f"The checkpoint's encoder has activation_function={self.activation!r} and {self.heads} heads over a "
                f"width of {self.dim}; known are {', '.join(ACTIVATIONS)}, and heads that divide it. Check config.json."
            )


class LogMel(nn.Module):
    """Samples to log-mel frames, as `WhisperFeatureExtractor` of transformers makes them with torch."""

    filters: Tensor
    window: Tensor

    def __init__(self, sound: Sound, device: torch.device) -> None:
        super().__init__()
        self.sound = sound
        filters = mel_filters(sound.mels, sound.n_fft, sound.sampling_rate)
        self.register_buffer("filters", filters.to(device), persistent=False)
        self.register_buffer("window", torch.hann_window(sound.n_fft, device=device), persistent=False)

    def powers(self, samples: Tensor) -> Tensor:
        """[B, (n - 1) · hop + n_fft] float32 → log10 of mel powers [B, mels, n]."""
        spectrum = torch.stft(
            samples, self.sound.n_fft, self.sound.hop, window=self.window, center=False, return_complex=True
        )
        return (self.filters @ spectrum.abs().square_()).clamp_(min=10**_SILENCE).log10_()

    def forward(self, features: Sequence[MediaFeature]) -> Tensor:
        """Features with `samples` → [B, mels, frames of a window]."""
        device, frames = self.filters.device, self.sound.frames
        longest = frames if device.type == "cuda" else max(f.info["frames"] for f in features)
        samples = torch.zeros((len(features), (longest - 1) * self.sound.hop + self.sound.n_fft), device=device)
        for row, feature in zip(samples, features, strict=True):
            given = feature.tensors["samples"]
            row[: len(given)].copy_(given, non_blocking=True)
        logs = F.pad(self.powers(samples), (0, frames - longest), value=_SILENCE)
        peaks = logs.amax((1, 2))
        windows = [f for f in features if "peak" in f.info]
        if windows:  # parts of a longer sound, which is normalised as a whole
            given_peaks = torch.tensor([f.info.get("peak", torch.nan) for f in features])
            given_peaks = given_peaks.to(device, non_blocking=True)
            peaks = torch.where(given_peaks.isnan(), peaks, given_peaks)
        logs = torch.maximum(logs, (peaks - _RANGE)[:, None, None]).add_(4.0).div_(4.0)
        if windows:  # what follows the sound's end is zero, as transformers pads
            counts = torch.tensor([f.info["frames"] if "peak" in f.info else frames for f in features])
            places = torch.arange(frames, device=device)
            logs.masked_fill_((places >= counts.to(device, non_blocking=True)[:, None])[:, None], 0.0)
        return logs


class Convolution(Linear):
    """A convolution over time with 3 taps, as the matrix product it is: rows of 3 neighbouring frames."""

    def __init__(self, width: int, out: int, context: BuildContext) -> None:
        super().__init__(_TAPS * width, out, device=context.device, dtype=context.dtype)
        kernel = (out, width, _TAPS)
        self.weight = empty_parameter((out, _TAPS * width), context.device, context.dtype, checkpoint_shape=kernel)
        self._by_frame = False

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """[B, T, width] → [B, T / stride, out]; silence beyond both ends."""
        count, frames, width = x.shape
        padded = F.pad(x, (0, 0, 1, 1))
        rows = padded.as_strided((count, frames // stride, _TAPS * width), (padded.stride(0), stride * width, 1))
        return super().forward(rows.contiguous())

    def finish_loading(self) -> None:
        """Turn the weight's rows from [width, taps] to [taps, width]."""
        if not self._by_frame:
            self._by_frame = True
            kernel = self.weight.data.view(self.weight.shape[0], -1, _TAPS)
            self.weight.data = kernel.transpose(1, 2).reshape(self.weight.shape)
        super().finish_loading()


class AudioAttention(nn.Module):
    """Self-attention within each clip."""

    def __init__(self, config: AudioConfig, context: BuildContext) -> None:
        super().__init__()
        dim = config.dim
        self.shape = (3, config.heads, dim // config.heads)
        self.scale = self.shape[2] ** -0.5
        self.qkv_proj = PartlyBiasedLinear(dim, dim, (True, False, True), context)
        self.out_proj = Linear(dim, dim, device=context.device, dtype=context.dtype)

    def forward(self, x: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[rows, dim] → [rows, dim]."""
        q, k, v = self.qkv_proj(x).view(x.shape[0], *self.shape).unbind(1)
        out = varlen_attention(q, k, v, bounds, max_seqlen=longest, scale=self.scale)
        rows: Tensor = self.out_proj(out.flatten(1))
        return rows


class AudioLayer(nn.Module):
    """Pre-norm attention and MLP; each norm first adds the preceding block's output to the residual."""

    def __init__(self, config: AudioConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, dim = context.device, context.dtype, config.dim
        self.act = ACTIVATIONS[config.activation]
        self.self_attn_layer_norm = LayerNorm(dim, NORM_EPS, device=device, dtype=dtype)
        self.self_attn = AudioAttention(config, context)
        self.final_layer_norm = LayerNorm(dim, NORM_EPS, device=device, dtype=dtype)
        self.fc1 = Linear(dim, config.intermediate, device=device, dtype=dtype)
        self.fc2 = Linear(config.intermediate, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor | None, residual: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """x: the previous layer's output, not yet in the residual (None before the first layer). Returns this
        one's; `residual` [rows, dim] is updated in place."""
        norm = self.self_attn_layer_norm
        x = self.self_attn(norm(residual) if x is None else norm.add_(x, residual), bounds, longest)
        out: Tensor = self.fc2(self.act(self.fc1(self.final_layer_norm.add_(x, residual))))
        return out


class WhisperEncoder(nn.Module):
    """hookspecs.Encoder; its cost unit is the row. A feature holds `samples` (see WhisperProcessor.prepare)."""

    weight_map = seq2seq_weight_map("model.encoder.", tied=False)

    def __init__(self, config: AudioConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, dim = context.device, context.dtype, config.dim
        self.hidden_size = dim
        self.act = ACTIVATIONS[config.activation]
        self.rows = config.sound.frames // 2
        self.log_mel = LogMel(config.sound, device)
        self.conv1 = Convolution(config.sound.mels, dim, context)
        self.conv2 = Convolution(dim, dim, context)
        self.embed_positions = Embedding(self.rows, dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(AudioLayer(config, context) for _ in range(config.depth))
        self.layer_norm = LayerNorm(dim, NORM_EPS, device=device, dtype=dtype)
        self._captured = CapturedPasses(_GRAPHS)
        self._bounds: dict[int, Tensor] = {}

    def use_graphs(self) -> None:
        """From now on passes of as many clips as came before are captured."""
        self._captured.enabled = True

    def cost(self, feature: MediaFeature) -> int:
        """Rows: a clip of any length makes as many."""
        return feature.num_tokens

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order, all in one pass."""
        if not features:
            return []
        count = len(features)
        mel = self.log_mel(features).to(self.embed_positions.weight.dtype)
        repeats = mel.device.type == "cuda" and self._captured.repeats(count)
        rows = self._captured.run(count, self._encode, mel) if repeats else self._encode(mel)
        return list(torch.split(rows, self.rows))

    def _encode(self, mel: Tensor) -> Tensor:
        """[B, mels, frames] → [B · rows, dim]."""
        count, dim = mel.shape[0], self.hidden_size
        x = self.act(self.conv1(mel.transpose(1, 2).contiguous()))
        residual = (self.act(self.conv2(x, stride=2)) + self.embed_positions.weight).view(-1, dim)
        bounds = self._bounds.get(count)
        if bounds is None:
            bounds = torch.arange(0, (count + 1) * self.rows, self.rows, dtype=torch.int32, device=mel.device)
            self._bounds[count] = bounds
        out: Tensor | None = None
        for layer in self.layers:
            out = layer(out, residual, bounds, self.rows)
        assert out is not None, "an encoder has at least one layer"
        rows: Tensor = self.layer_norm.add_(out, residual)
        return rows
