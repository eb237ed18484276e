"""The conformance kit on tiny random checkpoints of all four kinds, beside transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.blip2_reference import Reference
from support.tiny_blip2 import make_tiny_blip2

from mm_core.testing import Answer, Case, Conformance, picture

reference_of = cache(Reference)


class TestBlip2Opt(Conformance):
    kind: ClassVar[Any] = "blip2"
    text: ClassVar[Any] = "opt"
    cases = (
        Case("question", "Question: what is in the picture? Answer:", {"image": picture(1, 100, 80)}),
        Case("no prompt", "", {"image": picture(3, 30, 211)}),
        Case("text", "The quick brown fox jumps over"),
    )

    def checkpoint(self, directory: Path) -> Path:
        return make_tiny_blip2(directory, self.kind, self.text)

    def reference(self, path: Path, case: Case) -> Answer:
        image = case.items.get("image", [None])[0]
        found = reference_of(path).generate(str(case.prompt), image, self.max_tokens)
        return Answer(found.token_ids, found.logits, found.prompt_ids)


class TestBlip2FlanT5(TestBlip2Opt):
    text: ClassVar[Any] = "t5"
    logits_tolerance: ClassVar[float] = 1e-3


class TestInstructBlipVicuna(TestBlip2Opt):
    kind: ClassVar[Any] = "instructblip"
    text: ClassVar[Any] = "llama"


@pytest.mark.slow
class TestInstructBlipFlanT5(TestBlip2FlanT5):
    kind: ClassVar[Any] = "instructblip"
