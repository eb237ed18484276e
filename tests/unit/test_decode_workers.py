"""Decoding in other processes: the same bits as in threads, and nothing that a file does reaches beyond it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.clips import film, picture, sound

from mm_core import errors
from mm_core.errors import (
    EngineClosedError,
    EngineError,
    InvalidParamsError,
    MediaDecodeError,
    MediaError,
    MediaTooLargeError,
    UnsupportedMediaError,
)
from mm_core.hashing import get_hasher
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits, VideoSampling, worker_main
from mm_core.media import workers as workers_module
from mm_core.media.decoder import LocalDecoder
from mm_core.media.wire import SLAB
from mm_core.media.workers import DecodeWorkers, WorkerSettings

LIMITS = MediaLimits(max_image_pixels=2**20)
FRAGILE = (str(Path(__file__).parents[1] / "support" / "fragile_worker.py"),)
UNPRIVILEGED = (str(Path(__file__).parents[1] / "support" / "unprivileged_worker.py"),)


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    made = DecodeWorkers(WorkerSettings(2, timeout_s=60.0), LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def fragile() -> Iterator[DecodeWorkers]:
    made = DecodeWorkers(WorkerSettings(1, 2**28, 3.0, FRAGILE), LIMITS)
    yield made
    made.close()


VALUES: list[tuple[Any, bytes]] = [
    *[("image", picture(kind, size)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP") for size in ((40, 30), (1, 9))],
    *[("audio", sound(kind=kind, channels=n)) for kind in ("WAV", "FLAC", "OGG", "MP3") for n in (1, 2)],
    ("audio", sound(rate=44100)), ("audio", sound()[:-500]),
    ("video", film()), ("video", film(1)), ("video", film(7, kind="matroska")),
    # more than the slab holds, encoded or decoded
    ("image", picture("BMP", (1000, 900))), ("image", picture("JPEG", (1000, 900))), ("audio", sound(40.0)),
    ("video", film(20, (640, 480))),
]  # fmt: skip


@pytest.mark.parametrize("rate", [None, 16000])
def test_the_same_bits_and_digests_as_in_threads(workers: DecodeWorkers, rate: int | None) -> None:
    hasher = get_hasher("xxh3_128")
    here, there = Fetcher(hasher, LIMITS), Fetcher(hasher, LIMITS, workers)
    for modality, data in VALUES:
        mine, theirs = (f.fetch(modality, data, sampling_rate=rate).item for f in (here, there))
        assert (mine.digest, mine.info) == (theirs.digest, theirs.info)
        assert np.array_equal(np.asarray(mine.data), np.asarray(theirs.data))
        assert theirs.data is not None
        if modality != "image":
            assert theirs.data.flags.writeable  # it belongs to whoever has it
        known = there.fetch(modality, data, sampling_rate=rate)
        assert known.item.data is None  # recognised by its bytes
        assert np.array_equal(np.asarray(known.load().data), np.asarray(mine.data))
    frames = [picture("JPEG", seed=n) for n in range(3)]
    mine, theirs = (f.fetch("video", frames).item for f in (here, there))
    assert (mine.digest, mine.info) == (theirs.digest, theirs.info)


def test_no_decoder_needs_more_than_it_may_have() -> None:
    """No threads, no files: as root, the bound on processes would not count."""
    made = DecodeWorkers(WorkerSettings(1, timeout_s=60.0, command=UNPRIVILEGED), LIMITS)
    try:
        fetcher = Fetcher(get_hasher("xxh3_128"), LIMITS, made)
        for modality, data in VALUES:
            assert fetcher.fetch(modality, data).item.data is not None
    finally:
        made.close()


@pytest.mark.parametrize("sampling", [VideoSampling(num_frames=4), VideoSampling(num_frames=40, spread=True)])
def test_frames_are_chosen_here(workers: DecodeWorkers, sampling: VideoSampling) -> None:
    mine, theirs = (d.video(film(), sampling) for d in (LocalDecoder(LIMITS), workers))
    assert np.array_equal(mine.frames, theirs.frames)
    assert (mine.fps, mine.sample_fps, mine.times) == (theirs.fps, theirs.sample_fps, theirs.times)


BAD: list[tuple[Any, bytes]] = [
    ("image", b""), ("image", picture()[:-40]), ("image", b"%PDF-1.7"), ("image", picture("BMP", (2000, 1000))),
    ("audio", b""), ("audio", sound(0.0)), ("audio", b"RIFF1234WAVE" + bytes(99)), ("audio", film()),
    ("audio", sound(8.0, 1000)), ("video", b""), ("video", film()[:900]), ("video", b"#EXTM3U\n"), ("video", picture()),
    ("video", film(400)),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(BAD)))
def test_the_same_errors_as_in_threads(at: int) -> None:
    modality, data = BAD[at]
    limits = MediaLimits(max_image_pixels=2**20, max_audio_seconds=5.0, max_source_frames=300)
    made = DecodeWorkers(WorkerSettings(1, timeout_s=60.0), limits)
    faults = []
    try:
        for decoder in (LocalDecoder(limits), made):
            with pytest.raises(MediaError) as caught:
                Fetcher(get_hasher("xxh3_128"), limits, decoder).fetch(modality, data)
            fault = caught.value
            faults.append((type(fault), fault.code, str(fault), fault.param))
        assert faults[0] == faults[1]
        assert made.image(picture())[0].size == (40, 30)  # the worker goes on
    finally:
        made.close()


def test_a_choice_that_is_refused(workers: DecodeWorkers) -> None:
    for _ in range(4):
        with pytest.raises(InvalidParamsError, match="num_frames=40"):
            workers.video(film(), VideoSampling(num_frames=40))
    assert workers.video(film(), VideoSampling(num_frames=4)).frames.shape[0] == 4


# -- what breaks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"abort", b"exit", b"raise", b"nonsense", b"hold", b"large", b"greedy", b"code", b"choose"]
)
def test_a_worker_that_breaks_fails_one_item(fragile: DecodeWorkers, data: bytes) -> None:
    with pytest.raises(MediaDecodeError, match="breaks the decoder") as caught:
        fragile.image(data)
    assert caught.value.code == "invalid_image"
    assert not re.search("0x|path|status", str(caught.value))
    assert fragile.image(picture())[0].size == (40, 30)


def test_a_sound_without_a_rate(fragile: DecodeWorkers) -> None:
    with pytest.raises(MediaDecodeError, match="breaks the decoder"):
        fragile.audio(b"rate", None)
    assert fragile.audio(sound(), None).rate > 0


def test_every_code_that_decoders_use_is_taken() -> None:
    """Of what workers tell: a code becomes a metric's label, so only these do."""
    root = Path(workers_module.__file__).parent
    texts = [(root / f"{name}.py").read_text(encoding="utf-8") for name in ("audio", "decode", "resize", "video")]
    used = {code for text in texts for code in re.findall(r'(?:code=|INVALID = )"(\w+)"', text)}
    assert len(used) >= 6
    used |= {getattr(errors, kind).code for kind in workers_module._KINDS}
    used |= {*worker_main._TOO_LARGE.values(), *(f"invalid_{kind}" for kind in ("image", "video", "audio"))}
    assert used == workers_module._CODES


