"""Attention over the paged KV cache."""

from __future__ import annotations

from torch import Tensor, nn

from mm_core.kernels.kv_write import kv_write
from mm_core.kernels.paged_attention import paged_attention
from mm_core.kernels.rope import rope_kv_write_
from mm_core.layers.context import ForwardContext


class PagedAttention(nn.Module):
    """Writes this step's keys and values into one layer's cache, then attends to all of them.

    layer: index into the caches of `table`, the block table's name ("self", "cross"). It has no
    parameters; causal or not is the table's metadata. With "cross" a sequence without a source sees no
    keys and gets zeros. An fp8 cache rounds this step's keys and values in place.
    """

    def __init__(self, layer: int, *, scale: float, table: str = "self") -> None:
        super().__init__()
        self.layer = layer
        self.table = table
        self.scale = scale

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        context: ForwardContext,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """q [T, heads, D]; k and v [tokens written, kv_heads, D], or None where the cache already
        holds them (cross-attention, whose source `write_source` wrote); rotation: cos and sin, each
        [T, D_rot / 2] float32, by which q and k, where k and v are given, are turned first, in place.
        Returns [T, heads, D].

        bias: [1 or heads, P, K], added to the scores; of causal attention by position, P and K at least
        `BuildContext.max_model_len`. The same tensor for all steps: it is read by position where a captured
        step is replayed, and nothing past the keys that exist is read, whatever max_kv_len says."""
        table = context.tables[self.table]
        cache = context.caches[self.table][self.layer]
        if k is not None and v is not None and table.slot_mapping is not None:
            if rotation is None:
                kv_write(k, v, cache.k, cache.v, table.slot_mapping, cache.scales)
            else:
                rope_kv_write_(q, k, v, *rotation, cache.k, cache.v, table.slot_mapping, cache.scales)
        return paged_attention(
            q,
            cache.k,
            cache.v,
            table.block_tables,
            table.cu_seqlens_q,
            table.kv_lens,
            max_q_len=table.max_q_len,
            max_kv_len=table.max_kv_len,
            scale=self.scale,
            causal=table.causal,
            bias=bias,
            plan=table.cpu_plan,
            num_decodes=table.num_decodes,
            shared=table.shared,
            fresh=None if k is None or v is None or table.slot_mapping is None else (k, v),
            scales=cache.scales,
        )
