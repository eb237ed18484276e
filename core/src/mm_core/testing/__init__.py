"""The conformance kit: the whole ladder of tests that a plugin has to climb, from one import.

    from mm_core.testing import Answer, Case, Conformance, picture

    class TestMyFamily(Conformance):
        cases = (Case("one", "<image>What is it?", {"image": picture(1)}),)

        def checkpoint(self, directory):             # a tiny one, with random weights; gives its path
            ...

        def reference(self, path, case):             # optional: what transformers answers, or your own code
            ...

pytest then runs every rung on every case: `pytest -k chunked` runs one. `check_plugin(TestMyFamily())` does
the same without pytest and lists the results.
"""

from mm_core.testing.case import Answer, Case
from mm_core.testing.conformance import Conformance, Result, check_plugin
from mm_core.testing.media import clip, frames, picture, sound
from mm_core.testing.rungs import RUNGS, Rung
from mm_core.testing.tiny import greedy, randomize_, tiny_tokenizer, write_json

__all__ = [
    "RUNGS",
    "Answer",
    "Case",
    "Conformance",
    "Result",
    "Rung",
    "check_plugin",
    "clip",
    "frames",
    "greedy",
    "picture",
    "randomize_",
    "sound",
    "tiny_tokenizer",
    "write_json",
]
