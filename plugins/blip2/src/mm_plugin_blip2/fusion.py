"""How a picture's rows reach the language model: as embeddings before the prompt, or through T5's text encoder; in
InstructBLIP by way of a Q-Former that reads the instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm_core.errors import CheckpointError, InvalidPromptError
from mm_core.hookspecs import BuildContext, Checkpoint
from mm_core.types import PlaceholderRange
from mm_plugin_blip2.encoder import text_width
from mm_plugin_blip2.qformer import QFormer, QFormerConfig, qformer_weight_map
from mm_plugin_blip2.vision import EvaConfig

Kind = Literal["embed", "cross_attention", "encoder_decoder"]


class Blip2Fusion:
    """hookspecs.Fusion of BLIP-2. decoder_prompt: what T5 begins an answer with."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config") or {}
        reads_text = text.get("model_type") == "t5"
        self.kind: Kind = "encoder_decoder" if reads_text else "embed"
        start = text.get("decoder_start_token_id")
        self.decoder_prompt: tuple[int, ...] = (text.get("pad_token_id") or 0 if start is None else start,)

    def positions(
        self,
        token_ids: Sequence[int],  # noqa: ARG002
        ranges: Sequence[PlaceholderRange],  # noqa: ARG002
    ) -> tuple[np.ndarray[Any, Any], int] | None:
        """None: 0…n-1."""
        return None


class InstructBlipFusion(QFormer, Blip2Fusion):
    """hookspecs.Fusion of InstructBLIP, its Q-Former included."""

    def __init__(self, checkpoint: Checkpoint, context: BuildContext) -> None:
        config = checkpoint.config
        image_width = EvaConfig.from_config(config.get("vision_config") or {}).hidden_size
        QFormer.__init__(self, QFormerConfig.from_config(config, image_width, text_width(config)), context)
        Blip2Fusion.__init__(self, config)
        self.weight_map = qformer_weight_map()
        self._tokenizer = load_qformer_tokenizer(checkpoint.name, checkpoint.path / "qformer_tokenizer")
        if self._tokenizer.get_vocab_size() > self.config.vocab_size:
            raise CheckpointError(
                f"The Q-Former's tokenizer of '{checkpoint.name}' has {self._tokenizer.get_vocab_size()} tokens, the "
                f"Q-Former {self.config.vocab_size}. Fetch qformer_tokenizer and weights from the same place."
            )

    def instruction(self, text: str) -> Sequence[int]:
        """Ids of the Q-Former's own tokenizer. Raises InvalidPromptError where it has too few positions for them."""
        ids: list[int] = self._tokenizer.encode(text).ids
        self._check_length(ids)
        return ids

    def condition(self, rows: Sequence[Tensor], instructions: Sequence[Sequence[int]]) -> list[Tensor]:
        """[rows of a picture, image_width] each, with its request's instruction → [queries, hidden] each."""
        for ids in instructions:
            self._check_length(ids)  # beyond the last position a GPU would not fail alone
        return list(self(torch.stack(list(rows)), instructions).unbind(0))

    def _check_length(self, ids: Sequence[int]) -> None:
        if len(ids) > self.config.positions:
            raise InvalidPromptError(
                f"The prompt has {len(ids)} tokens for InstructBLIP's Q-Former, which reads {self.config.positions}. "
                "Shorten it.",
                param="prompt",
            )


def load_qformer_tokenizer(name: str, path: Path) -> Any:
    """The backend of the BERT tokenizer that the Q-Former's instructions are made with. Runs nothing of the
    checkpoint: the class is transformers' own."""
    from transformers import BertTokenizer

    try:
        return BertTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    except Exception as error:
        raise CheckpointError(
            f"The tokenizer of the Q-Former of '{name}' cannot be loaded ({type(error).__name__}). The checkpoint "
            "needs its folder qformer_tokenizer with tokenizer.json, or vocab.txt, and tokenizer_config.json."
        ) from error


def make_fusion(checkpoint: Checkpoint, context: BuildContext) -> Blip2Fusion:
    """The fusion of a checkpoint."""
    if checkpoint.config.get("model_type") == "instructblip":
        return InstructBlipFusion(checkpoint, context)
    return Blip2Fusion(checkpoint.config)
