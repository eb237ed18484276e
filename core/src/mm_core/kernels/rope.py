"""Rotary position embedding (Su et al., RoFormer, 2021), also with several position axes (M-RoPE)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_core.kernels.kv_write import Scales, kv_write


def build_rope_table(inv_freq: Tensor, max_pos: int, attention_scaling: float = 1.0) -> Tensor:
    """cos(p * inv_freq) and sin(p * inv_freq), times attention_scaling, for positions 0 … max_pos - 1.

    inv_freq: [D_rot / 2] radians a position. Returns [max_pos, D_rot] float32: cosines, then sines.
    """
    positions = torch.arange(max_pos, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.float()[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_scaling


def mrope_axis_of_freq(mrope_section: Sequence[int]) -> Tensor:
    """[sum(mrope_section)] int32: the position axis that each frequency reads.

    As Qwen2-VL does it (`Qwen2VLRotaryEmbedding.recomposition_frequencies` in transformers): section i, that
    many frequencies long, reads axis i % 3 of (time, height, width). [16, 24, 24] fits head size 128.
    """
    sections = torch.tensor(list(mrope_section))
    return (torch.arange(len(sections)) % 3).repeat_interleave(sections).to(torch.int32)


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, axis_of_freq: Tensor | None = None) -> None:
    """Rotates q and k in place: dims (i, i + D_rot / 2) turn by position * inv_freq[i] (NeoX pairing).

    q: [T, Hq, D]; k: [T, Hkv, D]; strided views, last dim contiguous; dims from D_rot on stay as they are.
    positions: [T] or [A, T], int32 or int64, within the table.
    cos_sin: [max_pos, D_rot] float32 of `build_rope_table`.
    axis_of_freq: [D_rot / 2] int32, which axis of positions each frequency reads; None reads axis 0.
    Computed in float32, rounded once.
    """
    run = rope_triton if q.device.type == "cuda" else _rope_cpu
    run(q, k, positions, cos_sin, axis_of_freq)


def rope_triton(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, axis_of_freq: Tensor | None = None) -> None:
    """`rope_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import rope as impl

    impl.rope_(q, k, positions, cos_sin, axis_of_freq)


def rope_pair_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates q and k in place by angles given for each token: two-dimensional positions of image patches.

    q: [T, Hq, D]; k: [T, Hkv, D]; cos, sin: [T, D / 2] float32, last dim contiguous. Pairing as in `rope_`.
    """
    run = rope_pair_triton if q.device.type == "cuda" else _rope_pair_cpu
    run(q, k, cos, sin)


def rope_pair_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rope_pair_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import rope as impl

    impl.rope_pair_(q, k, cos, sin)


def rope_kv_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
) -> None:
    """`rope_pair_` of q and k and `kv_write` of the rotated k and of v, in one launch. Tokens that are
    written nowhere (slot -1) may keep their k as it was.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; cos, sin: [T, D_rot / 2] float32; caches, slot_mapping
    and scales as in `kv_write`.
    """
    run = rope_kv_write_triton if q.device.type == "cuda" else _rope_kv_write_cpu
    run(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, scales)


def rope_kv_write_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
) -> None:
    """`rope_kv_write_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import rope as impl

    impl.rope_kv_write_(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, scales)


def _rope_kv_write_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None,
) -> None:
    _rope_pair_cpu(q, k, cos, sin)
    kv_write(k, v, k_cache, v_cache, slot_mapping, scales)


def _rope_cpu(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, axis_of_freq: Tensor | None) -> None:
    half = cos_sin.shape[1] // 2
    if positions.dim() == 1 or axis_of_freq is None:
        rows = cos_sin.index_select(0, positions if positions.dim() == 1 else positions[0])
        _rope_pair_cpu(q, k, rows[:, :half], rows[:, half:])
    else:
        at = positions.index_select(0, axis_of_freq).T.long()  # [T, half]
        _rope_pair_cpu(q, k, cos_sin[:, :half].gather(0, at), cos_sin[:, half:].gather(0, at))


def _rope_pair_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[1]
    if q.dtype != torch.float32 and 2 * half == q.shape[-1]:
        # Whole heads at once: their halves swapped, the sines of the first half negative.
        cos, sin = torch.cat((cos, cos), -1)[:, None, :], torch.cat((-sin, sin), -1)[:, None, :]
        for x in _joined(q, k):
            x.copy_(torch.addcmul(x * cos, torch.roll(x, half, -1).float(), sin))
        return
    cos, sin = cos[:, None, :], sin[:, None, :]
    for x in _joined(q, k):
        first, second = x[..., :half], x[..., half : 2 * half]
        # cos and sin are float32, so the products are; copy_ rounds once.
        turned = first * cos - second * sin
        second.copy_(second * cos + first * sin)
        first.copy_(turned)


def _joined(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """q and k as one tensor where k's heads follow q's in memory, as in a fused projection: half the calls."""
    follows = q.stride() == k.stride() and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    if not follows or k.storage_offset() != q.storage_offset() + q.shape[1] * q.stride(1):
        return q, k
    return (q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride()),)
