"""Keys are equal exactly where the items, and all that is asked about them, are.

What an item is after normalisation is worked out a second time here, by Pillow, numpy and soxr alone.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.stub_plugin import TOKENIZER, VOCAB, StubFusion, StubProcessor, run
from support.stub_plugin import ask as ask_stub

from mm_core.config import EngineConfig
from mm_core.hashing import ROOT, HashAlgorithm, block_key, encode_fields, get_hasher, media_key, source_key
from mm_core.hookspecs import MediaRequest
from mm_core.inputs import InputPipeline
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits, VideoSampling, decoder
from mm_core.types import MediaItem, Modality

LENGTHS = {"xxh3_128": 16, "sha256": 32}
FETCHERS = {name: Fetcher(get_hasher(name), MediaLimits()) for name in ("xxh3_128", "sha256")}  # type: ignore[arg-type]


class Given(NamedTuple):
    """A value as users hand it over, and what it is: equal exactly where the items are the same."""

    modality: Modality
    value: Any
    truth: tuple[Any, ...]
    sampling: VideoSampling | None = None
    rate: int | None = None

    def digest(self, algorithm: str = "xxh3_128") -> bytes:
        fetched = FETCHERS[algorithm].fetch(self.modality, self.value, self.sampling, sampling_rate=self.rate)
        return fetched.item.digest


# -- pictures ----------------------------------------------------------------------------------------

RAW = [np.random.default_rng(seed).integers(0, 3, 240, dtype=np.uint8).tobytes() for seed in range(2)]
CHANNELS = {"1": 0, "L": 1, "P": 1, "I;16": 2, "LA": 2, "RGB": 3, "RGBA": 4}
PALETTES = [[(40 * i + 7 * j) % 256 for i in range(4) for j in range(3)] for _ in (0,)]
PALETTES += [[(value + 90) % 256 for value in PALETTES[0]]]


def upright(image: Image.Image) -> Image.Image:
    """What a viewer shows of a loaded picture, on white."""
    turned = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = (np.asarray(turned).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        turned.info.update({k: v for k, v in image.info.items() if k == "transparency"})
        rgba = turned.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return turned.convert("RGB")


def shown(image: Image.Image) -> tuple[Any, ...]:
    return "image", image.size, image.tobytes()


def file_of(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@st.composite
def pictures(draw: st.DrawFn) -> Given:
    """The same few bytes as a picture of any shape and mode, in any form."""
    mode, raw = draw(st.sampled_from(sorted(CHANNELS))), draw(st.sampled_from(RAW))
    pixels = len(raw) // max(CHANNELS[mode], 1)
    width = draw(st.sampled_from([w for w in (5, 8, 10, 12, 15) if pixels % w == 0]))
    size = (width, pixels // width)
    if mode == "1":
        image = Image.frombytes("L", size, bytes(80 * b for b in raw)).convert("1", dither=Image.Dither.NONE)
    else:
        image = Image.frombytes(mode, size, raw)
    if mode == "P":
        image.putpalette(draw(st.sampled_from(PALETTES)))
    forms = ["pil", "PNG"] + (["BMP"] if mode in ("1", "L", "P", "RGB") else [])
    form = draw(st.sampled_from(forms + (["array", "float"] if mode in ("L", "RGB") else [])))
    if form == "pil":  # taken as it is
        return Given("image", image, shown(image.convert("RGB")))
    if form in ("array", "float"):
        array = np.asarray(image)
        value = array.astype(np.float32) / 255 if form == "float" else array
        return Given("image", value, shown(image.convert("RGB")))
    options: dict[str, Any] = {}
    if form == "PNG":
        alike = {"P": [0, 1], "L": [1], "RGB": [(0, 1, 2), (1, 1, 1)]}.get(mode, [])
        transparency = draw(st.sampled_from([None, *alike]))
        if transparency is not None:
            options["transparency"] = transparency
        orientation = draw(st.sampled_from([1, 1, 2, 3, 5, 6, 8]))
        if orientation > 1:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = orientation
    data = file_of(image, form, options)
    opened = Image.open(io.BytesIO(data))
    opened.load()
    return Given("image", data, shown(upright(opened)))


# -- films and sounds --------------------------------------------------------------------------------

FILMS = [np.random.default_rng(0).integers(0, 9, 288, dtype=np.uint8), np.zeros(288, np.uint8)]
SHAPES = [(4, 6, 4, 3), (4, 4, 6, 3), (2, 12, 4, 3), (2, 4, 12, 3), (8, 3, 4, 3), (6, 4, 4, 3)]
KEEP_ALL = VideoSampling(fps=None, temporal_patch_size=1)


@st.composite
def films(draw: st.DrawFn) -> Given:
    """The same bytes as frames of any number, size, rate and sampling."""
    frames = draw(st.sampled_from(FILMS)).reshape(draw(st.sampled_from(SHAPES)))
    frames = frames[: draw(st.sampled_from([2, 3, 8]))]
    fps = draw(st.sampled_from([None, 1, 2.0, 4.0]))
    count = draw(st.sampled_from([None, 2]))
    sampling = VideoSampling(num_frames=count, given_frames=count is not None, temporal_patch_size=1)
    kept = list(range(len(frames))) if count is None else [0, len(frames) // 2]
    form = draw(st.sampled_from(["pair", "dict", "list", "pictures"]))
    value: Any = (frames, fps)
    if form == "dict":
        value = {"frames": frames, "fps": fps}
    elif form == "list":
        value = (list(frames), fps)
    elif form == "pictures":
        value = ([Image.fromarray(frame) for frame in frames], fps)
    rate = None if fps is None else float(fps)
    times = () if rate is None else tuple(i / rate for i in kept)
    share = None if rate is None else len(kept) / len(frames) * rate
    truth = ("video", frames[kept].shape, frames[kept].tobytes(), rate, share, times)
    return Given("video", value, truth, sampling)


SOUNDS = [np.random.default_rng(seed).integers(-3, 3, 48).astype(np.int16) * 1000 for seed in range(2)]


def wav(samples: np.ndarray[Any, Any], rate: int, channels: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


@st.composite
def sounds(draw: st.DrawFn) -> Given:
    """The same samples as a sound of one or two channels, at any rate, in any width, cut off or not."""
    samples, rate = draw(st.sampled_from(SOUNDS)), draw(st.sampled_from([8000, 16000, 44100]))
    channels, wanted = draw(st.sampled_from([1, 2])), draw(st.sampled_from([None, 16000]))
    shaped = samples.reshape(-1, channels) if channels > 1 else samples
    mono = (shaped.astype(np.float32) / 32768).reshape(-1, channels).mean(1, dtype=np.float32)
    form = draw(st.sampled_from(["int16", "float32", "float64", "turned", "wav", "cut off"]))
    value: Any = (shaped, rate)
    if form in ("float32", "float64"):
        value = (shaped.astype(form) / 32768, rate)
    elif form == "turned":
        value = (np.ascontiguousarray(shaped.T), rate)
    elif form == "wav":
        value = wav(samples, rate, channels)
    elif form == "cut off":
        value = wav(np.concatenate([samples, samples]), rate, channels)[: -samples.nbytes]
    if wanted is not None and wanted != rate:
        mono = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ").resample_chunk(mono, last=True)
    return Given("audio", value, ("audio", wanted or rate, mono.tobytes(), form == "cut off"), None, wanted)


# -- the properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pictures, films, sounds], ids=lambda kind: kind.__name__)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_items_share_a_digest_exactly_where_they_are_the_same(kind: Callable[[], Any], data: st.DataObject) -> None:
    items = data.draw(st.lists(kind(), min_size=2, max_size=24))
    for algorithm, length in LENGTHS.items():
        digests = [item.digest(algorithm) for item in items]
        assert {len(d) for d in digests} == {length}
        assert len(set(digests)) == len({item.truth for item in items}) == len(
            {(d, item.truth) for d, item in zip(digests, items, strict=True)}
        )  # fmt: skip


def test_of_every_modality_together() -> None:
    """Nothing but the modality tells these apart."""
    raw = np.zeros(48, np.uint8)
    picture, film = raw.reshape(4, 4, 3), raw.reshape(1, 4, 4, 3)
    digests = {Given("image", picture, ()).digest(), Given("video", (film, None), (), KEEP_ALL).digest()}
    assert len(digests | {Given("audio", (np.zeros(12, np.float32), 8000), ()).digest()}) == 3


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_container_is_no_part_of_a_picture(mode: str) -> None:
    size = (10, 240 // CHANNELS[mode] // 10)
    image = Image.frombytes(mode, size, RAW[0])
    lossless = [file_of(image, "WEBP", {"lossless": True}), file_of(image, "PNG", {"compress_level": 0})]
    others = [file_of(image, kind, {}) for kind in ("PNG", "BMP")]
    values = [image, np.asarray(image), image.convert("RGB"), *lossless, *others, bytearray(others[0])]
    assert len({Given("image", value, ()).digest() for value in values}) == 1


Lists = list[list[int]]
NESTED = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(one=NESTED, two=NESTED)
def test_lists_cut_elsewhere_are_other_lists(one: Lists, two: Lists) -> None:
    """[[1, 2], [3]] and [[1], [2, 3]]: as blocks of tokens, as items of a request, as frames of films."""
    assert (chain(one) == chain(two)) is (one == two)
    assert (source_of(one) == source_of(two)) is (one == two)
    assert ([film_of(part) for part in one] == [film_of(part) for part in two]) is (one == two)


def test_the_known_pair_of_lists() -> None:
    one, two = [[1, 2], [3]], [[1], [2, 3]]
    assert (chain(one), source_of(one)) != (chain(two), source_of(two))
    assert chain(one) != chain(two)
    assert source_of(one) != source_of(two)
    assert [film_of(part) for part in one] != [film_of(part) for part in two]


def chain(blocks: Lists) -> bytes:
    parent = ROOT
    for ids in blocks:
        parent = block_key(get_hasher("xxh3_128"), parent, ids, (), b"")
    return parent


def source_of(items: Lists) -> bytes:
    digests = [Given("audio", (np.array(part, np.float32), 8000), ()).digest() for part in items]
    return get_hasher("xxh3_128")(encode_fields(("cross_attention", *digests)))


def film_of(levels: list[int]) -> bytes:
    frames = np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])
    return Given("video", (frames, 1.0), (), KEEP_ALL).digest()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4), st.binary(max_size=4)
)


def decoded(data: bytes) -> list[Any]:
    """What `encode_fields` wrote."""
    fields: list[Any] = []
    while data:
        tag, (size,) = data[:1], struct.unpack("<Q", data[1:9])
        raw, data = data[9 : 9 + size], data[9 + size :]
        assert len(raw) == size
        read: dict[bytes, Callable[[], Any]] = {
            b"n": lambda raw=raw: None, b"b": lambda raw=raw: raw == b"\1", b"i": lambda raw=raw: int(raw),
            b"f": lambda raw=raw: struct.unpack("<d", raw)[0], b"s": lambda raw=raw: raw.decode(),
            b"y": lambda raw=raw: raw,
        }  # fmt: skip
        fields.append(read[tag]())
    return fields


@settings(max_examples=200, deadline=None)
@given(fields=st.lists(SCALARS, max_size=6))
def test_a_record_can_be_read_back(fields: list[Any]) -> None:
    """So no two lists of fields have one record."""
    back = decoded(encode_fields(fields))
    assert back == fields
    assert [type(value) for value in back] == [type(value) for value in fields]


# -- the whole key -----------------------------------------------------------------------------------


class Circumstances(NamedTuple):
    """All that enters a media key beside the content."""

    salt: str | None = None
    uuid: str | None = None
    options: tuple[tuple[str, int], ...] = ()
    count: int = 1
    family: str = "stub"
    identity: bytes = b"id"
    settings: bytes = b""
    algorithm: HashAlgorithm = "xxh3_128"


class Counting(StubProcessor):
    """A picture alone is cut otherwise than one of several: the variant says which."""

    def __init__(self, settings_key: bytes) -> None:
        super().__init__()
        self.settings_key = settings_key

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        return json.dumps([request.processor_kwargs.get("size"), request.counts["image"] == 1]).encode()


PIPELINES: dict[tuple[Any, ...], InputPipeline] = {}


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    for pipeline in PIPELINES.values():
        pipeline.close()
    PIPELINES.clear()


def pipeline_of(at: Circumstances) -> InputPipeline:
    where = (at.family, at.identity, at.settings, at.algorithm)
    if where not in PIPELINES:
        config = EngineConfig(preprocess_threads=1, hash_algorithm=at.algorithm)
        PIPELINES[where] = InputPipeline(
            Counting(at.settings), StubFusion(), at.family, at.identity, config, VOCAB, 400, (3,)
        )
    return PIPELINES[where]


@cache
def small(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 10, 3), dtype=np.uint8))


def key_at(at: Circumstances, picture: int, *, uuid_only: bool = False) -> bytes:
    """The key that a request gets for a picture, the first of `count`."""
    values: list[Any] = [None if uuid_only else small(picture), *(small(100 + i) for i in range(1, at.count))]
    uuids = [at.uuid] + [None] * (at.count - 1)
    prompt = ask_stub(values, uuids, mm_processor_kwargs=dict(at.options), cache_salt=at.salt)
    return run(pipeline_of(at), prompt).ranges[0].feature.key


CIRCUMSTANCES = st.builds(
    Circumstances,
    salt=st.sampled_from([None, "a", "ab", "b"]),
    uuid=st.sampled_from([None, "a", "ab", "None"]),
    options=st.sampled_from([(), (("size", 1),), (("size", 11),)]),
    count=st.sampled_from([1, 2, 3]),
    family=st.sampled_from(["stub", "stub2"]),
    identity=st.sampled_from([b"id", b"id2"]),
    settings=st.sampled_from([b"", b"s"]),
    algorithm=st.sampled_from(["xxh3_128", "sha256"]),
)


@settings(max_examples=120, deadline=None)
@given(asked=st.lists(st.tuples(CIRCUMSTANCES, st.integers(0, 2)), min_size=2, max_size=12))
def test_requests_share_a_key_exactly_where_nothing_differs(asked: list[tuple[Circumstances, int]]) -> None:
    truths = [(at._replace(count=min(at.count, 2)), picture) for at, picture in asked]  # alone, or one of several
    keys = [key_at(at, picture) for at, picture in asked]
    assert len(set(keys)) == len(set(truths)) == len(set(zip(keys, truths, strict=True)))
    assert all(len(key) == LENGTHS[at.algorithm] for key, (at, _) in zip(keys, asked, strict=True))


OTHERS: dict[str, Any] = {
    "salt": "x", "uuid": "x", "options": (("size", 5),), "count": 2, "family": "stub2", "identity": b"id2",
    "settings": b"s", "algorithm": "sha256",
}  # fmt: skip


@pytest.mark.parametrize("field", Circumstances._fields)
def test_each_circumstance_counts(field: str) -> None:
    plain = Circumstances()
    assert key_at(plain, 0) == key_at(plain, 0) != key_at(plain._replace(**{field: OTHERS[field]}), 0)


def test_a_uuid_alone_finds_the_key_of_its_content() -> None:
    for at in (Circumstances(uuid="n"), Circumstances(uuid="n", salt="s"), Circumstances(uuid="n", count=2)):
        key = key_at(at, 4)
        assert key_at(at, 4, uuid_only=True) == key
        newer = key_at(at, 5)
        assert key_at(at, 5, uuid_only=True) == newer != key
        assert key_at(at, 4) == key, "the old content has its old key"


def test_sha256_is_sha256_and_never_shortened() -> None:
    import hashlib

    hasher = get_hasher("sha256")
    wanted = hashlib.sha256(encode_fields((b"n", b"v", b"d" * 32, "u"))).digest()
    assert media_key(hasher, b"n", b"v", b"d" * 32, "u") == wanted
    request = run(pipeline_of(Circumstances(algorithm="sha256")), TOKENIZER.decode([5] * 80))
    keys = [*request.block_keys, source_key(hasher, wanted, 0), block_key(hasher, ROOT, [1], (), b"")]
    assert len(request.block_keys) >= 2
    assert {len(key) for key in keys} == {32}


SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import numpy as np
from mm_core.hashing import ROOT, block_key, encode_fields, get_hasher, media_key, prompt_block_keys, source_key
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits
ramp = np.arange(1200, dtype=np.uint16).astype(np.uint8)
values = {"image": ramp.reshape(20, 20, 3), "video": (ramp.reshape(4, 10, 10, 3), 2.0), "audio": (ramp, 8000)}
for name in ("xxh3_128", "sha256"):
    hasher = get_hasher(name)
    for modality, value in values.items():
        digest = Fetcher(hasher, MediaLimits()).fetch(modality, value).item.digest
        key = media_key(hasher, encode_fields(("salt", "family", b"id", b"")), b"v", digest, "uuid")
        block = block_key(hasher, ROOT, range(16), [(key, 0)], b"c", b"p")
        prompt = prompt_block_keys(hasher, 16, list(range(64)), [(key, 3, 40)], b"c")
        print(digest.hex(), key.hex(), block.hex(), source_key(hasher, key, 1).hex(), *(k.hex() for k in prompt))
"""


