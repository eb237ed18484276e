"""Bookkeeping of KV blocks, prefixes and encoder rows. No torch here."""

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.cache.prefix import BlockContent, MediaTag, PrefixCache

__all__ = ["BlockContent", "BlockPool", "EncoderCache", "MediaTag", "PrefixCache"]
