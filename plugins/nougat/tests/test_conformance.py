"""The conformance kit on tiny random checkpoints, beside transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.pictures import picture
from support.tiny_nougat import NougatReference, make_tiny_nougat

from mm_core.testing import Answer, Case, Conformance

reference_of = cache(NougatReference)


class TestNougat(Conformance):
    settings: ClassVar[Any] = {"layout": "hub"}
    cases = (
        Case("page", "<s>", {"image": picture(1, 150, 100)}),
        Case("tall", "<s>", {"image": picture(23, 90, 300)}),
        Case("as a turn", "", {"image": picture(22, 500, 37)}, parity=False),
    )

    def checkpoint(self, directory: Path) -> Path:
        return make_tiny_nougat(directory, **self.settings)

    def reference(self, path: Path, case: Case) -> Answer:
        token_ids, logits = reference_of(path).generate(case.items["image"][0], self.max_tokens)
        return Answer(token_ids, logits, [0])


@pytest.mark.slow
class TestPaddedWindows(TestNougat):
    """A window of 5 does not divide the grids, and the decoder is wider than the encoder."""

    settings: ClassVar[Any] = {"layout": "tf5", "width": 48, "window_size": 5, "seed": 3}
    cases = (
        Case("page", "<s>", {"image": picture(1, 150, 100)}),
        Case("tall", "<s>", {"image": picture(22, 500, 37)}, parity=False),
    )