def test_keys_of_all_kinds_are_the_same_in_every_process() -> None:
    found = []
    for seed in ("0", "4242"):
        command = [sys.executable, "-c", SCRIPT, json.dumps(sys.path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        found.append(done.stdout)
    assert found[0] == found[1]
    keys = found[0].split()
    assert len(keys) == len(set(keys)) == 2 * 3 * 8


# -- encoded bytes that were seen before -------------------------------------------------------------


def encoded_items() -> list[tuple[Modality, bytes, str]]:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for level in (10, 200, 90, 30):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    picture = file_of(small(0), "PNG", {})
    return [
        ("image", picture, "decode_image"), ("video", buffer.getvalue(), "decode_video"),
        ("audio", wav(SOUNDS[0], 8000, 1), "decode_audio"),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(3), ids=["image", "video", "audio"])
def test_bytes_seen_before_are_not_decoded_again(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modality, data, name = encoded_items()[index]
    decode, calls = getattr(decoder, name), []
    monkeypatch.setattr(decoder, name, lambda *given: calls.append(1) or decode(*given))
    fetcher = Fetcher(get_hasher("xxh3_128"), MediaLimits())
    first = fetcher.fetch(modality, data).item
    again = fetcher.fetch(modality, bytes(bytearray(data)))
    assert (again.item.digest, again.item.info, again.item.data) == (first.digest, first.info, None)
    assert len(calls) == 1
    assert again.load().digest == first.digest
    assert len(calls) == 2, "who wants the content decodes it"
    assert fetcher.fetch(modality, data, salt="theirs").item.digest == first.digest
    assert len(calls) == 3, "another salt's bytes are not recognised"
    if modality == "video":
        other = fetcher.fetch(modality, data, VideoSampling(num_frames=2)).item
        assert (len(calls), other.digest != first.digest) == (4, True)
    if modality == "audio":
        other = fetcher.fetch(modality, data, sampling_rate=16000).item
        assert (len(calls), other.digest != first.digest) == (4, True)
