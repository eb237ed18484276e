"""Rotary position embeddings for decoders (Su et al. 2021), plain and multimodal (M-RoPE)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.kernels.rope import build_rope_table, mrope_axis_of_freq

MROPE_SLACK = 16384
"""How far a M-RoPE position may lie above its token's index (long, sparse videos). A fusion
rejects media that would go further: the table of angles ends there."""

_PLAIN_TYPES = ("default", "mrope")  # "mrope" only says that mrope_section is there


@dataclass(frozen=True)
class RopeConfig:
    """Settings of the rotation. scaling: `rope_scaling` in the flat spelling, with its `type`.

    mrope_section: frequencies per axis (time, height, width), summing to head_dim / 2; empty for
    plain positions.
    """

    theta: float
    type: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    mrope_section: tuple[int, ...] = ()

    @classmethod
    def from_text_config(cls, text_config: Mapping[str, Any], default_theta: float = 10000.0) -> Self:
        """Read `rope_theta` and `rope_scaling` of a language model's settings."""
        scaling = text_config.get("rope_scaling") or text_config.get("rope_parameters") or {}
        theta = text_config.get("rope_theta") or scaling.get("rope_theta") or default_theta
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        section = tuple(scaling.get("mrope_section") or ())
        return cls(float(theta), kind, dict(scaling), section)

    @property
    def axes(self) -> int:
        """Position axes: 1, or one for each M-RoPE section."""
        return len(self.mrope_section) or 1


def rope_inv_freq(config: RopeConfig, head_dim: int) -> Tensor:
    """Angles per position, [head_dim / 2] float32 on the CPU, as transformers computes them."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.type in _PLAIN_TYPES:
        return inv_freq
    if config.type == "linear":
        return inv_freq / _number(config, "factor")
    if config.type == "llama3":
        return _llama3(config, inv_freq)
    raise ConfigError(
        f"The checkpoint's rope_scaling has type {config.type!r}; this release has 'default', 'linear', "
        "'llama3' and 'mrope'. Remove rope_scaling from config.json to run within the original context length."
    )


def _number(config: RopeConfig, key: str) -> float:
    value = config.scaling.get(key)
    if not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling of type {config.type!r} needs the number {key!r}; config.json has {value!r}.")
    return float(value)


def _llama3(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""
    factor = _number(config, "factor")
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    original = _number(config, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    # Share of the unstretched frequency: 1 for wavelengths up to original/high, 0 from original/low
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / factor + blend * inv_freq


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed once; looked up once a step for all layers."""

    cos_sin: Tensor
    axis: Tensor | None

    def __init__(self, config: RopeConfig, head_dim: int, max_pos: int, device: torch.device) -> None:
        """max_pos: positions lie in [0, max_pos), M-RoPE ones in [0, max_pos + MROPE_SLACK)."""
        super().__init__()
        section = config.mrope_section
        if section and sum(section) * 2 != head_dim:
            raise ConfigError(
                f"mrope_section {list(section)} covers {sum(section)} frequencies, a head of {head_dim} has "
                f"{head_dim // 2}. Correct rope_scaling in the checkpoint's config.json."
            )
        rows = max_pos + (MROPE_SLACK if section else 0)
        table = build_rope_table(rope_inv_freq(config, head_dim).to(device), rows)
        self.register_buffer("cos_sin", table, persistent=False)
        axis = mrope_axis_of_freq(section).to(device, torch.long).repeat(2)[None, None] if section else None
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[axes, T] int32 → cos and sin, each [T, head_dim / 2] float32."""
        if self.axis is None:
            rows = F.embedding(positions[0], self.cos_sin)
        else:
            by_axis = F.embedding(positions, self.cos_sin)  # [axes, T, D]
            rows = by_axis.gather(0, self.axis.expand(1, positions.shape[1], -1))[0]
        cos, sin = rows.chunk(2, dim=-1)
        return cos, sin
