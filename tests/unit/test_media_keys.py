"""Two different items never share a key, and the same item has the same key in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from mm_core.hashing import (
    ROOT,
    HashAlgorithm,
    block_key,
    encode_fields,
    get_hasher,
    media_digest,
    media_key,
    prompt_block_keys,
)
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits


def digest(value: object, algorithm: HashAlgorithm = "xxh3_128", modality: str = "image") -> bytes:
    return Fetcher(get_hasher(algorithm), MediaLimits()).fetch(modality, value).item.digest  # type: ignore[arg-type]


def twins() -> dict[str, Image.Image]:
    """Different pictures whose raw bytes are equal in groups."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 4, 3000, dtype=np.uint8).tobytes()
    found = {
        "RGB 10×100": Image.frombytes("RGB", (10, 100), raw),
        "RGB 100×10": Image.frombytes("RGB", (100, 10), raw),
        "RGB 20×50": Image.frombytes("RGB", (20, 50), raw),
        "L 30×100": Image.frombytes("L", (30, 100), raw),
        "L 100×30": Image.frombytes("L", (100, 30), raw),
    }
    for name, shift in (("P one", 0), ("P two", 40)):
        palette = Image.frombytes("P", (30, 100), raw)
        palette.putpalette([(shift + 10 * i) % 256 for i in range(768)])
        found[name] = palette
    return found


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_twins_differ(algorithm: HashAlgorithm) -> None:
    images = twins()
    assert len({image.tobytes() for image in images.values()}) == 1
    digests = {name: digest(image, algorithm) for name, image in images.items()}
    for one, two in combinations(digests, 2):
        assert digests[one] != digests[two], (one, two)
    assert {len(d) for d in digests.values()} == {16 if algorithm == "xxh3_128" else 32}


def test_one_pixel_and_orientation_count() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    other = image.copy()
    other.putpixel((9, 9), (1, 2, 3))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    assert len({digest(i) for i in (image, other, turned)}) == 3


def test_shapes_rates_and_times_of_videos_count() -> None:
    flat = np.random.default_rng(2).integers(0, 256, 4 * 6 * 8 * 3, dtype=np.uint8)
    values = [
        flat.reshape(4, 6, 8, 3), flat.reshape(4, 8, 6, 3), flat.reshape(2, 12, 8, 3), flat.reshape(8, 3, 8, 3),
        (flat.reshape(4, 6, 8, 3), 1.0), (flat.reshape(4, 6, 8, 3), 2.0),
    ]  # fmt: skip
    assert len({digest(v, modality="video") for v in values}) == len(values)


def test_a_picture_is_no_video() -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    assert digest(pixels) != digest(pixels[None], modality="video")


def test_every_part_of_the_key_counts() -> None:
    hasher = get_hasher("xxh3_128")
    keys = set()
    count = 0
    for salt in (None, "", "a", "ab"):
        for family, identity in (("f", b"1"), ("f1", b""), ("g", b"1")):
            for settings in (b"", b"s"):
                for variant in (b"", b"v"):
                    for uuid in (None, "", "a"):
                        namespace = encode_fields((salt, family, identity, settings))
                        keys.add(media_key(hasher, namespace, variant, b"d" * 16, uuid))
                        count += 1
    assert len(keys) == count


def test_fields_cannot_be_shifted_into_each_other() -> None:
    assert encode_fields(("ab", "c")) != encode_fields(("a", "bc"))
    assert encode_fields((1, 2, 2)) != encode_fields((1, 22))
    assert encode_fields((1,)) != encode_fields(("1",))
    assert encode_fields((True,)) != encode_fields((1,))
    assert encode_fields((b"x",)) != encode_fields(("x",))


SCRIPT = """
import numpy as np
from mm_core.hashing import encode_fields, get_hasher, media_key
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits
hasher = get_hasher("xxh3_128")
pixels = np.arange(600, dtype=np.uint16).astype(np.uint8).reshape(10, 20, 3)
item = Fetcher(hasher, MediaLimits()).fetch("image", pixels).item
print(media_key(hasher, encode_fields(("salt", "family", b"id", b"")), b"v", item.digest, "uuid").hex())
"""


def test_keys_are_the_same_in_every_process() -> None:
    found = set()
    for seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
    assert len(found.pop().strip()) == 32


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_a_digest_does_not_depend_on_how_the_content_is_held(algorithm: HashAlgorithm) -> None:
    hasher = get_hasher(algorithm)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 3, 4), dtype=np.uint8)
    wanted = hasher(encode_fields(("video", 1, "uint8", pixels.nbytes)) + pixels.tobytes())
    turned = np.asfortranarray(pixels)
    assert not turned.data.c_contiguous
    for data in (pixels.data, turned.data, pixels.tobytes()):
        assert media_digest(hasher, "video", ("uint8",), data) == wanted


RANGES: list[list[tuple[bytes, int, int]]] = [
    [],
    [(b"a" * 16, 18, 274)],
    [(b"a" * 16, 0, 16), (b"b" * 16, 16, 17), (b"c" * 16, 17, 17), (b"d" * 16, 30, 200)],
]


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
@pytest.mark.parametrize("media", RANGES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_keys_of_a_prompt_are_those_of_its_blocks(
    algorithm: HashAlgorithm, media: list[tuple[bytes, int, int]], block_size: int
) -> None:
    hasher, rng = get_hasher(algorithm), np.random.default_rng(4)
    ids = rng.integers(0, 150_000, 299).tolist()
    shifted = np.tile(np.arange(299, dtype=np.int32), (3, 1))
    shifted[1:, 40:] -= 5
    for positions in (None, shifted[:, :299], np.tile(np.arange(299, dtype=np.int32), (2, 1))):
        wanted, parent = [], ROOT
        for start in range(0, 299 - block_size + 1, block_size):
            end = start + block_size
            touched = [(k, max(start - at, 0)) for k, at, last in media if at < end and last > start]
            place = b""
            if positions is not None and (positions[:, start:end] != np.arange(start, end)).any():
                place = positions[:, start:end].tobytes()
            parent = block_key(hasher, parent, ids[start:end], touched, b"salt", place)
            wanted.append(parent)
        assert prompt_block_keys(hasher, block_size, ids, media, b"salt", positions) == tuple(wanted)
    assert prompt_block_keys(hasher, block_size, ids[: block_size - 1], media, b"salt") == ()
