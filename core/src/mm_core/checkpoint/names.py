"""How a checkpoint's tensor names meet a model's parameters: the plan that loading follows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm_core.checkpoint.files import TensorInfo
from mm_core.errors import PluginError
from mm_core.hookspecs import WeightMap

if TYPE_CHECKING:
    from torch import Tensor, nn

Target = tuple["nn.Module", WeightMap]

# Dtypes that are cast to a floating parameter; integers there mean a quantised checkpoint.
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Placement:
    """Where one tensor goes: rows [start, start + rows) of `param`, or all of it (rows None)."""

    param: Tensor
    name: str
    shard: int | None = None
    start: int = 0
    rows: int | None = None

    def view(self) -> Tensor:
        """The slice of the parameter that the tensor fills."""
        data = self.param.data
        return data if self.rows is None else data.narrow(0, self.start, self.rows)

    def wanted_shape(self) -> tuple[int, ...]:
        """The shape the checkpoint's tensor must have."""
        shape: Iterable[int] | None = getattr(self.param, "checkpoint_shape", None)
        if shape is not None and self.rows is None:
            return tuple(shape)
        first = self.param.shape[0] if self.rows is None and self.param.dim() else self.rows
        return (first, *self.param.shape[1:]) if first is not None else ()


@dataclass
class Plan:
    """Which tensor goes where, and everything about names that does not fit."""

    placements: dict[str, list[Placement]] = field(default_factory=lambda: defaultdict(list))
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class NameTable:
    """The names one target's parameters have, and the way from checkpoint names to them."""

    def __init__(self, module: nn.Module, weight_map: WeightMap) -> None:
        self.weight_map = weight_map
        self.params = dict(module.named_parameters(remove_duplicate=False))
        self.required = set(self.params)
        held = module.state_dict(keep_vars=True)
        self.params.update({name: value for name, value in held.items() if name not in self.params})
        self._rename = [(re.compile(pattern), text) for pattern, text in weight_map.rename]
        self._ignore = [re.compile(pattern) for pattern in weight_map.ignore]

    def ignores(self, name: str) -> bool:
        """Whether the checkpoint may hold the tensor without anybody needing it."""
        return any(pattern.match(name) for pattern in self._ignore)

    def renamed(self, name: str) -> str | None:
        """The name inside the module; None where no pattern matches from the start."""
        for pattern, text in self._rename:
            if pattern.match(name):
                return pattern.sub(text, name, count=1)
        return None

    def place(self, name: str) -> Placement | None:
        """Where a renamed tensor goes in this module."""
        stem, dot, leaf = name.rpartition(".")
        for suffix, fused, shard in self.weight_map.fused:
            if stem == suffix or stem.endswith("." + suffix):
                whole = stem[: len(stem) - len(suffix)] + fused + dot + leaf
                if whole in self.params:
                    return self._shard(whole, shard)
        return Placement(self.params[name], name) if name in self.params else None

    def _shard(self, name: str, shard: int) -> Placement:
        param = self.params[name]
        sizes: Sequence[int] | None = getattr(param, "shard_sizes", None)
        if sizes is None or not 0 <= shard < len(sizes) or sum(sizes) != param.shape[0]:
            raise PluginError(
                f"Parameter '{name}' {tuple(param.shape)} is fused, but its shard_sizes are {sizes!r}; they must hold "
                f"shard {shard} and add up to the rows. Set `param.shard_sizes` in the module that makes it."
            )
        return Placement(param, name, shard, sum(sizes[:shard]), sizes[shard])

    def shards(self, name: str) -> int:
        """In how many pieces a parameter may arrive."""
        fused = {stem for _, stem, _ in self.weight_map.fused}
        stem = name.rpartition(".")[0]
        whole = any(stem == f or stem.endswith("." + f) for f in fused)
        return len(getattr(self.params[name], "shard_sizes", ())) if whole else 0


def make_plan(tensors: Mapping[str, TensorInfo], tables: Sequence[NameTable]) -> Plan:
    """Give every tensor its place, and list what is left over on either side."""
    plan = Plan()
    aliases: list[tuple[str, NameTable, str]] = []
    for name in tensors:
        known = any(table.ignores(name) for table in tables)
        for table in () if known else tables:
            renamed = table.renamed(name)
            if renamed is None:
                continue
            if renamed in table.weight_map.tied:
                aliases.append((name, table, table.weight_map.tied[renamed]))
                known = True
            elif (placement := table.place(renamed)) is not None:
                plan.placements[name].append(placement)
                known = True
        if not known:
            plan.unexpected.append(name)
    _use_aliases(plan, aliases)
    plan.missing = [name for table in tables for name in _missing(table, plan)]
    return plan


def _use_aliases(plan: Plan, aliases: list[tuple[str, NameTable, str]]) -> None:
    """A tied tensor counts only where the one it shares is not in the checkpoint itself."""
    covered = {id(p.param) for placements in plan.placements.values() for p in placements}
    for name, table, shared in aliases:
        placement = table.place(shared)
        if placement is not None and id(placement.param) not in covered:
            plan.placements[name].append(placement)
            covered.add(id(placement.param))


def _missing(table: NameTable, plan: Plan) -> Iterator[str]:
    have: dict[int, set[int | None]] = defaultdict(set)
    for placements in plan.placements.values():
        for placement in placements:
            have[id(placement.param)].add(placement.shard)
    for name in sorted(table.required - set(table.weight_map.tied)):
        got = have[id(table.params[name])]
        if None in got:
            continue
        count = table.shards(name)
        if not count:
            yield name
            continue
        for shard in sorted(set(range(count)) - got):
            yield f"{name} (shard {shard} of {count})"


def tie(module: nn.Module, weight_map: WeightMap) -> None:
    """Make tied names one parameter, where the module holds them as two."""
    for name, shared in weight_map.tied.items():
        owner, _, leaf = name.rpartition(".")
        try:
            source = module.get_parameter(shared)
            holder = module.get_submodule(owner)
        except AttributeError:
            continue  # the module has no such parameter of its own: it reads the shared one itself
        if getattr(holder, leaf, None) is not None:
            setattr(holder, leaf, source)
