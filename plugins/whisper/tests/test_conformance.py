"""The conformance kit on tiny random checkpoints of both kinds and layouts, beside transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from support.tiny_whisper import WhisperReference, make_tiny_whisper, sound

from mm_core.testing import Answer, Case, Conformance

MULTILINGUAL = "<|startoftranscript|><|de|><|translate|><|notimestamps|>"
ENGLISH = "<|startoftranscript|><|notimestamps|>"
BEFORE = "<|startofprev|> The cat sleeps and hears nothing of it.<|startoftranscript|><|en|><|transcribe|>"

reference_of = cache(WhisperReference)


class TestMultilingual(Conformance):
    settings: ClassVar[Any] = {"mels": 128, "layout": "tf5", "seed": 2}
    cases = (
        Case("clip", MULTILINGUAL, {"audio": (sound(2.3, 1), 16000)}),
        Case("whole window", MULTILINGUAL, {"audio": (sound(30, 2), 16000)}),
        Case("text before", BEFORE, {"audio": (sound(5, 3), 16000)}),
    )

    def checkpoint(self, directory: Path) -> Path:
        return make_tiny_whisper(directory, **self.settings)

    def reference(self, path: Path, case: Case) -> Answer:
        reference = reference_of(path)
        ids = reference.tokenizer(str(case.prompt), add_special_tokens=False)["input_ids"]
        found = reference.answer(case.items["audio"][0][0], ids, self.max_tokens)
        return Answer(found.token_ids, found.logits, ids)


class TestEnglish(TestMultilingual):
    rungs = ("counts", "cached", "batched", "parity")
    settings: ClassVar[Any] = {"multilingual": False, "seed": 2}
    cases = (
        Case("clip", ENGLISH, {"audio": (sound(0.1, 4), 16000)}),
        Case("as a turn", "", {"audio": (sound(12.7, 5), 16000)}, parity=False),
    )
