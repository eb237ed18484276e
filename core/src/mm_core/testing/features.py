"""Rungs about what a plugin makes of media: counts, order, keys, threads."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mm_core.errors import MMError
from mm_core.testing.case import Case
from mm_core.testing.media import of_many_sizes, varied
from mm_core.testing.workbench import Workbench, need, same_feature
from mm_core.types import MODALITIES, MediaFeature, MediaItem, Modality, PreparedRequest

if TYPE_CHECKING:
    from torch import Tensor

_HEAVY = ("torch", "transformers", "triton")
_THREADS, _ROUNDS = 8, 3
_TELL = """
import importlib, json, sys
families = importlib.import_module(sys.argv[1]).mm_families()
loaded = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps([[f.name for f in families], loaded]))
"""


def check_declared(bench: Workbench, case: Case) -> Mapping[str, str | None]:  # noqa: ARG001
    """Families are told without torch, and fit the checkpoint and the processor."""
    model, plugin = bench.model, bench.plugin
    families = plugin.mm_families()
    owners = [f for f in families if set(f.architectures) & set(model.checkpoint.architectures)]
    need(len(owners) == 1, f"{len(owners)} of the plugin's families claim {model.checkpoint.architectures}, not one")
    told, given = owners[0].modalities, model.processor.modalities
    need(set(told) == set(given), f"mm_families tells {told}, the processor's modalities are {given}")
    need(set(told) <= set(MODALITIES), f"modalities are {MODALITIES}, not {told}")
    if isinstance(plugin, ModuleType):
        path = os.pathsep.join(entry for entry in sys.path if entry)
        done = subprocess.run(
            [sys.executable, "-c", _TELL, plugin.__name__], env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        need(done.returncode == 0, f"import {plugin.__name__} and mm_families() failed alone:\n{done.stderr[-2000:]}")
        names, loaded = json.loads(done.stdout.splitlines()[-1])
        need(names == [f.name for f in families], f"mm_families() gives {names} in another process")
        heavy = [name for name in _HEAVY if name in loaded]
        need(not heavy, f"importing {plugin.__name__} and telling its families imports {', '.join(heavy)}")
    return {}


# -- counts


def check_counts(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """The case's own media, then items of many sizes in their places."""
    _check_request(bench, case)
    for modality, values in case.items.items():
        for item in of_many_sizes(modality, bench.settings.seed):
            items = {**case.items, modality: [item, *values[1:]]}
            changed = case.with_items(items)
            try:
                _check_request(bench, changed)
            except MMError as error:
                # A size that the family refuses is no fault; `bad_inputs` looks at how it does.
                need(error.code != "plugin_error", f"{_size(modality, item)}: {error}")
            except AssertionError as error:
                raise AssertionError(f"{_size(modality, item)}: {error}") from None
    return {}


def _size(modality: Modality, value: Any) -> str:
    if modality == "image":
        return f"an image of {value.width} × {value.height}"
    return f"{len(value['frames'])} frames" if modality == "video" else f"sound of {len(value[0])} samples"


def _check_request(bench: Workbench, case: Case) -> None:
    request, model = bench.prepared(case), bench.model
    features = [r.feature for r in request.media]
    count = sum(map(len, case.items.values()))
    need(len(features) == count, f"{count} items, {len(features)} features")
    _check_ranges(bench, request)
    rows = bench.encode(features)
    need(len(rows) == count, f"{count} features, {len(rows)} tensors of rows")
    for feature, found in zip(features, rows, strict=True):
        wanted = (feature.num_tokens, model.encoder.hidden_size)
        need(tuple(found.shape) == wanted, f"the encoder gives rows {list(found.shape)}, promised are {list(wanted)}")
        need(bool(found.isfinite().all()), "the encoder's rows are not all finite")
        need(model.encoder.cost(feature) >= 1, f"Encoder.cost gives {model.encoder.cost(feature)}, want 1 or more")
    _check_placed(bench, request, features)


