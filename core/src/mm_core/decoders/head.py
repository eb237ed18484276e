"""From hidden states to logits, by a matrix of its own or by the embedding."""

from __future__ import annotations

from torch import Tensor, nn

from mm_core.kernels.linear import linear
from mm_core.layers import Embedding, Linear, PackedWeight, pack


class TokenHead(nn.Module):
    """What decoders that embed by `embed_tokens` share. lm_head: None where it is tied to the embedding."""

    embed_tokens: Embedding
    lm_head: Linear | None
    packed_head: PackedWeight | None = None  # of a tied head, beside the embedding

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab], for the rows that are sampled from."""
        if self.lm_head is not None:
            scores: Tensor = self.lm_head(hidden)
            return scores
        if self.packed_head is not None:
            return self.packed_head.linear(hidden, None)
        return linear(hidden, self.embed_tokens.weight, None)

    def finish_loading(self) -> None:
        """Pack a tied head for the CPU: a copy, because the embedding needs the plain rows."""
        if self.lm_head is None:
            self.packed_head = pack(self.embed_tokens.weight)
