"""From token ids to the text a user sees: incremental detokenization, stop strings, outputs.

No torch: this runs on the caller's side of the engine core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from mm_core.types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PreparedRequest,
    RequestMetrics,
    RequestOutput,
    Usage,
)

if TYPE_CHECKING:
    from mm_core.config import SamplingParams

_REPLACEMENT = "\ufffd"
_MAX_OPEN_BYTES = 3  # an incomplete UTF-8 character has at most 3 bytes
_CONTEXT_TOKENS = 4  # a window that is cut keeps at least so many tokens before the new ones
_MANY = 4  # answers, from which on decoding them together pays
_MAX_OPEN_TOKENS = 16  # after so many tokens without a character's end, the bytes are simply wrong


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers and of tokenizers fit."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """Text of some tokens."""
        ...


class Detokenizer:
    """Turns a growing list of tokens into a growing text.

    The pieces add up to the decoding of all tokens, and no piece holds half a character. (One
    exception: where bytes are no UTF-8, byte-fallback tokenizers replace characters before the
    fault too, which have been shown by then.)

    A token's text depends on its neighbours (bytes of one character, spaces dropped at the
    start), so a window of the last tokens is decoded anew with each one. `_text` is its text,
    `_shown` the part of it that was given out, `_clean` the number of tokens that this part covers
    entirely, `_cut` an earlier such number, where the window may be cut without splitting a
    character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._text = ""
        self._shown = ""
        self._clean = 0
        self._cut = 0

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that they complete, which may be empty."""
        return "".join([self._append(token) for token in token_ids])

    def finish(self) -> str:
        """The rest: what was held back for a character that never came to its end."""
        rest = self._beyond_shown()
        self._window, self._text, self._shown, self._clean, self._cut = [], "", "", 0, 0
        return rest

    def _append(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._text and not self._decode([token, token]):
            self._window.pop()  # special, or unknown: such tokens must not fill the window
            return ""
        self._text = text
        if text.endswith(_REPLACEMENT):
            return self._append_open()
        piece = self._beyond_shown()
        if not text.startswith(self._shown):
            self._window, self._cut = self._window[self._clean :], 0
            self._text = self._decode(self._window)
        self._shown, self._clean = self._text, len(self._window)
        self._cut_window()
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _beyond_shown(self) -> str:
        """What the window adds. Where its text takes back what was shown: the new tokens alone."""
        if self._text.startswith(self._shown):
            return self._text[len(self._shown) :]
        return self._decode(self._window[self._clean :])

    def _cut_window(self) -> None:
        """Forget tokens that can no longer matter; the kept ones must show something, for a
        tokenizer that drops the space before the first word would drop it again."""
        if self._clean - self._cut < _CONTEXT_TOKENS:
            return
        kept = self._window[self._cut :]
        text = self._decode(kept) if self._cut else self._text
        if text:
            self._window, self._text, self._shown = kept, text, text
            self._clean = self._cut = len(kept)

    def _append_open(self) -> str:
        """The text ends in what may be the first bytes of a character: give out what is before."""
        if len(self._window) - self._clean > _MAX_OPEN_TOKENS:
            return self._give_up()
        text, end = self._text, len(self._text)
        while end > len(text) - _MAX_OPEN_BYTES and text[end - 1 : end] == _REPLACEMENT:
            end -= 1
        if end <= len(self._shown) or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) : end]
        self._shown = text[:end]
        return piece

    def _give_up(self) -> str:
        """Long without a clean end: forget tokens up to where the text demonstrably falls in two."""
        if self._text.startswith(self._shown):
            for split in range(len(self._window) - 1, len(self._window) - _CONTEXT_TOKENS - 1, -1):
                head, tail = self._decode(self._window[:split]), self._decode(self._window[split:])
                if head + tail == self._text:
                    piece = head[len(self._shown) :]
                    self._window, self._text = self._window[split:], tail
                    self._shown = self._shown[len(head) :]
                    self._clean = self._cut = 0
                    return piece
        return self.finish()


class WholeTexts:
    """Decodes many answers at once. tokenizers does it in parallel, and without the interpreter's lock;
    transformers one by one, at three times the price, and so does every other tokenizer here."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if _adds_nothing(tokenizer) else None

    def decode(self, answers: Sequence[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """As `tokenizer.decode` of each."""
        if self._backend is None or len(answers) < _MANY:
            return [self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in answers]
        texts: list[str] = self._backend.decode_batch(answers, skip_special_tokens=skip_special_tokens)
        return texts


def _adds_nothing(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers decodes as its backend does: by the library's own methods, no clean-up."""
    methods = [getattr(getattr(type(tokenizer), name, None), "__module__", "") for name in ("decode", "_decode")]
    own = all(module.startswith("transformers.tokenization_utils") for module in methods)
    return own and getattr(tokenizer, "clean_up_tokenization_spaces", True) is False


class StopMatcher:
    """Finds stop strings in a text that comes in pieces (Knuth, Morris, Pratt 1977, one automaton
    a string), in time linear in the text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with

    def feed(self, piece: str, *, armed: bool = True) -> tuple[str, int] | None:
        """The stop string that is first complete, and the characters of `piece` up to its end.

        Of several that end together, the longest. Not `armed`: complete ones are passed over.
        """
        if not self._stops:
            return None
        for place, char in enumerate(piece):
            hits = [stop for i, stop in enumerate(self._stops) if self._step(i, char)]
            if hits and armed:
                return max(hits, key=len), place + 1
        return None

    @property
    def pending(self) -> int:
        """Length of the longest end of the text that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def _step(self, which: int, char: str) -> bool:
        stop, borders, matched = self._stops[which], self._borders[which], self._matched[which]
        while matched and stop[matched] != char:
            matched = borders[matched]
        matched += stop[matched] == char
        hit = matched == len(stop)
        self._matched[which] = borders[matched] if hit else matched
        return hit


def _borders(stop: str) -> list[int]:
    """For each length of a beginning of `stop`: how much of its own end it begins with, less than all."""
    borders = [0, 0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length]
        borders.append(length + (stop[length] == char))
    return borders


@dataclass
class _Answer:
    """One of the `n` answers while it grows; `pieces` make up its text."""

    index: int
    detokenizer: Detokenizer
    matcher: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


class RequestText:
    """A request's answers as text, one state for each of its `n` answers.

    finish_hook: the family's repair of a finished answer (`Processor.finish`); it is called once
    an answer, when that has ended in "stop" or "length". stream: the text is wanted while it grows;
    False, and no stop string to look for: it is decoded once, at the end, and is empty until then.
    """

    def __init__(
        self,
        request: PreparedRequest,
        tokenizer: Tokenizer,
        finish_hook: Callable[[str, Sequence[int]], str],
        *,
        stream: bool = True,
    ) -> None:
        self._request = request
        self._params: SamplingParams = request.params
        self._at_end = not stream and not self._params.stop
        # An answer that follows a grammar may end with its last token, no other being needed to say so.
        ends = request.stop_token_ids.union(self._params.stop_token_ids)
        self._ends = None if self._params.structured is None else ends
        self._tokenizer = tokenizer
        self._finish_hook = finish_hook
        self._token_texts: dict[int, str] = {}
        self._answers = [self._new_answer(index) for index in range(self._params.n)]

    @property
    def plain(self) -> bool:
        """Whether tokens before the last one need no more than `append`."""
        return self._at_end and self._params.best_logprobs is None

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum([len(answer.token_ids) for answer in self._answers])

    @property
    def skip_special_tokens(self) -> bool:
        """As the request's parameters have it."""
        return self._params.skip_special_tokens

    def append(self, index: int, token_id: int) -> None:
        """Add a token of a `plain` request: `update` without all that is not needed."""
        self._answers[index].token_ids.append(token_id)

    def shown(self, index: int, finish_reason: str | None) -> list[int]:
        """The tokens that the text of an ended answer is made of; the last one was appended."""
        ids = self._answers[index].token_ids
        return list(ids) if self._hidden_token(ids, finish_reason) is None else ids[:-1]

    def end(self, index: int, text: str, finish_reason: str, stop_reason: int | None) -> None:
        """End an answer of a `plain` request; text: of its tokens `shown`."""
        answer = self._answers[index]
        answer.pieces[:] = [text]
        self._finish(answer, finish_reason, stop_reason)

    def update(
        self,
        index: int,
        new_token_ids: Sequence[int],
        logprobs: Sequence[Mapping[int, Logprob] | None],
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> str | None:
        """Add tokens to answer `index`; `logprobs` has an entry a token, or none at all.

        With finish_reason "stop" the last new token is the eos or stop token. Returns the stop
        string that was hit: the answer has ended, the engine must stop its sequence, and further
        tokens are dropped.
        """
        answer = self._answers[index]
        if answer.finish_reason is not None:
            return None
        hidden = self._hidden_token(new_token_ids, finish_reason)
        for place, token in enumerate(new_token_ids):
            self._add_token(answer, token, logprobs[place] if logprobs else None)
            piece = "" if self._at_end or place == hidden else answer.detokenizer.append([token])
            if stop := self._add_text(answer, piece):
                return stop
        if finish_reason is None:
            return None
        if self._at_end:
            answer.pieces[:] = [self._whole_text(answer, hidden)]
        if stop := self._add_text(answer, answer.detokenizer.finish()):
            return stop
        self._finish(answer, finish_reason, stop_reason)
        return None

    def _whole_text(self, answer: _Answer, hidden: int | None) -> str:
        """All tokens decoded at once: what the pieces of a `Detokenizer` add up to."""
        shown = answer.token_ids if hidden is None or hidden < 0 else answer.token_ids[:-1]
        return self._tokenizer.decode(shown, skip_special_tokens=self._params.skip_special_tokens)

    def output(self, usage: Usage, metrics: RequestMetrics | None = None) -> RequestOutput:
        """The answers so far. `usage.completion_tokens` is set to the tokens that are kept.

        While an answer runs, its text lacks an end that may turn out to begin a stop string.
        """
        outputs = tuple([self._completion(answer) for answer in self._answers])
        kept = self.num_tokens
        return RequestOutput(
            request_id=self._request.request_id,
            prompt_token_ids=self._request.user_token_ids,
            outputs=outputs,
            usage=usage if usage.completion_tokens == kept else replace(usage, completion_tokens=kept),
            finished=all(output.finish_reason is not None for output in outputs),
            metrics=metrics,
            warnings=self._request.warnings,
        )

    def _new_answer(self, index: int) -> _Answer:
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=self._params.skip_special_tokens)
        return _Answer(index, detokenizer, StopMatcher(self._params.stop))

    def _hidden_token(self, new_token_ids: Sequence[int], finish_reason: str | None) -> int | None:
        """Place of the token that ended the answer, which is kept but not shown."""
        ended = finish_reason == FinishReason.STOP and not self._params.include_stop_str_in_output
        if ended and self._ends is not None and new_token_ids and new_token_ids[-1] not in self._ends:
            return None
        return len(new_token_ids) - 1 if ended else None

    def _add_token(self, answer: _Answer, token: int, logprobs: Mapping[int, Logprob] | None) -> None:
        answer.token_ids.append(token)
        if self._params.best_logprobs is None:
            return
        found = logprobs or {}
        answer.logprobs.append(dict(self._decoded(found)))
        if token in found:
            answer.cumulative_logprob += found[token].logprob

    def _decoded(self, logprobs: Mapping[int, Logprob]) -> Iterator[tuple[int, Logprob]]:
        for token, logprob in logprobs.items():
            if token not in self._token_texts:
                self._token_texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
            yield token, replace(logprob, decoded_token=self._token_texts[token])

    def _add_text(self, answer: _Answer, piece: str) -> str | None:
        """Add text; where it completes a stop string, cut there, end the answer and return the string."""
        armed = len(answer.token_ids) > self._params.min_tokens
        hit = answer.matcher.feed(piece, armed=armed)
        if hit is None:
            answer.pieces.append(piece)
            return None
        stop, end = hit
        text = answer.text + piece[:end]
        answer.pieces[:] = [text if self._params.include_stop_str_in_output else text[: -len(stop)]]
        self._finish(answer, FinishReason.STOP, stop)
        return stop

    def _finish(self, answer: _Answer, finish_reason: str, stop_reason: str | int | None) -> None:
        answer.finish_reason, answer.stop_reason = finish_reason, stop_reason
        if finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            answer.pieces[:] = [self._finish_hook(answer.text, answer.token_ids)]

    def _completion(self, answer: _Answer) -> CompletionOutput:
        text = answer.text
        if answer.finish_reason is None and not self._params.include_stop_str_in_output:
            text = text[: len(text) - answer.matcher.pending]
        asked = self._params.best_logprobs is not None
        by_token = answer.token_ids and not isinstance(answer.stop_reason, str)  # else by a stop string, or unended
        hidden = by_token and self._hidden_token(answer.token_ids, answer.finish_reason) is not None
        return CompletionOutput(
            index=answer.index,
            text=text,
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            logprobs=tuple(answer.logprobs) if asked else None,
            cumulative_logprob=answer.cumulative_logprob if asked else None,
            hidden_tokens=int(bool(hidden)),
        )
