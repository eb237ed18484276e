"""DiskKeeper: when an engine ends, what its caches hold goes to disk, for the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from mm_core.cache.disk import DiskTier
from mm_core.cache.prefix import BlockContent
from mm_core.runner.host_memory import Bytes
from mm_core.runner.transfers import TransfersRunner
from mm_core.scheduler.scheduler import Scheduler
from mm_core.scheduler.transfers import Spill

logger = logging.getLogger(__name__)

_MOST_S = 30.0
_PROGRESS_DELAY_S = 2.0
_TOGETHER = 32  # blocks that leave the device together


class DiskKeeper:
    """Writes the blocks of the device and of the host's memory that are not on disk, while nothing else runs."""

    def __init__(self, scheduler: Scheduler, transfers: TransfersRunner, disk: DiskTier) -> None:
        self._scheduler = scheduler
        self._transfers = transfers
        self._disk = disk

    def keep(self, show_progress: bool, seconds: float = _MOST_S) -> int:
        """How many were written: the newest first, each behind those it continues, as many as the disk holds, and for
        so long at most. Ctrl-C ends it."""
        try:
            self._scheduler.check_integrity()
            blocks = {content.key: block for block, content in self._scheduler.prefix.contents()}
            wanted = self._wanted()
            end = time.monotonic() + seconds
            with tqdm(
                total=len(wanted), desc="Keeping blocks on disk (Ctrl-C: no more)", unit="block",
                delay=_PROGRESS_DELAY_S, disable=not show_progress,
            ) as bar:  # fmt: skip
                return self._write_all(wanted, blocks, end, bar)
        except Exception:  # a lost device, or books that a failed loop left: nothing of that goes to disk
            logger.warning("what the caches held was not kept on disk", exc_info=True)
            return 0

    def _wanted(self) -> list[BlockContent]:
        """In the order in which they are written."""
        tiers = self._scheduler.tiers
        host = [] if tiers is None else [e.content for e in tiers.host.entries() if e.ready and not e.num_rows]
        device = [content for _, content in self._scheduler.prefix.contents()]
        here = {content.key: content for content in (*host, *device)}
        room = self._disk.num_places
        wanted: list[BlockContent] = []
        for key in list(reversed(here)):
            chain = []
            while (content := here.pop(key, None)) is not None:
                chain.append(content)
                key = content.parent
            for content in reversed(chain):
                if self._disk.find(content.key) is not None:
                    self._disk.touch(content.key)
                    room -= 1
                else:
                    wanted.append(content)
        return wanted[: max(room, 0)]

    def _write_all(self, wanted: Sequence[BlockContent], blocks: dict[bytes, int], end: float, bar: tqdm[None]) -> int:
        written = 0
        contents = self._contents(wanted, blocks)
        for content, found in zip(wanted, contents, strict=True):
            if time.monotonic() > end:
                logger.warning("%d blocks were not kept on disk: there was no time", len(wanted) - written)
                break
            written += found is not None and self._write(content, found)
            bar.update()
        return written

    def _write(self, content: BlockContent, found: Bytes) -> bool:
        places = self._disk.reserve(content.key, 1, content.token_ids)
        if places is None:
            return False
        if self._disk.write(Spill(content.key, (), places, content.token_ids), [found]):
            self._disk.commit(content.key)
            return True
        self._disk.drop(content.key)
        return False

    def _contents(self, wanted: Sequence[BlockContent], blocks: dict[bytes, int]) -> Iterator[Bytes | None]:
        """What each holds; None where it is damaged."""
        tiers = self._scheduler.tiers
        for at in range(0, len(wanted), _TOGETHER):
            part = wanted[at : at + _TOGETHER]
            on_device = self._transfers.contents([blocks[content.key] for content in part if content.key in blocks])
            for content in part:
                if content.key in blocks:
                    yield next(on_device)
                else:
                    entry = None if tiers is None else tiers.host.find(content.key)
                    yield None if entry is None else self._transfers.slot_content(entry.slots[0])