def test_a_worker_is_given_memory_once_a_job(fragile: DecodeWorkers) -> None:
    """Each is a descriptor that is held to the job's end."""
    fragile.image(picture())
    given = []
    real = workers_module._shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "_shared", lambda nbytes: given.append(nbytes) or real(nbytes))
        with pytest.raises(MediaDecodeError):
            fragile.image(b"greedy")
    assert given == [3_000_000, SLAB]  # the result's, and the next worker's


def test_a_worker_that_was_taken_over_reaches_nothing() -> None:
    """In a process that hides itself, as a server does: no part of it, no connection, process, or file."""
    code = (
        "import sys\nfrom mm_core.confinement import hide\nfrom mm_core.media import MediaLimits\n"
        "from mm_core.media.workers import DecodeWorkers, WorkerSettings\nhide()\n"
        "made = DecodeWorkers(WorkerSettings(1, command=sys.argv[1:]), MediaLimits())\n"
        "try:\n    made.image(b'escape')\nexcept Exception as error:\n    print(f'<{error}>')\nmade.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *FRAGILE], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "<>"


def test_a_worker_that_takes_too_long(fragile: DecodeWorkers) -> None:
    fragile.image(picture())
    for data in (b"spin", b"sleep"):
        start = time.monotonic()
        with pytest.raises(MediaDecodeError, match="takes too long"):
            fragile.image(data)
        assert 2.5 < time.monotonic() - start < 12
    assert fragile.image(picture())[0].size == (40, 30)


def test_memory_is_bounded(fragile: DecodeWorkers) -> None:
    with pytest.raises(MediaTooLargeError) as caught:  # 2**20 × 1000 bytes, of 2**28
        Fetcher(get_hasher("xxh3_128"), LIMITS, fragile).fetch("image", b"memory")
    assert caught.value.code == "image_too_large"
    assert fragile.image(picture())[0].size == (40, 30)


def test_workers_may_do_next_to_nothing(fragile: DecodeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaDecodeError) as caught:
        fragile.image(b"limits")
    bounds, names = str(caught.value).split("] [")
    assert ast.literal_eval(bounds + "]") == [0, 0, 0, 64]
    assert "HOME" not in names  # what it was not given: keys may be in the environment


def test_many_threads_share_few_workers(workers: DecodeWorkers) -> None:
    data = [picture(seed=seed) for seed in range(20)]
    local = LocalDecoder(LIMITS)
    with ThreadPoolExecutor(8) as pool:
        for found, each in zip(pool.map(lambda d: bytes(workers.image(d)[1]), data), data, strict=True):
            assert found == local.image(each)[1]


def test_closing_frees_who_waits() -> None:
    made = DecodeWorkers(WorkerSettings(1, 2**28, 60.0, FRAGILE), LIMITS)
    made.image(picture())
    children = [worker._process.pid for worker in made._workers if worker._process]
    ends: list[BaseException] = []

    def ask(data: bytes) -> None:
        try:
            made.image(data)
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=ask, args=(data,)) for data in (b"sleep", b"sleep", picture())]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    made.close()
    for thread in threads:
        thread.join(10)
    assert [type(end) for end in ends] == [EngineClosedError] * 3
    made.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_no_descriptors_are_left(workers: DecodeWorkers) -> None:
    kept = [workers.image(picture()), workers.video(film(), VideoSampling())]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        kept.append(workers.image(picture()))
        with pytest.raises(UnsupportedMediaError):
            Fetcher(get_hasher("xxh3_128"), LIMITS, workers).fetch("image", b"nothing")
    del kept
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_worker_that_does_not_start() -> None:
    made = DecodeWorkers(WorkerSettings(1, command=("-c", "import sys; sys.exit(7)")), LIMITS)
    try:
        with pytest.raises(EngineError, match="does not start"):
            made.image(picture())
    finally:
        made.close()


def test_workers_end_with_their_parent() -> None:
    code = (
        "import os\nfrom mm_core.media import MediaLimits\n"
        "from mm_core.media.workers import DecodeWorkers, WorkerSettings\n"
        "made = DecodeWorkers(WorkerSettings(2), MediaLimits())\n"
        "print(*[w._process.pid for w in made._workers], flush=True)\n"
        "[w._open() for w in made._workers]\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: str) -> bool:
    """Whether a process is there and no corpse that nobody buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_load_no_torch() -> None:
    code = "import sys, mm_core.media.worker_main; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "triton", "pydantic", "multiprocessing"}
