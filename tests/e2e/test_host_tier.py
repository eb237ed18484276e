"""Blocks and rows that leave the device and come back, by way of host memory and disk: the tokens stay the same.

Every test asserts first that the path it is about was taken.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import restore
from support.e2e import check_message, settle
from support.pictures import picture

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.cache.disk_file import DiskFile
from mm_core.engine.keeping import DiskKeeper
from mm_core.errors import ConfigError, MMError, OutOfMemoryError
from mm_core.runner.transfers import TransfersRunner
from mm_core.scheduler.policy import POLICIES

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def prompts(count: int = 10) -> list[TextPrompt]:
    """As many pictures, more than the device's blocks hold together."""
    return [
        TextPrompt(
            prompt=f"<|im_start|>user\n{IMAGE}Describe image {i} for me.",
            multi_modal_data={"image": picture(i, 150, 100)},
        )
        for i in range(count)
    ]


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def start(path: Path, num_blocks: int = 16, host: int = 4 * 2**20, **options: Any) -> Engine:
    cache = {k: options.pop(k) for k in list(options) if k.startswith(("host_", "disk_", "dtype"))}
    kv = KvCacheConfig(num_blocks=num_blocks, host_cache_size=host, **cache)
    options = {"encoder_cache_tokens": 64, "show_progress": False, "device": "cpu"} | options
    return Engine.from_pretrained(path, kv_cache_config=kv, **options)


