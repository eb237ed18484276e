"""The conformance kit: a right plugin climbs the whole ladder; for each rung a plugin that fails it and no other."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mm_core
from mm_core import hookimpl
from mm_core.cli.new_plugin import write_plugin
from mm_core.decoders import LlamaConfig, LlamaDecoder, llama_weight_map
from mm_core.hookspecs import DecoderSpec, SamplingDefaults
from mm_core.testing import RUNGS, Answer, Case, Conformance, Result, check_plugin, clip, frames, picture, sound
from mm_core.testing.media import of_many_sizes, varied
from mm_core.testing.workbench import Workbench

FAMILY = "smallest"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Conformance]]:
    """The tests of the plugin that `mm new-plugin` writes."""
    path = write_plugin(FAMILY, tmp_path_factory.mktemp("new"))
    spec = importlib.util.spec_from_file_location("kit_of_smallest", path / "tests" / "test_conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path / "src"))
    try:
        spec.loader.exec_module(module)
        yield module.TestSmallest
    finally:
        sys.path.remove(str(path / "src"))
        for name in [name for name in sys.modules if name.startswith(f"mm_plugin_{FAMILY}")]:
            del sys.modules[name]


def part(name: str) -> ModuleType:
    return importlib.import_module(f"mm_plugin_{FAMILY}.{name}")


class Plugin:
    """The right plugin, but for the parts that are given."""

    def __init__(self, processor: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        self.processor = processor or part("processor").SmallestProcessor
        self.encoder = encoder or part("encoder").SmallestEncoder
        self.decoder = decoder or LlamaDecoder

    @hookimpl
    def mm_families(self) -> Any:
        return importlib.import_module(f"mm_plugin_{FAMILY}").mm_families()

    @hookimpl
    def mm_processor(self, family: str, checkpoint: Any) -> Any:
        return self.processor(checkpoint)

    @hookimpl
    def mm_encoder(self, family: str, checkpoint: Any, context: Any) -> Any:
        return self.encoder(checkpoint, context)

    @hookimpl
    def mm_fusion(self, family: str, checkpoint: Any) -> Any:
        return part("fusion").SmallestFusion()

    @hookimpl
    def mm_decoder(self, family: str, checkpoint: Any) -> DecoderSpec:
        config = LlamaConfig.from_text_config(checkpoint.text_config)
        return DecoderSpec(partial(self.decoder, config), llama_weight_map(), config.max_position_embeddings)


def climb(kit: type[Conformance], directory: Path, *plugins: Any, **attributes: Any) -> list[Result]:
    return check_plugin(type("Kit", (kit,), {"plugins": list(plugins), **attributes})(), directory)


# --- one broken plugin a rung


def eager(directory: Path) -> Any:
    """A module that imports torch to tell its families."""
    (directory / "eager_plugin.py").write_text(f"import torch\nfrom mm_plugin_{FAMILY} import *\n")
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("eager_plugin")
    finally:
        sys.path.remove(str(directory))


def miscounting(directory: Path) -> Any:
    class Processor(part("processor").SmallestProcessor):
        def prepare(self, item: Any, variant: bytes) -> Any:
            """One row too few for tall pictures."""
            feature = super().prepare(item, variant)
            width, height = item.data.size
            tall = height > 2 * width
            return type(feature)("image", feature.num_tokens - 1, feature.tensors) if tall else feature

    return Plugin(processor=Processor)


def unordered(directory: Path) -> Any:
    class Encoder(part("encoder").SmallestEncoder):
        def forward(self, features: Any) -> Any:
            """Sorted for the pass, and never sorted back: pairs of one size come out the wrong way round."""
            rows = super().forward(features)
            return rows[::-1] if len(rows) == 2 and rows[0].shape == rows[1].shape else rows

    return Plugin(encoder=Encoder)


def keyless(directory: Path) -> Any:
    class Processor(part("processor").SmallestProcessor):
        def __init__(self, checkpoint: Any) -> None:
            super().__init__(checkpoint)
            self.settings_key = b"constant"

    return Plugin(processor=Processor)


def racing(directory: Path) -> Any:
    class Processor(part("processor").SmallestProcessor):
        def prepare(self, item: Any, variant: bytes) -> Any:
            """A buffer that all threads share."""
            feature = super().prepare(item, variant)
            self.buffer = feature.tensors["pixels"]
            time.sleep(0.001)
            return type(feature)("image", feature.num_tokens, {"pixels": self.buffer})

    return Plugin(processor=Processor)


def upset_when(told: Callable[[np.ndarray, np.ndarray], bool]) -> Any:
    """A decoder that gives nonsense where `told(lengths, starts)` of the step's sequences is true."""

    class Decoder(LlamaDecoder):
        def forward(self, inputs_embeds: Any, positions: Any, context: Any) -> Any:
            hidden = super().forward(inputs_embeds, positions, context)
            table = context.tables["self"]
            lengths = np.diff(table.cu_seqlens_q.numpy())
            return -hidden if told(lengths, table.kv_lens.numpy()[: len(lengths)] - lengths) else hidden

    return Plugin(decoder=Decoder)


