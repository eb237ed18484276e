"""Qwen2-VL whose encoder fails in ways that end or hang its process, by the size of the picture, and whose answers hold
none of some tokens. Asked by an environment variable, a witness of what is unpickled in the process that imports it."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import mm_plugin_qwen2vl
from mm_core.hookspecs import BuildContext, Checkpoint, Encoder, Processor, SamplingDefaults, hookimpl
from mm_plugin_qwen2vl import mm_families as mm_families
from mm_plugin_qwen2vl import mm_fusion as mm_fusion

WITNESS = "MM_TEST_WITNESS"  # names a file
EXITS, HANGS, BREAKS = (28, 112), (28, 140), (28, 168)  # width and height of pictures
NEVER = range(30, 300)  # tokens
MARK = 14  # pixels of a patch's side


def watch_unpickling(path: str) -> None:
    """Write the name of every class that is unpickled from now on to a file."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {args}\n")

    sys.addaudithook(hook)


if WITNESS in os.environ:
    watch_unpickling(os.environ[WITNESS])


def never(logits: Any, rows: Any) -> Any:
    """A logits processor that is a function, so that it cannot cross."""
    logits[:, NEVER.start : NEVER.stop] = -float("inf")
    return logits


@hookimpl
def mm_processor(family: str, checkpoint: Checkpoint) -> Processor:
    """The real one, with a logits processor for every request."""
    processor: Any = mm_plugin_qwen2vl.mm_processor(family=family, checkpoint=checkpoint)
    processor.default_sampling = lambda: SamplingDefaults(logits_processors=(never,))
    return processor  # type: ignore[no-any-return]


@hookimpl
def mm_encoder(family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:
    """The real one, with what comes before its pass."""
    encoder: Any = mm_plugin_qwen2vl.mm_encoder(family=family, checkpoint=checkpoint, context=context)
    forward, cost = encoder.forward, encoder.cost

    def size(feature: Any) -> tuple[int, int]:
        _, rows, columns = feature.info["grid_thw"]
        return columns * MARK, rows * MARK

    def troubled(features: Any) -> Any:
        sizes = {size(feature) for feature in features}
        if EXITS in sizes:
            os._exit(9)
        if HANGS in sizes:
            time.sleep(3600)
        return forward(features)

    def priced(feature: Any) -> int:
        if size(feature) == BREAKS:
            raise RuntimeError("the scheduler's loop asks this")
        return int(cost(feature))

    encoder.forward, encoder.cost = troubled, priced
    return encoder  # type: ignore[no-any-return]
