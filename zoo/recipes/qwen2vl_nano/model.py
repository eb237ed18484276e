"""The same network as transformers' Qwen2VLForConditionalGeneration, compact and for training only.

All pictures of a batch have one size, so the vision tower needs no mask; several questions share one picture:
each attends to the picture and to itself. Parameter names are those of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import config as C

PATCH, MERGE = 14, 2


@dataclass
class Turns:
    """Packed questions and answers, one row a picture (or a pair): tokens, segment (0: padding), position, loss."""

    tokens: Tensor
    segment: Tensor
    position: Tensor
    scored: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; `sin` has its first half negated, so that swapping halves is all that is left to do."""
    half = x.shape[-1] // 2
    swapped = x.unflatten(-1, (2, half)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


def signed(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin over a whole head from the frequencies of half a head, as `rotate` wants them."""
    cos, sin = freqs.cos(), freqs.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def share_heads(x: Tensor) -> Tensor:
    """Repeat each key or value head for the query heads that share it."""
    batch, heads, length, size = x.shape
    times = C.HEADS // heads
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, C.HEADS, length, size)


def patchify(pixels: Tensor) -> Tensor:
    """Normalised pixels [B, 3, H, W] to patches [B, N, 588] in the family's order (merge groups together)."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    view = pixels.view(batch, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return view.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * columns * MERGE * MERGE, channels * PATCH * PATCH)


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key = (part.transpose(1, 2) for part in rotate(qkv[:, :, :2], cos, sin).unbind(2))
        value = qkv[:, :, 2].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, length, width))
        fc1, fc2 = self.mlp["fc1"], self.mlp["fc2"]  # quick GELU is a SiLU with a scale before and after it
        hidden = F.silu(F.linear(self.norm2(x), fc1.weight * 1.702, fc1.bias * 1.702))
        return x + F.linear(hidden, fc2.weight * (1 / 1.702), fc2.bias)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, merged = C.VISION_WIDTH, C.VISION_WIDTH * MERGE * MERGE
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, width, (2, PATCH, PATCH), (2, PATCH, PATCH), bias=False)}
        )
        self.blocks = nn.ModuleList(VisionBlock(width, C.VISION_HEADS) for _ in range(C.VISION_DEPTH))
        mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, C.HIDDEN))
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(width, 1e-6), "mlp": mlp})

    def angles(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin [N, 1, 1, head] of a grid of height x width cells."""
        device = like.device
        side = C.VISION_WIDTH // C.VISION_HEADS // 2
        inverse = 10000.0 ** (-torch.arange(0, side, 2, device=device).float() / side)
        rows = torch.arange(height * MERGE, device=device).view(height, 1, MERGE, 1).expand(-1, width, -1, MERGE)
        columns = torch.arange(width * MERGE, device=device).view(1, width, 1, MERGE).expand(height, -1, MERGE, -1)
        freqs = torch.stack((rows.reshape(-1), columns.reshape(-1)), -1)[..., None].float() * inverse
        return signed(freqs.flatten(1)[:, None, None], like.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        cells = pixels.shape[2] // (PATCH * MERGE), pixels.shape[3] // (PATCH * MERGE)
        weight = self.patch_embed["proj"].weight.sum(2).flatten(1)  # both frames of a picture are the same
        x = F.linear(patchify(pixels), weight)
        cos, sin = self.angles(*cells, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        batch = x.shape[0]
        return self.merger["mlp"](self.merger["ln_q"](x).reshape(batch, cells[0] * cells[1], -1))


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size, head = C.HIDDEN, C.HIDDEN // C.HEADS
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(size, C.EPSILON),
            nn.RMSNorm(size, C.EPSILON),
        )
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(size, C.HEADS * head),
                "k_proj": nn.Linear(size, C.KV_HEADS * head),
                "v_proj": nn.Linear(size, C.KV_HEADS * head),
                "o_proj": nn.Linear(C.HEADS * head, size, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, C.INTERMEDIATE, bias=False),
                "up_proj": nn.Linear(size, C.INTERMEDIATE, bias=False),
                "down_proj": nn.Linear(C.INTERMEDIATE, size, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        hidden = self.input_layernorm(x)
        query, key, value = (
            self.self_attn[name](hidden).view(batch, length, heads, -1).transpose(1, 2)
            for name, heads in (("q_proj", C.HEADS), ("k_proj", C.KV_HEADS), ("v_proj", C.KV_HEADS))
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = (share_heads(t) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))
        hidden = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](hidden)) * self.mlp["up_proj"](hidden))


class Nano(nn.Module):
    """`prompt` holds the token ids around the pictures: before the first, between two, after the last."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Vision()
        self.embed_tokens = nn.Embedding(vocabulary, C.HIDDEN)
        self.layers = nn.ModuleList(TextLayer() for _ in range(C.LAYERS))
        self.norm = nn.RMSNorm(C.HIDDEN, C.EPSILON)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                gain = (
                    0.35
                    if name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
                    else 0.9
                )
                nn.init.trunc_normal_(parameter, std=gain * fan_in**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.trunc_normal_(self.embed_tokens.weight, std=0.06)

    def forward(self, pictures: list[Tensor], prompt: list[Tensor], turns: Turns) -> Tensor:
        """Logits [B, T, vocabulary] of the packed turns."""
        batch, device = turns.tokens.shape[0], turns.tokens.device
        parts, positions, start = [], [], 0
        for index, wrapping in enumerate(prompt):
            parts.append(self.embed_tokens(wrapping).expand(batch, -1, -1))
            positions.append((torch.arange(len(wrapping), device=device) + start).expand(3, -1))
            start += len(wrapping)
            if index < len(pictures):
                rows, columns = (side // (PATCH * MERGE) for side in pictures[index].shape[2:])
                parts.append(self.visual(pictures[index]))
                row = torch.arange(rows, device=device)[:, None].expand(-1, columns).reshape(-1)
                column = torch.arange(columns, device=device)[None].expand(rows, -1).reshape(-1)
                positions.append(torch.stack((torch.zeros_like(row), row, column)) + start)
                start += max(rows, columns)
        parts.append(self.embed_tokens(turns.tokens))
        x = torch.cat([part.to(parts[1].dtype) for part in parts], 1)
        prefix = x.shape[1] - turns.tokens.shape[1]
        segment = F.pad(turns.segment, (prefix, 0), value=0)
        before = torch.cat(positions, 1)[:, None].expand(-1, batch, -1)
        position = torch.cat((before, (turns.position + start)[None].expand(3, -1, -1)), 2)
        mask = self._mask(segment, prefix)
        cos, sin = self._angles(position, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return F.linear(self.norm(x[:, prefix:]), self.embed_tokens.weight)

    @staticmethod
    def _mask(segment: Tensor, prefix: int) -> Tensor:
        length = segment.shape[1]
        index = torch.arange(length, device=segment.device)
        same = (segment[:, :, None] == segment[:, None, :]) | (index < prefix)
        return (same & (index[:, None] >= index))[:, None]

    @staticmethod
    def _angles(position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        head = C.HIDDEN // C.HEADS
        inverse = C.ROPE_THETA ** (-torch.arange(0, head, 2, device=position.device).float() / head)
        freqs = position[..., None].float() * inverse
        chosen = torch.cat([part[i] for i, part in enumerate(freqs.split(C.MROPE_SECTION, -1))], -1)
        return signed(chosen[:, None], dtype)

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights by their names on the hub, rounded to bfloat16."""
        names = {}
        for name, tensor in self.state_dict().items():
            names[name if name.startswith("visual.") else f"model.{name}"] = tensor.detach().to("cpu", torch.bfloat16)
        return names
