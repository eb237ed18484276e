"""Plain torch twins of every op, with the same signatures: one row at a time, in float32.

They are what the tests compare with; nothing else should call them.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_core.kernels.linear import AddNorm
from mm_core.kernels.penalties import IN_PROMPT
from mm_core.kernels.random import gumbel_noise
from mm_core.kernels.sample import Filters, Launch
from mm_core.kernels.weights import weights


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of one sequence: q [M, Hq, D], k and v [N, Hkv, D], visible [M, N] bool.

    softmax(scale * q k^T + bias) v of Vaswani et al. 2017, eq. 1; bias is [Hb, M, N] with Hb in {1, Hq}.
    Rows that see no key give zeros.
    """
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)
    values = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("mhd,nhd->hmn", q.float(), keys) * scale
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return torch.einsum("hmn,nhd->mhd", weights, values).to(q.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    max_q_len: int,  # noqa: ARG001
    max_kv_len: int,  # noqa: ARG001
    scale: float,
    causal: bool = True,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    num_decodes: int = 0,  # noqa: ARG001
    shared: object = None,  # noqa: ARG001
    fresh: object = None,  # noqa: ARG001
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `mm_core.kernels.paged_attention`; gathers each sequence's keys token by token."""
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    block_size = k_cache.shape[1]
    bounds = cu_seqlens_q.tolist()
    for seq, kv_len in enumerate(kv_lens.tolist()):
        start, end = bounds[seq], bounds[seq + 1]
        tokens = torch.arange(kv_len, device=q.device)
        blocks = block_tables[seq, tokens // block_size].long()
        k, v = (cache.view(torch.uint8) if scales else cache for cache in (k_cache, v_cache))
        k, v = k[blocks, tokens % block_size], v[blocks, tokens % block_size]
        if scales:
            exponents = [of[blocks, tokens % block_size] for of in scales]
            k, v = (dequantise_kv(codes.view(FP8), of) for codes, of in zip((k, v), exponents, strict=True))
        rows = torch.arange(end - start, device=q.device)
        if causal:
            rows = rows + kv_len - (end - start)
            visible = tokens[None, :] <= rows[:, None]
        else:
            visible = torch.ones(end - start, kv_len, dtype=torch.bool, device=q.device)
        added = None if bias is None else bias[:, rows.clamp(min=0), :kv_len]
        result[start:end] = attend(q[start:end], k, v, scale, visible, added)
    return result


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,  # noqa: ARG001
    scale: float,
    causal: bool = False,
) -> Tensor:
    """See `mm_core.kernels.varlen_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        visible = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
        visible = visible.tril() if causal else visible
        out[start:end] = attend(q[start:end], k[start:end], v[start:end], scale, visible, None)
    return out


FP8 = torch.float8_e4m3fn


def quantise_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as e4m3 numbers [..., D] and exponents [...] uint8: x is about number * 2^(exponent - 127).

    The least power of two, from 2^-15, by which the largest magnitude is at most 448. A head with NaN or an
    infinity has NaN in its place; in float16 magnitudes end at the last e4m3 number before its infinity.
    """
    wide = x.double()
    amax = wide.abs().amax(-1)
    significand, power = torch.frexp(amax)  # 448 is 0.875 * 2^9
    power = torch.where(amax > 0, power - 9 + (significand > 0.875), -15).clamp(min=-15)
    power = torch.where(amax.isfinite(), power, 120)
    wide = wide.masked_fill(wide.isinf(), float("nan"))
    if x.dtype == torch.float16:
        wide = wide.clamp(-61440, 61440)
    return (wide / 2.0 ** power[..., None]).float().to(FP8), (power + 127).to(torch.uint8)


def dequantise_kv(numbers: Tensor, exponents: Tensor) -> Tensor:
    """What `quantise_kv` gave as float32 [..., D]."""
    return (numbers.double() * 2.0 ** (exponents[..., None].double() - 127)).float()


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `mm_core.kernels.kv_write`."""
    block_size = k_cache.shape[1]
    for which, (rows, cache) in enumerate(((k, k_cache), (v, v_cache))):
        numbers, exponents = (rows, None) if scales is None else quantise_kv(rows)
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            at = slot // block_size, slot % block_size
            if scales is None or exponents is None:
                cache[at] = rows[token].to(cache.dtype)
            else:
                cache.view(torch.uint8)[at] = numbers[token].view(torch.uint8)
                scales[which][at] = exponents[token]
                rows[token] = dequantise_kv(numbers[token], exponents[token]).to(rows.dtype)


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, axis_of_freq: Tensor | None = None) -> None:
    """See `mm_core.kernels.rope_`."""
    half = cos_sin.shape[1] // 2
    axes = positions[None] if positions.dim() == 1 else positions
    axis = torch.zeros(half, dtype=torch.long) if axis_of_freq is None else axis_of_freq.long()
    # [T, half]: the position that each frequency reads
    at = axes.long()[axis.to(axes.device)].T
    freq = torch.arange(half, device=at.device)
    rope_pair_(q, k, cos_sin[at, freq], cos_sin[at, freq + half])


def rope_pair_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `mm_core.kernels.rope_pair_`."""
    half = cos.shape[1]
    for x in (q, k):
        first, second = x[..., :half].float().clone(), x[..., half : 2 * half].float().clone()
        c, s = cos[:, None, :].float(), sin[:, None, :].float()
        x[..., :half] = (first * c - second * s).to(x.dtype)
        x[..., half : 2 * half] = (second * c + first * s).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.add_rms_norm_`."""
    residual.copy_(residual + x)
    return rms_norm(residual, weight, eps)


def add_layer_norm_(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `mm_core.kernels.add_layer_norm_`."""
    residual.copy_(residual + x)
    centred = residual.float() - residual.float().mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def quick_gelu_(x: Tensor) -> Tensor:
    """See `mm_core.kernels.quick_gelu_`."""
    wide = x.float()
    return x.copy_(wide * torch.sigmoid(1.702 * wide))


def rope_kv_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `mm_core.kernels.rope_kv_write_`."""
    rope_pair_(q, k, cos, sin)
    kv_write(k, v, k_cache, v_cache, slot_mapping, scales)


def patchify(pixels: Sequence[Tensor], values: Tensor, *, patch: int, temporal: int, merge: int) -> Tensor:
    """See `mm_core.kernels.patchify`."""
    out = []
    for picture in pixels:
        missing = -len(picture) % temporal
        frames = torch.cat((picture, picture[-1:].expand(missing, -1, -1, -1)))
        steps, side = len(frames) // temporal, patch * merge
        rows, cols = frames.shape[1] // side, frames.shape[2] // side
        # step, slot, row, dy, y, column, dx, x, channel
        split = frames.view(steps, temporal, rows, merge, patch, cols, merge, patch, 3)
        patches = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, temporal * patch * patch).long()
        out.append(values[torch.arange(3, device=values.device)[:, None], patches].flatten(1))
    return torch.cat(out) if out else values.new_empty(0, 3 * temporal * patch * patch)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `mm_core.kernels.silu_and_mul`."""
    gate, up = x.float().chunk(2, dim=-1)
    return ((gate * torch.sigmoid(gate)).to(x.dtype) * up.to(x.dtype)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `mm_core.kernels.linear`."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `mm_core.kernels.gelu_linear`."""
    y = linear(x, weight, bias).float()
    return (0.5 * y * (1.0 + torch.erf(y * 0.5**0.5))).to(x.dtype)


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `mm_core.kernels.quick_gelu_linear`; rounded once."""
    y = x.float() @ weight.float().T
    return quick_gelu_(y if bias is None else y + bias.float()).to(x.dtype)


def norm_linear(
    x: Tensor, norm: AddNorm, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """See `mm_core.kernels.norm_linear`."""
    x = add_layer_norm_(x, *norm)
    return (gelu_linear if gelu else linear)(x, weight, bias), norm.residual


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `mm_core.kernels.gated_linear`; rounded once."""
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def filtered_scores(scores: Tensor, temperatures: Tensor, filters: Filters | None) -> Tensor:
    """See `mm_core.kernels.sample.filtered_scores`."""
    divided = scores.float() / temperatures[:, None]
    for i, x in enumerate(divided if filters is not None else ()):
        assert filters is not None
        if filters.top_k[i] < len(x):
            x[x < x.sort(descending=True).values[filters.top_k[i] - 1]] = float("-inf")
        if filters.top_p is not None and filters.top_p[i] < 1:
            order = x.argsort(descending=True, stable=True)
            masses = weights(x[order], x.max())
            better = masses.cumsum(0) - masses
            x[order[better >= masses.sum() * filters.top_p[i]]] = float("-inf")
        if filters.log_min_p is not None:
            x[x < x.max() + filters.log_min_p[i]] = float("-inf")
    return divided


def choose_tokens(
    scores: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    launch: Launch,
    filters: Filters | None = None,
    *,
    edited: bool = False,
    random: bool = True,  # noqa: ARG001
) -> None:
    """See `mm_core.kernels.sample.choose_tokens`."""
    own = (scores if edited else scores[rows]).float()
    divided = filtered_scores(own, temperatures[rows], filters)
    for i, row in enumerate(rows.tolist()):
        x = own[i]
        usable = not bool(x.isnan().any()) and bool(x.max().isfinite())
        if temperatures[row] > 0:
            x = divided[i] + gumbel_noise(launch.keys[row : row + 1], len(x))[0]
        # `==` and `nonzero` rather than an argmax, whose choice among equals is what is tested.
        token = int((x == x.max()).nonzero()[0, 0]) if usable else 0
        launch.out[0, row] = launch.last_ids[launch.slots[row]] = token
        if not edited:
            launch.out[1, row] = int(usable)


def mask_(scores: Tensor, rows: Tensor, masks: Tensor, places: Tensor) -> None:
    """See `mm_core.kernels.grammar_mask.mask_`."""
    tokens = torch.arange(scores.shape[1])
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        allowed = (masks[place][tokens // 32] >> (tokens % 32)) & 1
        scores[row, allowed == 0] = float("-inf")


def penalise_(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """See `mm_core.kernels.penalties.penalise_`."""
    for i, row in enumerate(rows.tolist()):
        x, count = scores[row], counts[places[i]]
        output = count % IN_PROMPT
        factor = repetition[i].float()
        x[count > 0] = torch.where(x < 0, x * factor, x / factor)[count > 0]
        x -= frequency[i].float() * output
        x -= presence[i].float() * output.clamp(max=1)