def _check_ranges(bench: Workbench, request: PreparedRequest) -> None:
    """Where placeholders stand: `expand`'s ids, in order, with as many rows as are placed."""
    cross = bench.model.fusion.kind == "cross_attention"
    ids = request.user_token_ids
    for found in request.media:
        given, mask = bench.model.processor.expand(found.feature)
        need(len(given) == len(mask), f"expand() gives {len(given)} ids and a mask of {len(mask)}")
        if cross:
            need(not given, f"expand() gives {len(given)} ids, where cross-attention reads the rows")
            continue
        placed, wanted = sum(map(bool, mask)), found.feature.num_placed
        need(placed == wanted, f"expand() marks {placed} tokens for rows, the feature promises {wanted}")
        need(tuple(ids[found.offset : found.end]) == tuple(given), "the prompt does not hold what expand() gives")
    for one, two in pairwise(request.media):
        need(one.end <= two.offset or cross, "placeholder ranges overlap")


def _check_placed(bench: Workbench, request: PreparedRequest, features: Sequence[MediaFeature]) -> None:
    """How wide rows are where the decoder takes them, and how many keys a source has."""
    import torch

    model, source = bench.model, request.source
    if callable(condition := getattr(model.fusion, "condition", None)):
        with torch.inference_mode():
            rows = [r.to(model.device) for r in bench.encode(features)]
            placed = condition(rows, [request.instruction] * len(rows))
        wanted = [(f.num_placed, model.decoder.hidden_size) for f in features]
        need([tuple(p.shape) for p in placed] == wanted, f"condition() gives {[tuple(p.shape) for p in placed]}")
    elif model.fusion.kind != "cross_attention":
        widths = model.encoder.hidden_size, model.decoder.hidden_size
        need(widths[0] == widths[1], f"encoder rows are {widths[0]} wide, the decoder takes {widths[1]}")
    if source is not None:
        total = sum(f.num_tokens for f in features) if not source.token_ids else len(source.token_ids)
        need(source.num_tokens == total, f"the source has {source.num_tokens} keys for {total} rows")


# -- order


