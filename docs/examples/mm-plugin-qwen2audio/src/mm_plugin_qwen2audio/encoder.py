"""Whisper's encoder over the sound's own length, then pairs of positions averaged and projected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.hookspecs import BuildContext, Checkpoint, WeightMap
from mm_core.kernels import varlen_attention
from mm_core.layers import Embedding, LayerNorm, Linear
from mm_core.towers import activation
from mm_core.types import MediaFeature


class Attention(nn.Module):
    """Self-attention within each sound."""

    def __init__(self, width: int, heads: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q_proj = Linear(width, width, device=device, dtype=dtype)
        self.k_proj = Linear(width, width, bias=False, device=device, dtype=dtype)
        self.v_proj = Linear(width, width, device=device, dtype=dtype)
        self.out_proj = Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[positions, width] → the same; sound s is rows [bounds[s], bounds[s + 1])."""
        q, k, v = (f(x).unflatten(1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        rows: Tensor = self.out_proj(varlen_attention(q, k, v, bounds, max_seqlen=longest, scale=self.scale).flatten(1))
        return rows


class Layer(nn.Module):
    """Pre-norm attention and MLP. Attributes are called as the checkpoint's tensors are."""

    def __init__(self, width: int, heads: int, inner: int, act: str, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.act = activation(act)
        self.self_attn_layer_norm = LayerNorm(width, 1e-5, device=device, dtype=dtype)
        self.self_attn = Attention(width, heads, context)
        self.final_layer_norm = LayerNorm(width, 1e-5, device=device, dtype=dtype)
        self.fc1 = Linear(width, inner, device=device, dtype=dtype)
        self.fc2 = Linear(inner, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[positions, width] → the same."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), bounds, longest)
        rows: Tensor = x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))
        return rows


class Qwen2AudioEncoder(nn.Module):
    """`hookspecs.Encoder` of the family."""

    # `audio_tower.x` on the hub, `model.audio_tower.x` as transformers 5 may write it, is `x` here.
    weight_map = WeightMap(
        rename=((r"(?:model\.)?audio_tower\.", ""), (r"(?:model\.)?multi_modal_projector\.linear\.", "projector."))
    )

    def __init__(self, checkpoint: Checkpoint, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        get = checkpoint.config["audio_config"].get
        width, heads = get("d_model", 1280), get("encoder_attention_heads", 20)
        inner, act = get("encoder_ffn_dim", 5120), get("activation_function", "gelu")
        self.hidden_size = int(checkpoint.text_config["hidden_size"])
        self.conv1 = nn.Conv1d(get("num_mel_bins", 128), width, 3, padding=1, device=device, dtype=dtype)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.embed_positions = Embedding(get("max_source_positions", 1500), width, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Layer(width, heads, inner, act, context) for _ in range(get("encoder_layers", 32)))
        self.layer_norm = LayerNorm(width, 1e-5, device=device, dtype=dtype)
        self.projector = Linear(width, self.hidden_size, device=device, dtype=dtype)

    def cost(self, feature: MediaFeature) -> int:
        """Positions of the tower."""
        return int(feature.info["positions"])

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """All sounds in one pass: one [num_tokens, hidden_size] each, in order."""
        lengths = [feature.info["positions"] for feature in features]
        x = torch.cat([self._embed(f.tensors["mel"], n) for f, n in zip(features, lengths, strict=True)])
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
        for layer in self.layers:
            x = layer(x, bounds, max(lengths))
        pairs = [part[: len(part) // 2 * 2].view(-1, 2, part.shape[1]).mean(1) for part in torch.split(x, lengths)]
        rows = self.projector(self.layer_norm(torch.cat(pairs)))
        return list(rows.split([feature.num_tokens for feature in features]))

    def _embed(self, mel: Tensor, positions: int) -> Tensor:
        """[mels, frames] → [positions, width]."""
        x = F.gelu(self.conv1(mel[None].to(self.conv1.weight.dtype)))
        return F.gelu(self.conv2(x))[0, :, :positions].T + self.embed_positions.weight[:positions]
