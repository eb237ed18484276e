"""Requests that wait for their grammar: it is compiled beside the engine's loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from mm_core.config import SamplingParams
from mm_core.engine.messages import Message, Submit, TokenOutput
from mm_core.errors import InvalidParamsError
from mm_core.structured.grammars import Grammars, outcome
from mm_core.structured.matcher import Compiled, Matcher
from mm_core.types import FinishReason, PreparedRequest


class GrammarDesk:
    """Holds a request back until its grammar is there, and submits it again then.

    source: what compiles; None where no answer can follow a grammar. wake: sends the core a message, from any thread.
    """

    def __init__(self) -> None:
        self.source: Grammars | None = None
        self.wake: Callable[[Message], None] = _to_nobody
        self._held: dict[str, tuple[PreparedRequest, Future[Compiled]]] = {}
        self._dropped: set[str] = set()  # ended while they were held; they are submitted again all the same
        self._compiled: dict[str, Compiled] = {}

    def ready(self, request: PreparedRequest) -> bool:
        """Whether the request may begin; else it is submitted again, or not at all. Raises InvalidGrammarError and
        what else a grammar fails with."""
        spec = request.params.structured
        if spec is None:
            return True
        name = request.request_id
        held = self._held.pop(name, None)
        if name in self._dropped:
            self._dropped.discard(name)
            return False
        if self.source is None:
            raise InvalidParamsError("This engine has no structured output.", param="structured")
        future = None if held is None or held[1].cancelled() else held[1]  # what it waited for may be forgotten
        if future is None:
            future = self.source.start(spec, salt=request.cache_salt)
        if future.done():
            self._compiled[name] = outcome(future)
            return True
        self._held[name] = (request, future)
        future.add_done_callback(lambda _: self.wake(Submit(request)))
        return False

    def matchers(self, request: PreparedRequest) -> list[Matcher] | list[None]:
        """One for each answer of a request that is ready."""
        params: SamplingParams = request.params
        if params.structured is None:
            return [None] * params.n
        compiled = self._compiled.pop(request.request_id)
        return [Matcher(compiled) for _ in range(params.n)]

    @property
    def held(self) -> list[str]:
        """Ids of the requests that wait."""
        return list(self._held)

    def abort(self, request_id: str, reason: FinishReason) -> list[TokenOutput]:
        """End a request that waits; nothing for another."""
        held = self._held.pop(request_id, None)
        if held is None:
            return []
        self._dropped.add(request_id)
        request, future = held
        future.cancel()
        return [TokenOutput(request_id, i, None, finish_reason=reason.value) for i in range(request.params.n)]

    def close(self) -> None:
        """No more grammars are compiled."""
        if self.source is not None:
            self.source.close()


def _to_nobody(message: Message) -> None:
    """Nobody listens."""
