"""What the caches hold by whose it is: published blocks by named item and by salt, items by name.

A name is a salt and a uuid: what somebody calls an item. One name may have had several contents, and one content
is prepared in several ways; each of these has a media key of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from mm_core.cache.prefix import BlockContent, PrefixCache

MAX_ITEMS = 65536

_K = TypeVar("_K")


class Name(NamedTuple):
    """A uuid within a salt; uuid None: all items of the salt that have none."""

    salt: str | None
    uuid: str | None


class TagIndex:
    """Published blocks by the named items in their chains, and by salt.

    Made of what is published when it is made, and kept up to date as an observer from then on: nothing is indexed
    for engines that never ask.
    """

    def __init__(self, prefix: PrefixCache) -> None:
        self._prefix = prefix
        self._by_name: dict[Name, set[int]] = {}
        self._by_salt: dict[str | None, set[int]] = {}
        for block, content in prefix.contents():
            self.published(block, content)
        prefix.observers.append(self)

    def published(self, block: int, content: BlockContent) -> None:
        """See `PrefixObserver`."""
        self._by_salt.setdefault(content.salt, set()).add(block)
        for name in names_in_chain(content):
            self._by_name.setdefault(name, set()).add(block)

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:  # noqa: ARG002
        """See `PrefixObserver`."""
        _discard(self._by_salt, content.salt, block)
        for name in names_in_chain(content):
            _discard(self._by_name, name, block)

    def of_name(self, name: Name) -> list[int]:
        """Blocks whose chain holds something of the items of that name."""
        return sorted(self._by_name.get(name, ()))

    def of_salt(self, salt: str | None) -> list[int]:
        """Blocks of a salt; None: of the requests that had none."""
        return sorted(self._by_salt.get(salt, ()))

    def touching(self, name: Name) -> list[int]:
        """Blocks in which something of the items of that name lies."""
        found = self.of_name(name)
        return [block for block in found if (content := self._prefix.content(block)) and name in names_in(content)]

    def with_ancestors(self, blocks: Iterable[int]) -> set[int]:
        """These blocks and those before them in their chains, as far as they are published."""
        reached: set[int] = set()
        for block in blocks:
            at: int | None = block
            while at is not None and at not in reached:
                reached.add(at)
                content = self._prefix.content(at)
                at = None if content is None else self._prefix.find(content.parent)
        return reached

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the index is what one made now would be."""
        fresh = object.__new__(TagIndex)
        fresh._by_name, fresh._by_salt = {}, {}
        for block, content in self._prefix.contents():
            fresh.published(block, content)
        if (fresh._by_name, fresh._by_salt) != (self._by_name, self._by_salt):
            raise RuntimeError("the index of blocks by name and salt differs from what is published")


def names_in_chain(content: BlockContent) -> set[Name]:
    """Names of the items from the prompt's start to the block's end."""
    return {Name(content.salt, tag.uuid) for tag in content.media if tag.uuid is not None}


def names_in(content: BlockContent) -> set[Name]:
    """Names of the items that the block itself holds something of."""
    touched = content.media[len(content.media) - content.touches :]
    return {Name(content.salt, tag.uuid) for tag in touched if tag.uuid is not None}


def _discard(index: dict[_K, set[int]], key: _K, block: int) -> None:
    blocks = index[key]
    blocks.discard(block)
    if not blocks:
        del index[key]


class ItemNames:
    """Whose items the media keys belong to, as requests brought them; the oldest of more than `capacity` go.

    Only items with a uuid or a salt are noted: of all others there is nothing to tell.
    """

    def __init__(self, capacity: int = MAX_ITEMS) -> None:
        self._capacity = capacity
        self._names: OrderedDict[bytes, Name] = OrderedDict()
        self._keys: dict[Name, set[bytes]] = {}

    def note(self, key: bytes, name: Name) -> None:
        """A request holds the item."""
        if key in self._names:
            self._names.move_to_end(key)
            return
        self._names[key] = name
        self._keys.setdefault(name, set()).add(key)
        if len(self._names) > self._capacity:
            self._drop(next(iter(self._names)))

    def name(self, key: bytes) -> Name | None:
        """Whose an item is, where that is known."""
        return self._names.get(key)

    def keys(self, name: Name) -> list[bytes]:
        """Media keys of a name."""
        return sorted(self._keys.get(name, ()))

    def keys_of_salt(self, salt: str) -> list[bytes]:
        """Media keys of a salt."""
        return [key for key, name in self._names.items() if name.salt == salt]

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget whose these are."""
        for key in keys:
            if key in self._names:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        name = self._names.pop(key)
        keys = self._keys[name]
        keys.discard(key)
        if not keys:
            del self._keys[name]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names)