@pytest.fixture(autouse=True)
def _always_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as small as this one computes faster than it copies."""
    always = replace(POLICIES["reuse"], restores=lambda *_: True)
    monkeypatch.setitem(POLICIES, "reuse", always)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted(tiny_path: Path) -> list[tuple[int, ...]]:
    """Each prompt alone, without reuse."""
    kv = KvCacheConfig(num_blocks=512, enable_block_reuse=False)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False, device="cpu") as engine:
        found = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts()]
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_left_the_device_comes_back(
    tiny_path: Path, wanted: list[tuple[int, ...]], checksums: bool, overlap: bool
) -> None:
    with start(tiny_path, host_cache_checksums=checksums, overlap=overlap) as engine:
        assert tokens([engine.generate(prompt, GREEDY)[0] for prompt in prompts()]) == wanted
        first = engine.stats()
        assert first["host_cache"]["offloaded"] > 0
        assert first["host_cache"]["restored"] == 0
        assert tokens([engine.generate(prompt, GREEDY)[0] for prompt in prompts()]) == wanted
        assert tokens(engine.generate(prompts(), GREEDY)) == wanted
        stats = engine.stats()["host_cache"]
        assert stats["restored_tokens"] > 0
        assert stats["damaged"] == 0
        settle(engine)


def test_damage_is_found_and_computed_again(tiny_path: Path, wanted: list[tuple[int, ...]]) -> None:
    with start(tiny_path, host_cache_checksums=True) as engine:
        for prompt in prompts():
            engine.generate(prompt, GREEDY)
        settle(engine)
        memory = transfers_of(engine)._memory
        for slot in range(memory.num_slots):
            memory.slot(slot)[slot % memory.slot_bytes] ^= 0x10
        assert tokens([engine.generate(prompt, GREEDY)[0] for prompt in prompts()]) == wanted
        assert engine.stats()["host_cache"]["damaged"] > 0
        settle(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_left_the_device_comes_back(tiny_path: Path, tmp_path: Path) -> None:
    gpu = {"device": "cuda", "dtype": "float32"}
    kv = KvCacheConfig(num_blocks=512, enable_block_reuse=False)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False, **gpu) as engine:
        wanted = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts()]
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**24}
    for _ in range(2):
        with start(tiny_path, host_cache_checksums=True, **disk, **gpu) as engine:
            for _ in range(3):
                assert tokens([engine.generate(prompt, GREEDY)[0] for prompt in prompts()]) == wanted
                assert tokens(engine.generate(prompts(), GREEDY)) == wanted
            stats = engine.stats()
            assert stats["host_cache"]["restored_tokens"] > 0
            assert stats["host_cache"]["damaged"] == 0
            settle(engine)
    assert stats["host_cache"]["disk_hits"] > 0


def transfers_of(engine: Engine) -> TransfersRunner:
    return engine._frontend._core.runner.transfers


# -- disk --------------------------------------------------------------------------------------


def test_a_restart_finds_what_was_computed(tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path) -> None:
    disk = {"disk_cache_path": str(tmp_path / "kv"), "disk_cache_size": 16 * 2**20}
    with start(tiny_path, num_blocks=24, **disk) as engine:
        assert tokens(engine.generate(prompts(), GREEDY)) == wanted
    (file,) = (tmp_path / "kv").iterdir()
    assert stat.S_IMODE(os.stat(tmp_path / "kv").st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_size <= 16 * 2**20
    with start(tiny_path, num_blocks=256, **disk) as engine:
        assert engine.stats()["disk_cache"]["entries"] > 0
        outputs = engine.generate(prompts(), GREEDY)
        assert tokens(outputs) == wanted
        stats = engine.stats()
        assert stats["host_cache"]["disk_hits"] > 0
        assert stats["encoded_items"] < len(wanted), "a picture whose blocks are there is not encoded"
        assert all(output.usage.cached_tokens > 0 for output in outputs), "all of them were kept"
        settle(engine)


def test_another_model_or_setting_reads_none_of_it(tiny_path: Path, tmp_path: Path) -> None:
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**22}
    with start(tiny_path, **disk) as engine:
        engine.generate(prompts(2), GREEDY)
    for other in ({"hash_algorithm": "sha256"}, {"load_format": "dummy"}, {"load_format": "dummy", "seed": 1}):
        with start(tiny_path, **disk, **other) as engine:
            assert engine.stats()["disk_cache"]["entries"] == 0
    assert len(list(tmp_path.iterdir())) == 4
    with start(tiny_path, **disk) as engine:
        assert engine.stats()["disk_cache"]["entries"] > 0


def damage_contents(file: Path) -> None:
    """Flip a bit in each kilobyte behind the header and the records."""
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 4, len(data), 1024):
        data[at] ^= 4
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


@pytest.mark.parametrize("damage", [damage_contents, cut_short])
def test_a_damaged_file_costs_time_only(
    tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**22}
    with start(tiny_path, **disk) as engine:
        engine.generate(prompts(), GREEDY)
    (file,) = tmp_path.iterdir()
    damage(file)
    with start(tiny_path, num_blocks=256, **disk) as engine:
        assert tokens(engine.generate(prompts(), GREEDY)) == wanted
        settle(engine)


def test_a_foreign_file_is_left_alone(
    tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**22}
    with start(tiny_path, **disk):
        pass
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"somebody's diary" * 1000)
    with caplog.at_level(logging.WARNING), start(tiny_path, **disk) as engine:
        assert tokens(engine.generate(prompts(), GREEDY)) == wanted
        assert "disk_cache" not in engine.stats()
    assert "was not made by mm-core" in caplog.text
    assert file.read_bytes() == b"somebody's diary" * 1000


def test_a_second_engine_goes_without(tiny_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**22}
    with start(tiny_path, **disk) as first, caplog.at_level(logging.WARNING), start(tiny_path, **disk) as second:
        assert "disk_cache" in first.stats()
        assert "disk_cache" not in second.stats()
        one, two = (tokens(engine.generate(prompts(2), GREEDY)) for engine in (first, second))
        assert one == two
    assert "used by another engine" in caplog.text


def test_a_full_disk_is_told_of_once_and_hurts_nobody(
    tiny_path: Path,
    wanted: list[tuple[int, ...]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = threading.Event()
    real = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if begun.is_set():
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    disk = {"disk_cache_path": str(tmp_path), "disk_cache_size": 2**22}
    with caplog.at_level(logging.WARNING), start(tiny_path, **disk) as engine:
        begun.set()
        for _ in range(2):
            assert tokens(engine.generate(prompts(), GREEDY)) == wanted
        settle(engine)
    assert caplog.text.count("No space left on device") == 1


def test_ctrl_c_while_blocks_are_kept_closes_all_the_same(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: DiskKeeper, *args: Any) -> int:
        raise KeyboardInterrupt

    engine = start(tiny_path, disk_cache_path=str(tmp_path), disk_cache_size=2**22)
    engine.generate(prompts(2), GREEDY)
    memory = transfers_of(engine)._memory
    with monkeypatch.context() as patch:
        patch.setattr(DiskKeeper, "_write_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    assert memory.num_slots == 0, "given back"
    assert not [t for t in threading.enumerate() if t.name.startswith("mm-core-disk")]
    with start(tiny_path, disk_cache_path=str(tmp_path), disk_cache_size=2**22) as again:
        assert "disk_cache" in again.stats(), "the lock was given back"


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"host_cache_size": 2**20, "enable_block_reuse": False}, "enable_block_reuse=False reuses nothing"),
        ({"disk_cache_path": "kv"}, "needs host_cache_size.*set it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        KvCacheConfig(**options)
    check_message(caught.value)


def test_a_size_that_holds_nothing_names_the_least_one(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host_cache_size=1000\) is too small.*Use (\d+) or more") as caught:
        start(tiny_path, host=1000)
    check_message(caught.value)
    least = int(str(caught.value).split("Use ")[1].split()[0])
    with start(tiny_path, host=least) as engine:
        assert engine.generate(prompts(1), GREEDY)
    with pytest.raises(ConfigError, match=f"host_cache_size={least - 1}"):
        start(tiny_path, host=least - 1)


def test_a_directory_that_cannot_be_used_is_named(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for path in (file, link, Path("/proc/none")):
        with pytest.raises(ConfigError, match=r"disk_cache_path=.*cannot be used.*Give a directory"):
            start(tiny_path, disk_cache_path=str(path))
    assert not [t for t in threading.enumerate() if t.name.startswith(("mm-core-disk", "mm-core-engine"))]


def test_a_start_that_fails_gives_memory_and_file_back(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[DiskFile] = []
    real = DiskFile.open.__func__  # type: ignore[attr-defined]

    def note(cls: type[DiskFile], *args: Any) -> DiskFile | None:
        opened.append(real(cls, *args))
        return opened[-1]

    def refuse(*args: Any, **options: Any) -> None:
        raise OutOfMemoryError("No room. Lower something.")

    monkeypatch.setattr(DiskFile, "open", classmethod(note))
    for name in ("mm_core.engine.tiering.HostMemory", "mm_core.engine.loading.ModelRunner",
                 "mm_core.engine.loading.EngineCore"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            with pytest.raises(MMError, match="No room"):
                start(tiny_path, disk_cache_path=str(tmp_path))
        assert opened[-1]._descriptor == -1, name
        assert not [t for t in threading.enumerate() if t.name.startswith("mm-core-disk")]


@pytest.mark.slow
def test_the_benchmark_of_copies_finds_every_flip_and_no_difference() -> None:
    report = restore.main(["--device", "cpu", "--small", "--blocks", "300", "--round", "60", "--prompts", "10"])
    for part in ("integrity", "disk"):
        found = report[part]
        assert found["mismatches"] == found["false_alarms"] == 0
        assert found["caught"] == found["flipped"] > 0
    assert report["integrity"]["restored"] >= 300
    engine = report["engine"]
    assert engine["restored"] > engine["restored_before"] > 0
    assert engine["damaged"] > 0
    assert engine["passes_alike"] == engine["passes"]
    assert report["speed"]["picture restored, scattered"]["blocks"] == 60
