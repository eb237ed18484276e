"""The ladder: every rung by name. A rung raises where the plugin fails it, or returns its findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mm_core.testing import answers, bad_inputs, features
from mm_core.testing.case import Case
from mm_core.testing.workbench import Workbench

Findings = Mapping[str, str | None]
"""What a rung found out about features of the support matrix: None, or why the case cannot show it."""


@dataclass(frozen=True, repr=False)
class Rung:
    """One rung. shows: what is true where it passes. run(bench, case) raises AssertionError or any other
    exception where it is not. needs: "media", "reference" or nothing; once: for the family, not for each case."""

    name: str
    shows: str
    run: Callable[[Workbench, Case], Findings]
    needs: str = ""
    once: bool = False

    def __repr__(self) -> str:
        return f"Rung({self.name!r})"

    def applies(self, case: Case, *, has_reference: bool) -> bool:
        """Whether the rung can be run on a case."""
        if self.needs == "reference":
            return has_reference and case.parity
        return self.needs != "media" or bool(case.items)


RUNGS: Mapping[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("declared", "families are told without importing torch", features.check_declared, once=True),
        Rung("counts", "placeholder tokens, features and encoder rows agree, for items of any size",
             features.check_counts, "media"),
        Rung("order", "items keep their order: two media swapped give swapped rows and another answer",
             features.check_order, "media"),
        Rung("keys", "equal media have equal keys; other media, settings and salts have others",
             features.check_keys, "media"),
        Rung("threads", "many threads prepare media at once and get the same bytes", features.check_threads, "media"),
        Rung("cached", "what encoder cache and KV cache serve changes no token", answers.check_cached),
        Rung("batched", "in a crowd, with steps overlapped or not, as alone", answers.check_batched),
        Rung("chunked", "a prompt in chunks gives the same tokens", answers.check_chunked),
        Rung("fp8", "an fp8 KV cache serves what it was given", answers.check_fp8),
        Rung("streamed", "a stream ends with what generate gives", answers.check_streamed),
        Rung("logits_processors", "a logits processor steers one request and no other",
             answers.check_logits_processors),
        Rung("bad_inputs", "wrong media end in a named error, and the engine lives", bad_inputs.check_bad_inputs,
             once=True),
        Rung("parity", "prompt, greedy tokens and logits equal the reference's", answers.check_parity, "reference"),
    )
}  # fmt: skip
