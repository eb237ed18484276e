"""Projectors: patches of a tile, several to a row, to the language model's width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.layers import LayerNorm, Linear
from mm_plugin_nvila.layout import depth, downsample

NORM_EPS = 1e-5  # torch's default, which the original leaves as it is


class Downsample(nn.Module):
    """Squares of k × k neighbouring patches joined to one row; zeros below and to the right where k does not
    divide the side."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """[tiles, side², width] → [tiles, ⌈side / k⌉², k² · width]."""
        k, (tiles, patches, width) = self.k, x.shape
        side = round(patches**0.5)
        x = x.view(tiles, side, side, width)
        if missing := -side % k:
            x = F.pad(x, (0, 0, 0, missing, 0, missing))
        rows = (side + missing) // k
        return x.view(tiles, rows, k, rows, k, width).transpose(2, 3).reshape(tiles, rows * rows, k * k * width)


def make_projector(kind: str, width: int, out: int, context: BuildContext) -> nn.Sequential:
    """The layers of a type, numbered as in checkpoints. width: of the vision features, all S2 scales together."""
    k = downsample(kind)
    if kind == "identity" and width != out:
        raise ConfigError(f"The projector 'identity' hands {width} channels to a language model of {out}.")
    return nn.Sequential(*(_plain(kind, width, out, context) if k == 1 else _mlp(kind, k, width, out, context)))


def _plain(kind: str, width: int, out: int, context: BuildContext) -> Iterator[nn.Module]:
    for number in range(depth(kind) or (kind == "linear")):
        if number:
            yield nn.GELU()
        yield _linear(out if number else width, out, context)


def _mlp(kind: str, k: int, width: int, out: int, context: BuildContext) -> Iterator[nn.Module]:
    between = {
        "mlp_downsample_3x3_fix": (3 * width,),
        "mlp_downsample_3x3_s2": (3 * width, width, width // 3),
        "mlp_downsample_3x3_s2_new": (4 * width, 2 * width, width, width // 3),
    }.get(kind, ())
    size = k * k * width
    yield Downsample(k)
    yield LayerNorm(size, NORM_EPS, device=context.device, dtype=context.dtype)
    for wanted in between:
        yield _linear(size, wanted, context)
        yield nn.GELU()
        yield LayerNorm(wanted, NORM_EPS, device=context.device, dtype=context.dtype)
        size = wanted
    yield _linear(size, out, context)
    yield nn.GELU()
    yield _linear(out, out, context)


def _linear(size: int, out: int, context: BuildContext) -> Linear:
    return Linear(size, out, device=context.device, dtype=context.dtype)