def check_order(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Pairs of one size through the encoder both ways round; then the case's own items, backwards."""
    for modality, values in case.items.items():
        pair = [values[0], varied(modality, values[0], 3)]
        made = [bench.prepared(case.with_items({**case.items, modality: [v, *values[1:]]})) for v in pair]
        a, b = (next(r.feature for r in request.media if r.feature.modality == modality) for request in made)
        _check_pair(bench, a, b)
        if len(values) > 1:
            _check_swapped(bench, case, modality)
    return {}


def _check_pair(bench: Workbench, a: MediaFeature, b: MediaFeature) -> None:
    import torch

    (alone_a,), (alone_b,) = bench.encode([a]), bench.encode([b])
    tolerance = bench.settings.rows_tolerance

    def close(x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance)

    need(not close(alone_a, alone_b), "other media give the same encoder rows")
    for pack, wanted in (([a, b], [alone_a, alone_b]), ([b, a], [alone_b, alone_a])):
        rows = bench.encode(pack)
        if len(rows) == 2 and close(rows[0], wanted[1]) and close(rows[1], wanted[0]):
            raise AssertionError("the encoder gives the rows of two media in the wrong order")
        for found, expected in zip(rows, wanted, strict=True):
            need(close(found, expected), "the encoder's rows of two media differ from the rows of each alone")


def _check_swapped(bench: Workbench, case: Case, modality: Modality) -> None:
    swapped = case.with_items({**case.items, modality: case.items[modality][::-1]}, "swapped")
    forth, back = (
        [r.feature for r in bench.prepared(c).media if r.feature.modality == modality] for c in (case, swapped)
    )
    for one, two in zip(forth, reversed(back), strict=True):
        need(same_feature(one, two), f"{modality}s swapped in the request are not swapped in the prompt")
    same = bench.alone(case).token_ids == bench.alone(swapped).token_ids
    need(not same, f"{modality}s swapped give the same answer")


# -- keys


def check_keys(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """Keys of the case, of copies of it, and of what differs from it in one thing."""
    keys = _keys(bench.prepared(case))
    again = case.with_items({m: [copy.deepcopy(v) for v in values] for m, values in case.items.items()})
    need(_keys(bench.prepared(again)) == keys, "equal media have other keys the second time")
    other = _keys(bench.prepared(bench.other(case, 5)))
    need(not set(keys) & set(other), "other media have the same key")
    salted = _keys(bench.prepared(case, salt="another"))
    need(not set(keys) & set(salted), "another cache salt gives the same key")
    if bench.settings.other_kwargs:
        asked = replace(case, processor_kwargs=bench.settings.other_kwargs)
        need(not set(keys) & set(_keys(bench.prepared(asked))), f"{bench.settings.other_kwargs} give the same key")
    _check_settings(bench, case)
    return {}


def _keys(request: PreparedRequest) -> list[bytes]:
    return [r.feature.key for r in request.media]


class _Changed:
    """A checkpoint with other preprocessing settings."""

    def __init__(self, checkpoint: Any, part: str, settings: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self.processor_config = {**checkpoint.processor_config, part: settings}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def _check_settings(bench: Workbench, case: Case) -> None:
    """`settings_key` is the same each time, and another where a setting of the checkpoint changes features."""
    checkpoint, processor = bench.model.checkpoint, bench.model.processor
    again = bench.build_processor(checkpoint)
    need(again.settings_key == processor.settings_key, "settings_key is another one the second time")
    items = bench.loaded(case)
    features = [processor.prepare(item, variant) for item, variant in items]
    for part, settings in checkpoint.processor_config.items():
        for name, value in settings.items():
            for changed in _changes(value):
                try:
                    new = bench.build_processor(_Changed(checkpoint, part, {**settings, name: changed}))
                    found = [new.prepare(item, variant) for item, variant in items]
                except Exception:  # settings that make no sense
                    continue
                same = all(map(same_feature, features, found))
                need(same or new.settings_key != processor.settings_key,
                     f"{part}: {name}={changed!r} changes the features and not settings_key")  # fmt: skip


def _changes(value: Any) -> Iterator[Any]:
    """Values of the same kind."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, value / 2 if isinstance(value, float) else value // 2)
    elif isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
        yield [v / 2 for v in value]
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from ({**value, name: changed} for changed in _changes(inner))


# -- threads


def check_threads(bench: Workbench, case: Case) -> Mapping[str, str | None]:
    """`prepare` is pure: the same bytes again, and from many threads at once; what it is given stays as it is."""
    processor = bench.model.processor
    others = [bench.other(case, seed) for seed in (5, 6, 7)]
    items = [pair for c in (case, *others) for pair in bench.loaded(c)]
    before = [_content(item) for item, _ in items]
    wanted = [processor.prepare(*pair) for pair in items]
    for feature, pair in zip(wanted, items, strict=True):
        need(same_feature(feature, processor.prepare(*pair)), "prepare() gives other features the second time")
    barrier = threading.Barrier(_THREADS, timeout=60)

    def work(start: int) -> list[tuple[int, MediaFeature]]:
        barrier.wait()
        order = [(start + i) % len(items) for i in range(_ROUNDS * len(items))]
        return [(i, processor.prepare(*items[i])) for i in order]

    with ThreadPoolExecutor(_THREADS) as pool:
        for made in pool.map(work, range(_THREADS)):
            for index, feature in made:
                need(same_feature(feature, wanted[index]), "prepare() gives other features among threads")
    need([_content(item) for item, _ in items] == before, "prepare() changes the media it is given")
    return {}


def _content(item: MediaItem) -> bytes:
    data = item.data
    return bytes(data.tobytes())