def forgetful(directory: Path) -> Any:
    """Loses a prefix that comes from the cache: whole blocks, and then the rest of a prompt."""
    return upset_when(lambda lengths, starts: bool(((lengths > 1) & (starts > 0) & (starts % 16 == 0)).any()))


def crowded(directory: Path) -> Any:
    """Mixes sequences up where there are many."""
    return upset_when(lambda lengths, starts: len(lengths) > 2)


def unchunked(directory: Path) -> Any:
    """Loses a prompt between two of its chunks; a prefix that comes from the cache, whole blocks or not, it keeps."""
    ended: list[int] = []  # where the chunks of the step before did

    def goes_on(lengths: np.ndarray, starts: np.ndarray) -> bool:
        again = bool(((lengths > 1) & np.isin(starts, ended)).any())
        ended[:] = (starts + lengths)[lengths > 1]
        return again

    return upset_when(goes_on)


def unquantised(directory: Path) -> Any:
    """Takes no notice of the scales of an fp8 cache."""

    class Decoder(LlamaDecoder):
        def forward(self, embeds: Any, positions: Any, context: Any) -> Any:
            scaled = [layer.scales for layer in context.caches["self"] if layer.scales is not None]
            if scaled and int(context.tables["self"].cu_seqlens_q.diff().max()) == 1:
                for scales in scaled:
                    for exponents in scales:
                        exponents.fill_(127)
            return super().forward(embeds, positions, context)

    return Plugin(decoder=Decoder)


def piecewise(directory: Path) -> Any:
    class Tokenizer:
        """Decodes a whole to something else than its pieces."""

        def __init__(self, tokenizer: Any) -> None:
            self.inner = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

        def decode(self, ids: Any, **options: Any) -> str:
            return f"{len(ids)}:{self.inner.decode(ids, **options)}"

    class Processor(part("processor").SmallestProcessor):
        def __init__(self, checkpoint: Any) -> None:
            super().__init__(checkpoint)
            self.tokenizer = Tokenizer(self.tokenizer)

    return Plugin(processor=Processor)


class Meddling:
    """A family's logits processor that writes into what it is told of the answer so far."""

    def __call__(self, logits: Any, rows: Any) -> Any:
        rows.output_token_ids.fill_(0)
        return logits


def meddling(directory: Path) -> Any:
    class Processor(part("processor").SmallestProcessor):
        def default_sampling(self) -> SamplingDefaults:
            return SamplingDefaults(logits_processors=(Meddling(),))

    return Plugin(processor=Processor)


def crashing(directory: Path) -> Any:
    class Processor(part("processor").SmallestProcessor):
        def prepare(self, item: Any, variant: bytes) -> Any:
            width, height = item.data.size
            _ = 1 // (max(100 * height // width, 1) // 2)  # of very wide pictures nothing is left
            return super().prepare(item, variant)

    return Plugin(processor=Processor)


def different(directory: Path) -> Any:
    class Encoder(part("encoder").SmallestEncoder):
        def forward(self, features: Any) -> Any:
            return [rows * 1.02 for rows in super().forward(features)]

    return Plugin(encoder=Encoder)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "declared": eager, "counts": miscounting, "order": unordered, "keys": keyless, "threads": racing,
    "cached": forgetful, "batched": crowded, "chunked": unchunked, "fp8": unquantised, "streamed": piecewise,
    "logits_processors": meddling, "bad_inputs": crashing, "parity": different,
}  # fmt: skip


def test_there_is_a_broken_plugin_for_each_rung() -> None:
    assert list(BROKEN) == list(RUNGS)


def test_the_right_plugin_passes_every_rung(kit: type[Conformance], tmp_path: Path) -> None:
    results = climb(kit, tmp_path, importlib.import_module(f"mm_plugin_{FAMILY}"))
    assert [(r.rung, r.case, r.error) for r in results if r.error is not None] == []
    assert {r.rung for r in results} == set(RUNGS)
    found = {feature for r in results for feature, reason in r.findings.items() if reason is None}
    assert found == {"overlapped scheduling", "chunked prefill", "KV reuse", "encoder reuse", "logits processors",
                     "streaming", "fp8 KV"}  # fmt: skip


# Each climbs all rungs, for seconds; the two that break most easily are in every run.
EACH = [pytest.param(rung, marks=() if rung in ("parity", "keys") else pytest.mark.slow) for rung in BROKEN]


