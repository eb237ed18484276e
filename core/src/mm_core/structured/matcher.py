"""Following one answer through its grammar, and the masks of what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm_core.errors import InvalidGrammarError
from mm_core.structured.library import PARAM, Library, Mask

_MAX_MOVES = 8


class Compiled:
    """A grammar that answers are made by. size: bytes, about. Raises InvalidGrammarError.

    Copies of a matcher share the states of their lexer, and the bound on these. So a grammar that many answers have
    followed is compiled again where they have used them up: the next generation begins with none.
    """

    def __init__(self, library: Library, text: str, size: int = 0) -> None:
        self.library = library
        self.size = size
        self.generation = 0
        self._text = text
        self._matcher = library.compile(text)

    def begin(self) -> Any:
        """An LLMatcher at the beginning."""
        return self._matcher.deep_copy()

    def renew(self, generation: int) -> None:
        """A generation is used up; nothing happens if another answer was told so before."""
        if generation == self.generation:
            self._matcher = self.library.compile(self._text)
            self.generation += 1


class Matcher:
    """One answer's place in its grammar: behind the first `length` of its tokens.

    A token may be given before it is certain that it stays, and given again. ended: nothing can follow, or an end was
    drawn. error: it cannot be followed any further; what is drawn then means nothing. What it takes is made when it
    is first needed.
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.ended = False
        self.error: InvalidGrammarError | None = None
        self._tokens: list[int] = []
        self._state: Any = None
        self._generation = 0
        self._moves = 0

    @property
    def length(self) -> int:
        """Tokens it is behind of."""
        return len(self._tokens)

    @property
    def open(self) -> bool:
        """Whether its mask says something."""
        return not self.ended and self.error is None

    @property
    def state(self) -> Any:
        """The LLMatcher."""
        if self._state is None:
            self._state, self._generation = self.compiled.begin(), self.compiled.generation
        return self._state

    def accept(self, at: int, token: int) -> None:
        """The answer's token number `at`, from 0 on, which is not above `length`."""
        if at < self.length:
            if self._tokens[at] == token:
                return
            self.rewind(at)
        if not self.open:
            return
        self._tokens.append(token)
        if token in self.compiled.library.ends:
            self.ended = True
        elif self.state.consume_token(token) or self.move():
            self.ended = self.state.is_stopped()
        else:
            self.fail("the model gave none of the tokens that it allows a usable score")

    def move(self) -> bool:
        """To the next generation of the grammar, if this one is used up: whether it goes on there."""
        if self._moves >= _MAX_MOVES or "too many" not in self.state.get_error():
            return False
        self.compiled.renew(self._generation)
        self._moves += 1
        self._state = None
        return bool(self.state.consume_tokens(self._tokens)) if self._tokens else True

    def rewind(self, length: int) -> None:
        """Forget all tokens from number `length` on."""
        kept, self._tokens = self._tokens[:length], []
        self.ended, self.error, self._state = False, None, None
        for at, token in enumerate(kept):
            self.accept(at, token)

    def fail(self, why: str = "") -> None:
        """It cannot be followed any further."""
        why = why or str(self.state.get_error()).splitlines()[0].removesuffix("<non-verbose/>").strip(" .")[:200]
        self.error = InvalidGrammarError(
            f"The answer could not be kept to its grammar after {self.length} tokens: {why}. Simplify the grammar.",
            param=PARAM,
        )


def fill_masks(matchers: Sequence[Matcher], masks: Mask) -> None:
    """What may come next: int32 [n, mask_words], contiguous, of matchers of one library.

    Only tokens that are text, and ends where the answer may end, whatever a grammar names. All bits are set for a
    matcher that is not open, or whose grammar turns out to be too much (`Matcher.error`).
    """
    library = matchers[0].compiled.library
    asked = [(matcher.state, row) for row, matcher in enumerate(matchers) if matcher.open]
    if len(asked) == 1:
        state, row = asked[0]
        state.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
    elif asked:
        library.executor.unsafe_compute_mask_ptr(asked, masks.ctypes.data, masks[0].nbytes, len(masks))
    for matcher, mask in zip(matchers, masks, strict=True):
        while matcher.open and matcher.state.is_error():
            if matcher.move():
                matcher.state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            else:
                matcher.fail()
        if matcher.open:
            may_end = library.has_end(mask) and matcher.state.is_accepting()
            mask &= library.text_mask
            if may_end:
                mask |= library.end_mask
            elif not mask.any():
                matcher.fail("no token that is text could follow")
        if not matcher.open:
            mask[:] = -1


def clear_tokens(mask: Mask, tokens: frozenset[int]) -> None:
    """Take tokens out of a mask, int32 [mask_words], if others are left."""
    kept = mask.copy()
    bits = mask.view("uint8")
    for token in tokens:
        if 0 <= token < 32 * len(mask):
            bits[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    if not mask.any():
        mask[:] = kept
