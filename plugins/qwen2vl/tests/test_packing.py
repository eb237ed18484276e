"""Which items go through the tower together."""

from __future__ import annotations

import random
from itertools import chain, pairwise
from math import prod

from mm_plugin_qwen2vl.packing import LARGEST, REPEATED, equal_packs, mixed_packs


def test_equal_items_go_by_powers_of_two() -> None:
    small, large, huge = (1, 32, 32), (1, 96, 96), (2, 128, 128)
    grids = [small] * 3 + [large] + [small] * 4 + [huge, large]
    assert equal_packs(grids) == [[0, 1, 2, 4], [5, 6], [7], [3], [9]]
    assert equal_packs([(1, 2, 2)] * 1500)[0] == list(range(1024))
    assert equal_packs([]) == []


def test_every_item_is_in_one_pack() -> None:
    rng = random.Random(0)
    for _ in range(50):
        grids = [(rng.randint(1, 4), 2 * rng.randint(1, 60), 2 * rng.randint(1, 60)) for _ in range(rng.randint(1, 20))]
        grids += rng.choices(grids, k=10)
        packs = equal_packs(grids)
        assert sorted(chain.from_iterable(packs)) == [i for i, g in enumerate(grids) if prod(g) <= LARGEST]
        for pack in packs:
            assert len({grids[i] for i in pack}) == 1
            assert len(pack) == 1 or sum(prod(grids[i]) for i in pack) <= REPEATED
        order = sorted(range(len(grids)), key=lambda i: -i)
        mixed = mixed_packs(order, grids)
        assert list(chain.from_iterable(mixed)) == order
        for pack in mixed:
            assert len(pack) == 1 or sum(prod(grids[i]) for i in pack) <= LARGEST
        for first, second in pairwise(mixed):
            assert sum(prod(grids[i]) for i in [*first, second[0]]) > LARGEST
