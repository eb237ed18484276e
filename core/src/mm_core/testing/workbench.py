"""What rungs run on: engines of one checkpoint, each with its own settings, and the answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mm_core.config import KvCacheConfig, SamplingParams
from mm_core.engine.engine import Engine
from mm_core.hashing import get_hasher
from mm_core.hookspecs import MediaRequest, Processor
from mm_core.inputs.fetch import Fetcher
from mm_core.media.decode import MediaLimits
from mm_core.media.video import VideoSampling
from mm_core.plugins import Owner, PluginRegistry
from mm_core.testing.case import Case
from mm_core.testing.media import varied
from mm_core.types import MediaFeature, MediaItem, Modality, PreparedRequest, RequestOutput

if TYPE_CHECKING:
    from torch import Tensor

    from mm_core.engine.loading import LoadedModel

LOGPROBS = 8
MAX_NUM_SEQS = 32  # few graphs to capture, where there is a GPU


@dataclass(frozen=True)
class Settings:
    """What a `Conformance` class says of its plugin, as rungs need it. Its attributes are told there."""

    cases: Sequence[Case]
    plugins: Sequence[Any] | None
    reference: Callable[[Path, Case], Any] | None
    max_tokens: int
    logits_tolerance: float
    rows_tolerance: float
    distinct_tokens: int
    num_blocks: int
    device: str
    other_kwargs: Mapping[str, Any] | None
    seed: int


def need(fact: bool, text: str) -> None:
    """Raise AssertionError with `text` unless `fact`: no test runner has to rewrite anything."""
    __tracebackhide__ = True  # pytest shows who asked
    if not fact:
        raise AssertionError(text)


@dataclass(eq=False)
class Workbench:
    """Engines are made when a rung asks for them, and shared by its cases; `close` ends them all.

    Every engine prepares media in one thread, so that what a rung finds does not depend on luck; `threads`
    is the rung about threads.
    """

    path: Path
    settings: Settings
    _engines: dict[str, Engine] = field(default_factory=dict)
    _answers: dict[int, RequestOutput] = field(default_factory=dict)
    _variants: dict[tuple[int, int], Case] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        # Float32 is to mean float32 on a GPU, too.
        flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
        self._tf32 = [(flag, flag.allow_tf32) for flag in flags]
        for flag in flags:
            flag.allow_tf32 = False

    def engine(self, name: str, **options: Any) -> Engine:
        """The engine of that name, made with these options if there is none."""
        if name not in self._engines:
            reuse, kv_dtype = options.pop("reuse", False), options.pop("kv_dtype", "auto")
            given = {
                "kv_cache_config": KvCacheConfig(
                    num_blocks=self.settings.num_blocks, enable_block_reuse=reuse, dtype=kv_dtype
                ),
                "device": self.settings.device,
                "dtype": "float32",
                "preprocess_threads": 1,
                "max_num_seqs": MAX_NUM_SEQS,
                "overlap": False,
                "show_progress": False,
                "plugins": self.settings.plugins,
            }
            self._engines[name] = Engine.from_pretrained(self.path, **{**given, **options})
        return self._engines[name]

    def close(self) -> None:
        """End all engines. Idempotent."""
        while self._engines:
            self._engines.popitem()[1].close()
        for flag, was in self._tf32:
            flag.allow_tf32 = was
        self._tf32.clear()

    # -- answers

    def params(self, **changes: Any) -> SamplingParams:
        """Greedy, of a fixed number of tokens."""
        given = {"max_tokens": self.settings.max_tokens, "temperature": 0, "ignore_eos": True}
        return SamplingParams(**{**given, **changes})

    def ask(self, engine: Engine, case: Case, **changes: Any) -> RequestOutput:
        """One case's answer."""
        (output,) = self.ask_all(engine, [case], **changes)
        return output

    def ask_all(self, engine: Engine, cases: Sequence[Case], **changes: Any) -> list[RequestOutput]:
        """The answers to cases that share batches."""
        templates = {case.chat_template for case in cases}
        need(len(templates) == 1, "cases with and without chat_template cannot share a list")
        prompts = [case.text_prompt() for case in cases]
        return engine.generate(prompts, self.params(**changes), apply_chat_template=templates.pop())

    @property
    def plain(self) -> Engine:
        """Reuses no KV, batches nothing, runs steps one by one without graphs: what all others must equal."""
        return self.engine("plain", cuda_graphs=False)

    def alone(self, case: Case) -> RequestOutput:
        """The case's answer from the plain engine, asked for once."""
        if id(case) not in self._answers:
            self._answers[id(case)] = self.ask(self.plain, case, logprobs=LOGPROBS)
            self.memo[f"case {id(case)}"] = case  # kept, so that its id stays its own
        return self._answers[id(case)]

    def other(self, case: Case, seed: int = 1) -> Case:
        """The case with other media of the same shapes."""
        key = (id(case), seed)
        if key not in self._variants:
            items = {m: [varied(m, v, seed + 10 * i) for i, v in enumerate(vs)] for m, vs in case.items.items()}
            self._variants[key] = case.with_items(items, f"with media {seed}")
            self.memo[f"case {id(case)}"] = case
        return self._variants[key]

    # -- parts of the plugin

    @property
    def model(self) -> LoadedModel:
        """What the plugin built for the plain engine."""
        return cast("LoadedModel", self.plain._frontend.model)  # it runs in this process

    @cached_property
    def _registry(self) -> tuple[PluginRegistry, Owner]:
        registry = PluginRegistry(self.settings.plugins or ())
        return registry, registry.resolve(self.model.checkpoint.architectures)

    @property
    def plugin(self) -> Any:
        """The module or object that serves the checkpoint."""
        registry, owner = self._registry
        return registry._manager.get_plugin(owner.plugin)

    def build_processor(self, checkpoint: Any) -> Processor:
        """Another processor of the plugin's."""
        registry, owner = self._registry
        made: Processor = registry.call_owner("mm_processor", owner, family=owner.family.name, checkpoint=checkpoint)
        return made

    def prepared(self, case: Case, salt: str | None = None) -> PreparedRequest:
        """The request as the scheduler gets it."""
        pipeline = self.plain._frontend.pipeline
        return pipeline.submit("kit", case.text_prompt(salt), self.params(), case.chat_template).result(60)

    def loaded(self, case: Case) -> list[tuple[MediaItem, bytes]]:
        """Every item as `prepare` gets it, with its variant."""
        processor = self.model.processor
        counts: dict[Modality, int] = {m: len(values) for m, values in case.items.items()}
        request = MediaRequest(counts, case.processor_kwargs or {})
        sampling = getattr(processor, "video_sampling", lambda _: VideoSampling())(request)
        fetcher = Fetcher(get_hasher("xxh3_128"), MediaLimits())
        rate = getattr(processor, "sampling_rate", None)
        items = [
            fetcher.fetch(m, value, sampling, sampling_rate=rate).load()
            for m, values in case.items.items()
            for value in values
        ]
        return [(item, processor.variant(replace(item, data=None), request)) for item in items]

    def encode(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """The encoder's rows of these features, in one pass."""
        import torch

        device = self.model.device
        moved = [replace(f, tensors={k: t.to(device) for k, t in f.tensors.items()}) for f in features]
        with torch.inference_mode():
            return [rows.cpu() for rows in self.model.encoder(moved)]


def same_feature(a: MediaFeature, b: MediaFeature) -> bool:
    """Whether two features are equal bit by bit, keys aside."""
    import torch

    plain = (a.modality, a.num_tokens, a.num_fused, set(a.tensors)) == (
        b.modality,
        b.num_tokens,
        b.num_fused,
        set(b.tensors),
    )
    return (
        plain and _equal(dict(a.info), dict(b.info)) and all(torch.equal(t, b.tensors[k]) for k, t in a.tensors.items())
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if hasattr(a, "shape") or hasattr(b, "shape"):
        return np.array_equal(np.asarray(a), np.asarray(b))
    return bool(a == b)
