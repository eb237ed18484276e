"""llguidance, which does the work: loaded where it is first needed, with bounds on what a grammar may take.

This module is also what the checking process imports, so it imports little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_core.errors import InvalidGrammarError, MissingExtraError

PARAM = "structured"
COMPILE_S = 1.0
"""Wall time that compiling one grammar may take."""

# Of a grammar: a state of its lexer takes about 0.7 kB, 1000 units of fuel are about 0.07 ms of a step.
_MAX_LEXER_STATES = 10_000
_MAX_GRAMMAR_SIZE = 200_000
_INITIAL_FUEL = 1_000_000
_STEP_FUEL = 200_000
_STEP_ITEMS = 50_000
_ROW_ITEMS = 10_000
_MAX_REASON = 200


Mask = np.ndarray[Any, np.dtype[np.int32]]
"""Bit i % 32 of word i // 32 is token i's."""


@dataclass(frozen=True)
class TokenTable:
    """What each token of a vocabulary writes. tokens: bytes by id, as many as the logits are wide; empty for those that
    no text holds. special: ids that no text is written with. ends: ids that end an answer, among `special`.

    leading_space: the tokenizer drops one space at the beginning of what it decodes.
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    ends: Sequence[int]
    leading_space: bool = False


class Library:
    """llguidance for one vocabulary: its tokens as a trie, and threads for masks."""

    def __init__(self, table: TokenTable) -> None:
        self._module = load()
        tokens, ends = list(table.tokens), list(table.ends)
        if not ends:  # llguidance wants one: behind the vocabulary, where nothing is drawn
            ends = [len(tokens)]
            tokens.append(b"")
        vocabulary = _Vocabulary(tokens, [*table.special, *ends], ends[0])
        self._tokenizer = self._module.LLTokenizer(vocabulary, n_vocab=len(tokens), eos_token=ends)
        self.ends = frozenset(ends)
        self.mask_words = -(-len(tokens) // 32)
        self.text_mask = _mask_of([i for i, written in enumerate(table.tokens) if written], self.mask_words)
        self.end_mask = _mask_of(ends, self.mask_words)
        self._end_word, self._end_bit = ends[0] >> 5, 1 << (ends[0] & 31)
        self.executor = self._module.LLExecutor()
        self._limits = self._module.LLParserLimits(
            max_items_in_row=_ROW_ITEMS,
            initial_lexer_fuel=_INITIAL_FUEL,
            step_lexer_fuel=_STEP_FUEL,
            step_max_items=_STEP_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )

    def has_end(self, mask: Mask) -> bool:
        """Whether an end is in a mask of llguidance's; all are, then."""
        return bool(int(mask[self._end_word]) & self._end_bit)

    def compile(self, text: str) -> Any:
        """An LLMatcher at the beginning of a grammar of `grammar_text`. Raises InvalidGrammarError."""
        matcher = self._module.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(matcher.get_error())
        return matcher


def _mask_of(tokens: Sequence[int], words: int) -> Mask:
    bits = np.zeros(32 * words, np.uint8)
    bits[list(tokens)] = 1
    packed: Mask = np.packbits(bits, bitorder="little").view(np.int32)
    return packed


@dataclass(frozen=True)
class _Vocabulary:
    """A vocabulary as llguidance asks for it (its class TokenizerWrapper)."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: object) -> list[int]:
        """Tokens of a text; asked for only where tokens are forced, which no grammar of ours does."""
        raise NotImplementedError


def load() -> Any:
    """The module. Raises MissingExtraError."""
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError(
            "Structured output needs the package llguidance. Install it with: pip install 'mm-core[structured]'"
        ) from None
    return llguidance


def refusal(reason: str) -> InvalidGrammarError:
    """The error for a grammar that llguidance does not take."""
    if "NoExtension" in reason:
        return InvalidGrammarError("No answer at all fits the grammar, as far as this model's tokens go.", param=PARAM)
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["no reason was given"]
    what = next((line for line in lines if line.startswith("error: ")), lines[0])  # below a drawing of where
    shown = what.removeprefix("error: ").removesuffix("<non-verbose/>").strip(" .")
    if len(shown) > _MAX_REASON:
        shown = shown[:_MAX_REASON] + "…"
    return InvalidGrammarError(f"The grammar cannot be used: {shown}. Simplify or correct it.", param=PARAM)