@pytest.mark.parametrize("rung", EACH)
def test_a_broken_plugin_fails_its_rung_and_no_other(kit: type[Conformance], tmp_path: Path, rung: str) -> None:
    plugin = BROKEN[rung](tmp_path)
    (tmp_path / "checkpoint").mkdir()
    results = climb(kit, tmp_path / "checkpoint", plugin, cases=kit.cases[1:], max_tokens=10)
    failed = {r.rung: str(r.error) for r in results if r.error is not None}
    assert set(failed) == {rung}, failed
    assert len(failed[rung]) > 20, "the failure says too little"
    assert {r.rung for r in results} == set(RUNGS)


# --- what makes a rung worth something


@pytest.mark.parametrize(
    ("rung", "option", "told"),
    [("cached", "reuse", "no token came from the KV cache"), ("chunked", "max_num_batched_tokens", "was not chunked"),
     ("batched", "overlap", "steps in flight")],
)  # fmt: skip
def test_a_rung_whose_path_is_not_taken_fails(
    kit: type[Conformance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str, option: str, told: str
) -> None:
    make = Workbench.engine
    monkeypatch.setattr(
        Workbench,
        "engine",
        lambda self, name, **options: make(self, name, **{k: v for k, v in options.items() if k != option}),
    )
    plugin = importlib.import_module(f"mm_plugin_{FAMILY}")
    (result,) = climb(kit, tmp_path, plugin, cases=kit.cases[1:2], rungs=(rung,))
    assert told in str(result.error)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [([7] * 12, "repeats itself"), ([*range(12)], "the reference's"), ([1, 2, 3, 4, 5], "tokens are")],
)
def test_references_that_prove_nothing_or_something_else(
    kit: type[Conformance], tmp_path: Path, tokens: list[int], told: str
) -> None:
    plugin = importlib.import_module(f"mm_plugin_{FAMILY}")
    wrong = {"reference": lambda self, path, case: Answer(tokens)}
    (result,) = climb(kit, tmp_path, plugin, cases=kit.cases[:1], rungs=("parity",), **wrong)
    assert isinstance(result.error, AssertionError)
    assert told in str(result.error)


def test_which_rungs_apply() -> None:
    class Kit(Conformance):
        cases = (
            Case("one", "a", {"image": picture(1)}),
            Case("more", "b", {"image": [picture(1)] * 2, "video": clip(1)}, parity=False),
            Case("text", "c", {"image": []}),
        )

    class WithReference(Kit):
        def reference(self, path: Path, case: Case) -> Answer:
            raise AssertionError("not asked for here")

    def names(cls: type[Conformance], rung: str) -> list[str]:
        return [case.name for found, case in cls.ladder() if found.name == rung]

    assert names(Kit, "parity") == []
    assert names(WithReference, "parity") == ["one", "text"]
    assert names(Kit, "declared") == names(Kit, "bad_inputs") == ["one"]
    assert names(Kit, "order") == ["one", "more"]
    assert names(Kit, "chunked") == ["one", "more", "text"]
    assert [case.kinds for case in Kit.cases] == [("image",), ("several images", "video"), ("text",)]
    with pytest.raises(NotImplementedError, match="checkpoint"):
        Kit().checkpoint(Path())


@pytest.mark.parametrize(
    ("modality", "value", "shape"),
    [("image", picture(1, 30, 20), (20, 30, 3)), ("video", clip(1, 3, 30, 20), (3, 20, 30, 3)),
     ("video", frames(1, 3, 30, 20), (3, 20, 30, 3)), ("video", (frames(1, 3, 30, 20), 2.0), (3, 20, 30, 3)),
     ("audio", sound(1, 0.5), (8000,))],
)  # fmt: skip
def test_other_media_have_the_same_shape(modality: Any, value: Any, shape: tuple[int, ...]) -> None:
    def content(item: Any) -> np.ndarray:
        return np.asarray(item["frames"] if isinstance(item, dict) else item[0] if isinstance(item, tuple) else item)

    one, two = varied(modality, value, 1), varied(modality, value, 2)
    assert type(one) is type(value)
    assert content(one).shape == content(two).shape == content(value).shape == shape
    assert not np.array_equal(content(one), content(value))
    assert not np.array_equal(content(one), content(two))
    assert np.array_equal(content(one), content(varied(modality, value, 1)))


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_items_of_many_sizes(modality: Any) -> None:
    def size(item: Any) -> Any:
        return item.size if modality == "image" else item["frames"].shape if modality == "video" else len(item[0])

    sizes = [size(item) for item in of_many_sizes(modality, 3)]
    assert len(set(sizes)) == len(sizes) >= 4
    assert sizes == [size(item) for item in of_many_sizes(modality, 3)]


def test_the_kit_needs_no_pytest() -> None:
    code = "import sys, mm_core.testing; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_nothing_in_the_core_imports_the_kit() -> None:
    package = Path(mm_core.__file__).parent
    files = [path for path in package.rglob("*.py") if "testing" not in path.parts]
    assert len(files) > 50
    assert [path.name for path in files if "mm_core.testing" in path.read_text(encoding="utf-8")] == []
