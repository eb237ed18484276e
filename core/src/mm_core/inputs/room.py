"""Room: how many bytes of preprocessed media the requests of an engine hold, and who has to wait for some."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from mm_core.errors import ContextLengthError, MediaTooLargeError
from mm_core.inputs.coordinator import Steps
from mm_core.types import MediaFeature


class Waiter(Future[None]):
    """What one request waits for, and nobody else."""

    alone = True


class Stay:
    """What one request's media hold. max_bytes: of all features; max_placed: rows that its prompt has place for (None:
    they take none)."""

    def __init__(self, max_bytes: int, max_placed: int | None) -> None:
        self._max_bytes = max_bytes
        self._max_placed = max_placed
        self._placed = 0
        self.nbytes = 0
        self.held: dict[bytes, int] = {}
        self.prepared = False

    def count(self, feature: MediaFeature) -> None:
        """One more item. Raises MediaTooLargeError, ContextLengthError: no more of them need to be made then."""
        nbytes = feature.nbytes
        self.nbytes += nbytes
        self._placed += feature.num_placed
        self.held.setdefault(feature.key, nbytes)
        if self._max_placed is not None and self._placed >= self._max_placed:
            raise ContextLengthError(
                f"The prompt's media have at least {self._placed} tokens, and the model's context is "
                f"{self._max_placed}: no room for an answer. Send fewer or smaller media (max_pixels, fps), or raise "
                "max_model_len.",
                param="prompt",
            )
        if self.nbytes > self._max_bytes:
            raise MediaTooLargeError(
                f"The request's media take more than {self._max_bytes} bytes once they are preprocessed. Send fewer, "
                "or smaller ones."
            )


class Room:
    """At most about `total` bytes of features, each counted once however many requests share it.

    What a request will take is not known before it is made. So requests go on by items: where the room is taken, they
    wait until a prepared request is over; where there is none, the oldest of those being prepared goes on, so that
    they cannot wait for each other. Used in one thread, but that a request may be over in any.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._nbytes = 0
        self._users: dict[bytes, int] = {}
        self._sizes: dict[bytes, int] = {}
        self._preparing: dict[Stay, None] = {}
        self._prepared = 0
        self._over: deque[Stay] = deque()  # filled by finalizers, which may run anywhere: they take no lock
        self._waiters: deque[Waiter] = deque()

    @property
    def nbytes(self) -> int:
        """Held now."""
        self._sweep()
        return self._nbytes

    def enter(self, stay: Stay) -> None:
        """A request begins to prepare its media; `leave` or `keep` ends that."""
        self._preparing[stay] = None

    def wait(self, stay: Stay) -> Steps[None]:
        """Until the request may make another feature."""
        while not self._may_go_on(stay):
            waiter = Waiter()
            self._waiters.append(waiter)
            try:
                if not self._may_go_on(stay):  # looked at again: who leaves from now on sees the waiter
                    yield waiter
            finally:
                with suppress(ValueError):
                    self._waiters.remove(waiter)

    def count(self, stay: Stay, feature: MediaFeature) -> None:
        """A feature of the request is there. Raises what `Stay.count` raises."""
        if feature.key not in stay.held:
            if not self._users.get(feature.key):
                self._sizes[feature.key] = feature.nbytes
                self._nbytes += feature.nbytes
            self._users[feature.key] = self._users.get(feature.key, 0) + 1
        stay.count(feature)

    def keep(self, stay: Stay, request: Any) -> None:
        """The request is prepared: what it took is held as long as that object lives."""
        self._preparing.pop(stay, None)
        stay.prepared = True
        self._prepared += 1
        weakref.finalize(request, self.leave, stay).atexit = False
        self._wake()

    def leave(self, stay: Stay) -> None:
        """The request is over. Thread-safe."""
        self._over.append(stay)
        self._wake()

    def _may_go_on(self, stay: Stay) -> bool:
        self._sweep()
        return self._nbytes < self._total or (not self._prepared and next(iter(self._preparing)) is stay)

    def _sweep(self) -> None:
        while self._over:
            stay = self._over.popleft()
            self._preparing.pop(stay, None)
            self._prepared -= stay.prepared
            for key in stay.held:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key]
                    self._nbytes -= self._sizes.pop(key)

    def _wake(self) -> None:
        """All look again, and those that still have no room wait again."""
        with suppress(IndexError):
            for _ in range(len(self._waiters)):
                waiter = self._waiters.popleft()
                with suppress(InvalidStateError):  # given up meanwhile
                    waiter.set_result(None)
