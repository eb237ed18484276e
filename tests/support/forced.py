"""What an engine thinks of given answers: their tokens' log-probabilities, whatever it would have said itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mm_core import Engine, SamplingParams, TextPrompt

Answers = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Forced:
    """A logits processor that leaves no choice but an answer's next token."""

    token_ids: tuple[int, ...]

    def __call__(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        """[R, vocab] → [R, vocab]."""
        answer = torch.tensor(self.token_ids, device=logits.device)
        wanted = answer[rows.lengths.clamp(max=len(answer) - 1)]
        return torch.full_like(logits, float("-inf")).scatter_(1, wanted[:, None], 0.0)


def log_probabilities(engine: Engine, prompts: Sequence[TextPrompt], answers: Answers) -> torch.Tensor:
    """[tokens] float64: of every token of all answers, under the model's own distribution."""
    params = [
        SamplingParams(max_tokens=len(a), temperature=0, ignore_eos=True, logprobs=0, logits_processors=(Forced(a),))
        for a in answers
    ]
    outputs = engine.generate(list(prompts), params)
    assert [output.token_ids for output in outputs] == list(answers)
    found = [step[t].logprob for o in outputs for t, step in zip(o.token_ids, o.logprobs or (), strict=True)]
    return torch.tensor(found, dtype=torch.float64)
