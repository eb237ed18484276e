"""e4m3 in Triton's interpreter, whose own conversions lose the carry of rounding and read NaN as 480."""

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Let torch convert to and from float8e4nv. Does nothing the second time."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    if getattr(convert, "repaired", False):
        return

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == tl.float8e4nv and source == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).clamp(-448, 448)  # as satfinite
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)
        if source == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8)).view(torch.float8_e4m3fn)
            if target == tl.bfloat16:
                return codes.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
            if target in (tl.float16, tl.float32):
                width = np.uint16 if target == tl.float16 else np.uint32
                return codes.float().numpy().astype(f"f{np.dtype(width).itemsize}").view(width).reshape(data.shape)
        return convert(data, source, target, rounding)

    convert_float.repaired = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert_float
