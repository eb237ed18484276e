"""Whether a scheduler's books balance: for tests, after every step."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from mm_core.scheduler.sequence import Status

if TYPE_CHECKING:
    from mm_core.scheduler.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Raise RuntimeError where they do not."""
    live = [*scheduler.waiting, *scheduler.running]
    tiers = scheduler.tiers
    tables = chain.from_iterable(s.tables.values() for s in live)
    scheduler.pool.check_integrity(chain(tables, () if tiers is None else tiers.restores.tables))
    scheduler.prefix.check_integrity()
    scheduler.encoder_cache.check_integrity({s.seq_id for s in live})
    if tiers is not None:
        tiers.check_integrity()
        if not {group.seq.seq_id for group in tiers.restores.groups} <= {s.seq_id for s in scheduler.waiting}:
            raise RuntimeError("blocks were copied back for a sequence that does not wait for them")
    if any(owner.status is not Status.RUNNING for owner in scheduler.reuse.owners):
        raise RuntimeError("a block is awaited from a sequence that does not run")
    if sorted([*scheduler.slots, *(s.slot for s in scheduler.running)]) != list(range(scheduler.config.max_num_seqs)):
        raise RuntimeError("a slot is lost, or has two sequences")
    for seq in scheduler.running:
        if not seq.num_completed_tokens <= seq.num_computed_tokens <= seq.num_slots:
            raise RuntimeError(f"sequence {seq.seq_id} has computed more tokens than it has slots")
        if seq.num_published_blocks * scheduler.pool.block_size > seq.num_completed_tokens:
            raise RuntimeError(f"sequence {seq.seq_id} has published what is not computed")
        if len(seq.tables.get("cross", ())) != scheduler.sources.blocks_of(seq.request):
            raise RuntimeError(f"sequence {seq.seq_id} has no room for its source, or too much")
