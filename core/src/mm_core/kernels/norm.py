"""RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016), fused with the residual addition before them."""

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 2**13  # elements up to which a CPU's time goes into calls rather than arithmetic


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), with the rounding of Qwen2RMSNorm in transformers.

    x: [T, H], last dim contiguous; weight: [H]. Normalised in float32, rounded to x's dtype, then multiplied.
    Returns [T, H] of x's dtype.
    """
    run = rms_norm_triton if x.device.type == "cuda" else _rms_norm_cpu
    return run(x, weight, eps)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import norm as impl

    return impl.rms_norm(x, weight, eps)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then `rms_norm` of the sum as rounded to residual's dtype.

    x, residual: [T, H] of one dtype, last dim contiguous; weight: [H]. Returns [T, H].
    """
    run = add_rms_norm_triton if x.device.type == "cuda" else _add_rms_norm_cpu
    return run(x, residual, weight, eps)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`add_rms_norm_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import norm as impl

    return impl.add_rms_norm_(x, residual, weight, eps)


def add_layer_norm_(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """residual += x in place, then (r - mean(r)) / sqrt(var(r) + eps) * weight + bias of the sum r as rounded.

    x, residual: [T, H] of one dtype, last dim contiguous; weight, bias: [H]. Normalised in float32, rounded
    once. Returns [T, H].
    """
    run = add_layer_norm_triton if x.device.type == "cuda" else _add_layer_norm_cpu
    return run(x, residual, weight, bias, eps)


def add_layer_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`add_layer_norm_` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import norm as impl

    return impl.add_layer_norm_(x, residual, weight, bias, eps)


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    if x.numel() <= _FEW:
        # [x, -x] has mean 0 and variance mean(x^2): its layer norm is x's RMS norm, in one fused call.
        size = x.shape[-1]
        return F.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size] * weight
    wide = x.float()
    # As F.rms_norm without a weight, in half the calls.
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide.mul_(scale[..., None]).to(x.dtype).mul_(weight)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm_cpu(residual.add_(x), weight, eps)


def _add_layer_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(residual.add_(x), (x.shape[-1],), weight, bias, eps)
